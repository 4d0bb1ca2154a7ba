"""`--parallel tensor`: one model on several GPUs, a process each, by transformers' own tensor parallelism.

    torchrun --nproc-per-node 2 -m sparsekv generate --model ID --prompt-file F --parallel tensor

All ranks run the command; the first one reads what is typed, speaks and writes, and the others are silent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from transformers.distributed import DistributedConfig

from sparsekv.command_line import EXIT_ERROR, Run
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.hf.ranks import Ranks

TENSOR = "tensor"
AUTO = "auto"
TIMEOUT = timedelta(minutes=30)  # of a collective: the longest that ranks may be apart while they load a model
_KEYS = ("k_proj", "qkv_proj", "query_key_value", "kv_b_proj")  # what a plan calls the layer that makes keys


def add_argument(parser: argparse.ArgumentParser) -> None:
    """`--parallel`."""
    parser.add_argument(
        "--parallel", choices=[TENSOR],
        help="tensor: one model on all GPUs that `torchrun --nproc-per-node N -m sparsekv ...` was given",
    )  # fmt: skip


def by_all_ranks(run: Run) -> Run:
    """The `run` of a command that has `--parallel`: it fails in all ranks or in none, and the first alone speaks."""

    def by_all(args: argparse.Namespace, command: str) -> int:
        if args.parallel is None:
            return run(args, command)
        if int(os.environ.get("RANK", 0)) == 0:
            return _together(run, args, command)
        try:
            with _silent():
                return _together(run, args, command)
        except (SparseKVError, OSError, torch.OutOfMemoryError, KeyboardInterrupt):
            return EXIT_ERROR  # the first rank says why

    return by_all


def start(device: str | None) -> Ranks:
    """Lets the processes that were launched together find each other, each on a GPU of its own.

    Raises:
        ConfigError: they were not launched together, or there are more of them than GPUs, or a device is named.
    """
    if "LOCAL_RANK" not in os.environ:
        raise ConfigError(
            "--parallel tensor needs a process for each GPU: torchrun --nproc-per-node N -m sparsekv COMMAND ..."
        )
    local, on_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    wanted, present = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
    if device not in (None, AUTO, "cuda" if on_gpus else "cpu"):
        raise ConfigError(
            f"--device {device}: with --parallel tensor each rank takes a GPU of its own. Leave it out."
        )
    if on_gpus and wanted > present:
        raise ConfigError(f"--parallel tensor: {wanted} ranks were launched here, and there are {present} GPUs.")
    if on_gpus:
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        where = torch.device("cuda", local) if on_gpus else None
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=TIMEOUT, device_id=where)
    return Ranks.of_launch()


def divided(config: Any) -> dict[str, Any]:
    """What `from_pretrained` is given beside, so that each rank gets its part of a model.

    Args:
        config: the model's.

    Raises:
        ConfigError: it cannot be divided among so many.
    """
    size = Ranks.of_launch().size
    if size == 1:
        return {}
    text = config.get_text_config(decoder=True)
    if not text.base_model_tp_plan:
        experts = ", only one for its experts" if getattr(text, "base_model_ep_plan", None) else ""
        raise ConfigError(
            f"--parallel tensor: transformers has no plan by which the layers of a {text.model_type} could be divided"
            f"{experts}. Run it on one GPU."
        )
    # Latents have all query heads, and one head in the cache, which each rank keeps.
    counts = {text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads}
    if divides_heads(config) and any(count % size for count in counts):
        raise ConfigError(
            f"--parallel tensor: {text.num_attention_heads} query heads and {min(counts)} kv heads cannot be divided "
            f"among {size} ranks. Take as many as divide both."
        )
    return {"distributed_config": DistributedConfig(tp_plan="auto")}


def divides_heads(config: Any) -> bool:
    """Whether by transformers' plan each rank keeps the keys and values of its own heads; else it keeps all."""
    plan = config.get_text_config(decoder=True).base_model_tp_plan or {}
    return any(name.endswith(_KEYS) and style == "colwise" for name, style in plan.items())


def _together(run: Run, args: argparse.Namespace, command: str) -> int:
    is_first = not dist.is_initialized()
    with start(args.device).together("the command"):
        code = run(args, command)
    if is_first and dist.is_initialized():  # else torch warns that it was left open
        dist.destroy_process_group()
    return code


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Within it nothing that this process writes to stdout or stderr is seen, whoever writes it."""
    sys.stdout.flush(), sys.stderr.flush()
    kept = [os.dup(place) for place in (1, 2)]
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 1), os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        for place, where in zip((1, 2), kept, strict=True):
            os.dup2(where, place)
            os.close(where)
