"""What several ranks do together, for `test_ranks.py`: run by torchrun, each writes what came of every case.

    torchrun --nproc-per-node 2 tests/hf/two_ranks/run.py FOLDER cpu

A case is a function that both ranks run; what it gives is written before the next one begins, so a case that hangs is
the one that is missing.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

import torch
import torch.distributed as dist
from models import CASES, FOLDER, OF_GPUS, SIZES
from transformers.utils import logging

from sparsekv.hf import ranks

# In this order: after the last one the ranks cannot go on.
for of in ("answers", "captures", "calls", "commands", "torn"):
    importlib.import_module(of)


def run_all(kind: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ranks.PATIENCE = 0.5
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        SIZES.update(OF_GPUS)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    path = FOLDER / f"{dist.get_rank()}.jsonl"
    for name, run in CASES.items():
        if kind == "cuda" and name.startswith("the_command"):  # their models have two kv heads
            continue
        try:
            found = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, found]) + "\n")


if __name__ == "__main__":
    run_all(sys.argv[2])
