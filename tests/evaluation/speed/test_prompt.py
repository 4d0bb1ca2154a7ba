"""How attention over listed blocks is timed, run on the CPU with a small chunk."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sparsekv.errors import ConfigError, KernelError
from sparsekv.evaluation import speed
from sparsekv.evaluation.speed import prompt_bench
from sparsekv.evaluation.speed.prompt_bench import random_blocks

SMALL = "prompt --device cpu --queries 70 --context 200 --head-dim 16 --block 16 --repeats 2"


@pytest.mark.parametrize("density", [0.01, 0.25, 1.0])
def test_so_many_causal_blocks_are_listed(density: float) -> None:
    blocks = random_blocks(3, 2, 9, density, torch.device("cpu"))
    causal = torch.ones(7, 9, dtype=torch.bool).tril(2)
    assert not bool((blocks & ~causal).any())
    assert bool(blocks[..., range(7), range(2, 9)].all())
    assert blocks.sum(-1)[0].tolist() == [[math.ceil(density * i) for i in range(3, 10)]] * 3


def test_what_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = speed.measure(f"{SMALL} --densities .25 1 --out {tmp_path}")
    assert [(row["what"], row["density"]) for row in found["rows"]] == [
        ("dense", None), ("sparsekv", 0.25), ("sparsekv", 1.0),
    ]  # fmt: skip
    assert all(row["ms"] > 0 and row["tflops"] > 0 for row in found["rows"])
    assert json.loads((tmp_path / "prompt_cpu.json").read_text()) == found
    assert "TFLOP/s of what is computed" in capsys.readouterr().out


def test_nothing_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = prompt_bench.prompt.prompt_attention

    def wrong(*args: Tensor) -> Tensor:
        return right(*args) + 1

    monkeypatch.setattr(prompt_bench.prompt, "prompt_attention", wrong)
    with pytest.raises(KernelError, match="beside plain torch"):
        speed.measure(f"{SMALL} --densities 1")


@pytest.mark.parametrize("options", ["--densities 0", "--queries 300", "--q-heads 3 --kv-heads 2"])
def test_what_cannot_be_is_refused(options: str) -> None:
    with pytest.raises(ConfigError, match="no more queries than keys"):
        speed.measure(f"{SMALL} {options}")
