"""Every promised kernel compiles for every promised architecture, on a machine without a GPU."""

import itertools
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from sparsekv.ops import compiler, instances, why_reference
from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.formats import FORMATS, formats_with_kernels
from sparsekv.ops.formulas import kernel_of, with_kernels

needs_nvrtc = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]'"
)
ARCHS = ("sm_80", "sm_90", "sm_100")
# Of formats those without which no other is made, and which of them each head size (a row) and digest meets.
FORMATS_MET, MEETING = ("plain", "int8", "int4"), ("0201", "2010", "1120", "0122")


def compiled(specs: Iterable[KernelSpec], arch: str) -> bool:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return all(
            cubin.code and cubin.symbol for cubin in pool.map(lambda x: compiler.compile_cubin(x, arch), specs)
        )


def covering() -> list[tuple[str, tuple[Any, ...]]]:
    """An architecture and a geometry for every head size and digest: the rest takes turns along the diagonals."""
    kernels, dtypes, groups = [kernel_of(name) for name in with_kernels()], list(instances.ELEMENTS), instances.GROUPS
    kinds = [[FORMATS.get(FORMATS_MET[int(which)]) for which in row] for row in MEETING]
    return [
        (ARCHS[(i - j) % 3], (dtypes[(i + j) % 2], head_dim, groups[(i + j) % 3], kernel, kinds[i][j]))
        for (i, head_dim), (j, kernel) in itertools.product(enumerate(instances.HEAD_DIMS), enumerate(kernels))
    ]


def latents() -> list[tuple[str, tuple[Any, ...]]]:
    """The same of latents: for each size every dtype, group, digest and architecture once."""
    kernel, dtypes = kernel_of("sign_sketch"), list(instances.ELEMENTS)
    return [
        (ARCHS[(i + j) % 3], (dtypes[(i + j) % 2], head_dim, group, kernel))
        for (i, head_dim), (j, group) in itertools.product(
            enumerate(instances.LATENT_DIMS), enumerate(instances.GROUPS)
        )
    ]


def test_any_two_choices_meet_in_what_is_compiled() -> None:
    rows = [(arch, *geometry) for arch, geometry in covering()]
    for one, other in itertools.combinations(zip(*rows, strict=True), 2):
        assert len(set(zip(one, other, strict=True))) == len(set(one)) * len(set(other))
    promised = {spec for _, geometry in covering() + latents() for spec in instances.of_model(*geometry)}
    for part in (lambda x: x.source, lambda x: x.headers):
        assert {part(spec) for spec in promised} == {part(spec) for spec in instances.promised(FORMATS_MET)}


@needs_nvrtc
@pytest.mark.wide
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_for_every_architecture(arch: str) -> None:
    """To machine code, which takes seconds: those of `covering`. `sparsekv doctor --compile` compiles all."""
    geometries = [geometry for on, geometry in covering() + latents() if on == arch]
    assert compiled({spec for geometry in geometries for spec in instances.of_model(*geometry)}, arch)


@needs_nvrtc
@pytest.mark.wide
def test_every_promised_kernel_is_right_to_the_compiler() -> None:
    """Its templates and its claims: all that NVRTC can refuse before it makes machine code, a tenth of the work. Of
    formats besides plain pages, the kernels for two groups of every head size."""
    from cuda.core import Program, ProgramOptions

    folder, only = str(compiler.sources_dir()), {"link_time_optimization": True}
    options = ProgramOptions(arch="sm_90", include_path=[folder], **compiler.OPTIONS, **only)
    specs = instances.promised()
    assert len(specs) == len(set(specs)) > 50
    minmax = kernel_of("minmax")
    assert minmax is not None
    for name, head_dim in itertools.product(formats_with_kernels(), instances.HEAD_DIMS):
        for dtype, group in ((torch.bfloat16, 4), (torch.float16, 16)):
            specs += instances.of_model(dtype, head_dim, group, minmax, FORMATS.get(name))
    for spec in dict.fromkeys(specs):
        assert Program(compiler._text(spec), "c++", options).compile("ltoir", (spec.expression,)).code


@needs_nvrtc
@pytest.mark.gpu
def test_every_promised_kernel_compiles_for_this_gpu() -> None:
    assert compiled(instances.promised(), compiler.arch_of(0))


@needs_nvrtc
def test_the_kernels_of_a_common_model_compile() -> None:
    kernel = kernel_of("minmax")
    assert kernel is not None
    assert compiled(instances.of_model(torch.bfloat16, 128, 4, kernel), "sm_90")


@needs_nvrtc
def test_the_kernels_of_common_latents_compile() -> None:
    kernel = kernel_of("sign_sketch")
    assert kernel is not None
    assert compiled(instances.of_model(torch.bfloat16, 576, 16, kernel), "sm_80")


@needs_nvrtc
def test_hopper_has_a_kernel_of_its_own_for_prompts() -> None:
    """For sm_90 all its instructions are there; for another architecture nothing is."""
    spec = instances.prompt_attention_sm90(torch.float16, 64)
    hopper, other = (len(compiler.compile_cubin(spec, arch).code) for arch in ("sm_90", "sm_100"))
    assert hopper > 3 * other


def test_promised_are_all_shapes_that_are_served() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for head_dim in (64, 96, 128, 256):
            for group in range(1, 17):
                assert all(instances.why_not(dtype, head_dim, group, page) is None for page in (16, 32, 64))
                for kernel in map(kernel_of, with_kernels()):
                    assert set(instances.of_model(dtype, head_dim, group, kernel)) <= set(instances.promised())


@pytest.mark.parametrize(
    ("head_dim", "digest", "kv", "said"),
    [
        (576, "sign_sketch", "plain", None),
        (288, "sketch2", "plain", None),
        (
            576,
            "minmax",
            "plain",
            "digest 'minmax' is appended and scored in plain torch (kernels: 'sign_sketch', 'sk",
        ),
        (576, "sign_sketch", "int8", "pages of format 'int8' are written and read in plain torch (kernels: 'plain')"),
        (24, "sign_sketch", "plain", "head_dim 24"),
    ],
)
def test_latents_are_served_in_part(head_dim: int, digest: str, kv: str, said: str | None, monkeypatch: Any) -> None:
    """Plain pages, with sketches, of the widths that models have: the rest is in plain torch."""
    monkeypatch.setattr(compiler, "unavailable", lambda device=None: None)
    geometry = (torch.device("cuda", 0), torch.bfloat16, (head_dim, 128), 16, digest, kv)
    reason = why_reference(*geometry)
    assert reason is None if said is None else str(reason).startswith(said)


def test_query_heads_that_share_latents_are_served_by_up_to_sixteen() -> None:
    for group, together in [(1, 1), (16, 16), (17, 1), (20, 10), (40, 10), (64, 16), (128, 16)]:
        assert instances.why_not(torch.bfloat16, 576, group, 16) is None
        assert instances.heads_together(576, group) == together
    assert instances.heads_together(128, 12) == 12


@pytest.mark.parametrize(
    ("geometry", "reason"),
    [
        ((torch.float32, 128, 4, 16), "float32"),
        ((torch.bfloat16, 80, 4, 16), "head_dim 80"),
        ((torch.bfloat16, 24, 4, 16), "of latents 288 and 576"),
        ((torch.bfloat16, 128, 17, 16), "17 query heads"),
        ((torch.bfloat16, 128, 4, 8), "page_size 8"),
    ],
)
def test_what_no_kernel_serves_has_a_reason(geometry: tuple[torch.dtype, int, int, int], reason: str) -> None:
    assert reason in str(instances.why_not(*geometry))
