"""Every promised kernel compiles for every promised architecture, on a machine without a GPU."""

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparsekv.ops import compiler, instances
from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.formulas import kernel_of, with_kernels

needs_nvrtc = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]'"
)


def compiled(specs: list[KernelSpec], arch: str) -> bool:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(
            cubin.code and cubin.symbol for cubin in pool.map(lambda x: compiler.compile_cubin(x, arch), specs)
        )


@needs_nvrtc
@pytest.mark.wide
@pytest.mark.parametrize("part", range(4))
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_every_promised_kernel_compiles(arch: str, part: int) -> None:
    """Both element types for one architecture, whose functions they share, and one of them for the others."""
    specs = [spec for spec in instances.promised() if arch == "sm_90" or "fp16" not in spec.expression]
    assert len(specs) == len(set(specs)) > 50
    assert compiled(specs[part::4], arch)


@needs_nvrtc
def test_the_kernels_of_a_common_model_compile() -> None:
    kernel = kernel_of("minmax")
    assert kernel is not None
    assert compiled(instances.of_model(torch.bfloat16, 128, 4, kernel), "sm_90")


def test_promised_are_all_shapes_that_are_served() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 96, 128, 256):
            for group in range(1, 17):
                assert all(instances.why_not(dtype, head_dim, group, page) is None for page in (16, 32, 64))
                for kernel in map(kernel_of, with_kernels()):
                    assert set(instances.of_model(dtype, head_dim, group, kernel)) <= set(instances.promised())


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        ((torch.float32, 128, 4, 16), "float32"),
        ((torch.bfloat16, 80, 4, 16), "head_dim 80"),
        ((torch.bfloat16, 128, 17, 16), "17 query heads"),
        ((torch.bfloat16, 128, 4, 8), "page_size 8"),
    ],
)
def test_what_no_kernel_serves_has_a_reason(geometry: tuple[torch.dtype, int, int, int], reason: str) -> None:
    assert reason in str(instances.why_not(*geometry))
