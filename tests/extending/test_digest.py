"""A digest with a kernel of its own: one `.py`, one `.cuh`, and nothing in the package that names it."""

import importlib.util
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError, KernelCompileError
from sparsekv.ops import DigestKernel, compiler, instances, why_reference
from sparsekv.testing.cases import Case
from sparsekv.testing.soak import Tally, check

needs_nvrtc = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]'"
)


def load(path: Path) -> type:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Peak


Peak = load(Path(__file__).with_name("peak_digest.py"))


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    DIGESTS.register("peak")(Peak)
    yield
    DIGESTS.remove("peak")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_its_kernels_compile(arch: str) -> None:
    for spec in (
        instances.append_kv(torch.float16, 96, Peak.kernel),
        instances.score_pages(torch.bfloat16, 128, 16, Peak.kernel),
        instances.sparse_decode(torch.bfloat16, 64, 4, Peak.kernel),
    ):
        assert compiler.compile_cubin(spec, arch).code


@needs_nvrtc
def test_a_wrong_count_of_staged_words_does_not_compile() -> None:
    wrong = replace(Peak.kernel, staged=lambda head_dim, heads: 7)
    with pytest.raises(KernelCompileError, match="STAGED == 7"):
        compiler.compile_cubin(instances.score_pages(torch.bfloat16, 64, 4, wrong), "sm_90")


@needs_nvrtc
def test_its_header_is_part_of_a_kernels_key(tmp_path: Path) -> None:
    header = tmp_path / "own.cuh"
    keys = set()
    for text in ("// one", "// another"):
        header.write_text(text)
        keys.add(compiler._key(instances.append_kv(torch.float16, 64, replace(Peak.kernel, header=header)), "sm_90"))
    assert len(keys) == 2


@needs_nvrtc
def test_a_header_that_is_not_there_is_named() -> None:
    lost = replace(Peak.kernel, header="/nowhere/lost.cuh")
    with pytest.raises(KernelCompileError, match=r"lost\.cuh"):
        compiler.compile_cubin(instances.append_kv(torch.float16, 64, lost), "sm_90")


def test_a_kernel_takes_up_to_eight_tensors() -> None:
    with pytest.raises(ConfigError, match="up to 8 tensors; Nine has 9"):
        DigestKernel("nine.cuh", "Nine", (None,) * 9, staged=lambda head_dim, heads: 0)


@pytest.mark.gpu
def test_on_a_gpu_its_kernels_do_what_its_class_says() -> None:
    assert why_reference(torch.device("cuda", 0), torch.bfloat16, (128, 4), 16, "peak") is None
    rng = random.Random(0)
    for _ in range(40):
        check(replace(Case.draw(rng), digest="peak"), torch.device("cuda", 0), Tally())
