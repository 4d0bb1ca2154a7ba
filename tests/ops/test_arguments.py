"""What Python hands to a kernel is what its source asks for, in number and type. No GPU needed."""

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sparsekv import ops
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError
from sparsekv.ops import around, compiler, cuda, flex, launch, plans, prompt_cuda, reference
from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.formulas import MAX_TENSORS, kernel_of, with_kernels
from sparsekv.ops.launch import Gpu
from sparsekv.ops.plans import Split
from sparsekv.testing.pages import fitted_state, fresh_summary, random_pages

FORMATS = {
    "i64": "q",
    "int": "i",
    "float": "f",
    "PromptMaps": "m" * 384,
}  # of `struct`; m: a byte of maps; a pointer is "P"


def parameter_format(spec: KernelSpec) -> str:
    """Of a kernel, read from its source."""
    name = spec.expression.partition("<")[0]
    source = re.sub(r"//.*", "", (compiler.sources_dir() / spec.source).read_text())
    found = re.search(rf"__global__[^;{{]*?\b{name}\s*\(([^{{]*)\)\s*{{", source)
    assert found is not None, spec
    parameters = re.sub(r"<[^>]*>|\[\[.*?\]\]|const |__grid_constant__", "", found[1]).split(",")
    if parameters[-1].split()[0].endswith("Params"):
        parameters = [*parameters[:-1], *members_of(parameters[-1].split()[0])]
    return "".join(format_of(parameter.split()) for parameter in parameters)


def members_of(struct: str) -> list[str]:
    texts = [re.sub(r"//.*", "", path.read_text()) for path in compiler.sources_dir().rglob("*.cu*")]
    (members,) = (found[1] for text in texts if (found := re.search(rf"struct {struct} {{(.*?)}};", text, re.DOTALL)))
    return [part for line in members.split(";") for part in declared(line)]


def declared(line: str) -> list[str]:
    """`int a, b` is two, and `int a[3][3]` nine."""
    first, *others = line.strip().split(",")
    if sizes := re.findall(r"\[(\d+)\]", first):
        return [first] * math.prod(map(int, sizes))
    return [first, *(f"{first.split()[0]} {other}" for other in others)] if first else []


def format_of(words: list[str]) -> str:
    if "*" in " ".join(words):
        return "P"
    return "P" * MAX_TENSORS if words[0] == "Digests" else FORMATS[words[0]]


class Launches:
    """What would have been launched."""

    def __init__(self) -> None:
        self.made: list[str] = []

    def __call__(
        self,
        spec: KernelSpec,
        like: torch.Tensor,
        grid: tuple[int, int, int],
        warps: int,
        args: list[Any],
        shared: int = 0,
        cluster: int = 1,
        maps: bytes = b"",
    ) -> None:
        assert "m" * len(maps) + "".join(map(launch._format, args)) == parameter_format(spec), spec
        assert len(launch.packed(args)) % 4 == 0
        assert min(grid) > 0
        assert grid[0] % cluster == 0
        assert warps in (4, 8, 12, 16)
        assert 0 <= shared <= 220_000
        self.made.append(spec.expression.partition("<")[0])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Calls of the CUDA ops end here, for tensors on the CPU, as if on an H200."""
    launches = Launches()
    for function in (plans.attend_plan, plans._step_plan, plans.score_plan):
        function.cache_clear()
    for module in (cuda, around, prompt_cuda):
        monkeypatch.setattr(module, "usable", lambda device: True)
        monkeypatch.setattr(module, "launch", launches)
    monkeypatch.setattr(plans, "gpu", lambda device: Gpu(132, (9, 0), 220_000))
    monkeypatch.setattr(plans, "capacity", lambda spec, device, cluster, warps, shared: 7 * (18 // cluster))
    yield launches
    for function in (plans.attend_plan, plans._step_plan, plans.score_plan):
        function.cache_clear()


def arguments(group: int, head_dim: int, page_size: int = 16, digest: str = "minmax") -> dict[str, tuple[Any, ...]]:
    """Of every op, for a ragged batch."""
    pages = random_pages([70, 9], head_dim=head_dim, page_size=page_size, dtype=torch.bfloat16)
    state = fitted_state(DIGESTS.get(digest)(), pages)
    summary = fresh_summary(digest, pages, state)
    query, new = torch.randn(2, 2 * group, head_dim).bfloat16(), torch.randn(2, 2, 1, head_dim).bfloat16()
    where = (pages.block_table, pages.seq_lens)
    slots = torch.zeros(2, 2, 3, dtype=torch.int32)
    sinks = torch.zeros(2 * group)
    valid = torch.ones(2, 1, dtype=torch.bool)
    settings = (None, digest, "max", 3, 4, 4, 0.1)
    return {
        "append_kv": (new, new, valid, *where, pages.kv_pool, summary, state, digest),
        "score_pages": (query, summary, state, *where, page_size, digest, "mean_softmax", 0.1),
        "select_pages": (torch.randn(2, 2, 7), pages.seq_lens, page_size, 3, 4, 4, None),
        "attend_pages": (query, pages.kv_pool, *where, slots, 0.1, 5.0, sinks),
        "sparse_decode": (query, new, new, *where, pages.kv_pool, summary, state, *settings, 0.0, sinks),
    }


@pytest.mark.parametrize("group", [1, 5, 16])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("digest", with_kernels())
@pytest.mark.parametrize("name", ["append_kv", "score_pages", "select_pages", "attend_pages", "sparse_decode"])
def test_arguments_are_those_of_the_source(
    name: str, digest: str, head_dim: int, group: int, launches: Launches
) -> None:
    getattr(cuda, name)(*arguments(group, head_dim, digest=digest)[name])
    assert launches.made == [name]


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
@pytest.mark.parametrize("size", [64, 128])
def test_arguments_of_a_prompt_are_those_of_the_source(
    size: int, capability: tuple[int, int], head_dim: int, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver makes the maps that sm_90 copies by: they are taken for granted."""
    monkeypatch.setattr(prompt_cuda, "gpu", lambda device: Gpu(132, capability, 220_000))
    monkeypatch.setattr(prompt_cuda, "tensor_map", lambda tokens, rows: bytes(128))
    query, key = torch.randn(1, 70, 4, head_dim).bfloat16(), torch.randn(1, 200, 2, head_dim).bfloat16()
    blocks = -(-200 // size) - 130 // size
    lists = torch.ones(1, 2, blocks, dtype=torch.int32), torch.zeros(1, 2, blocks, 3, dtype=torch.int32)
    tokens = [x.transpose(1, 2) for x in (query, key, key)]
    assert prompt_cuda.prompt_attention(*tokens, *lists, size, 0.1).shape == (1, 4, 70, head_dim)
    by_wgmma = capability == (9, 0) and head_dim != 96 and size == 128
    assert launches.made == ["prompt_attention_sm90" if by_wgmma else "prompt_attention"]


@pytest.mark.parametrize(
    ("dtypes", "head_dim", "queries", "size", "by"),
    [
        ((torch.bfloat16, torch.bfloat16), 128, 9, 128, "score_blocks"),
        ((torch.float16, torch.float16), 256, 9, 64, "score_blocks"),
        ((torch.bfloat16, torch.float16), 128, 9, 128, "flex"),
        ((torch.bfloat16, torch.bfloat16), 80, 9, 128, "flex"),
        ((torch.bfloat16, torch.bfloat16), 128, 0, 128, "flex"),
        ((torch.bfloat16, torch.bfloat16), 128, 9, 96, "flex"),
    ],
)
def test_arguments_of_scores_of_a_prompt_are_those_of_the_source(
    dtypes: tuple[torch.dtype, torch.dtype],
    head_dim: int,
    queries: int,
    size: int,
    by: str,
    launches: Launches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prompt_cuda, "gpu", lambda device: Gpu(132, (9, 0), 220_000))
    monkeypatch.setattr(flex, "score_blocks", lambda *args: launches.made.append("flex"))
    query, key = torch.randn(1, 4, queries, head_dim), torch.randn(1, 2, 300, head_dim)
    found = prompt_cuda.score_blocks(query.to(dtypes[0]), key.to(dtypes[1]), range(queries), size, 0.1)
    assert launches.made == [by]
    assert by == "flex" or (found.shape, found.dtype) == ((1, 4, queries, -(-300 // size)), torch.float32)


def test_long_dense_attention_is_two_launches(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "split_attention", lambda *args: Split(5, False, 8))
    cuda.attend_pages(*arguments(4, 128)["attend_pages"])
    assert launches.made == ["attend_pages", "merge_attention"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("append_kv", {8: "sign_sketch"}),
        ("score_pages", {6: "sign_sketch"}),
        ("select_pages", {2: 8}),
        ("attend_pages", {0: torch.zeros(2, 8, 64)}),
    ],
)
def test_what_no_kernel_serves_launches_none(name: str, change: dict[int, Any], launches: Launches) -> None:
    changed = list(arguments(4, 64)[name])
    for place, value in change.items():
        changed[place] = value
    if name in ("append_kv", "score_pages"):  # a sketch by another rotation, which kernels cannot make
        pages = random_pages([70, 9], head_dim=64, dtype=torch.bfloat16)
        digest = DIGESTS.get("sign_sketch")()
        state = digest.fit(torch.randn(1, 2, 20, 64).bfloat16(), None)[:1]
        place = 6 if name == "append_kv" else 1
        changed[place], changed[place + 1] = fresh_summary("sign_sketch", pages, state), state
    getattr(cuda, name)(*changed)
    assert launches.made == []


def test_a_gpu_without_clusters_takes_the_step_op_by_op(launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "gpu", lambda device: Gpu(108, (8, 0), 150_000))
    assert plans.step_plan(0, torch.bfloat16, 8, 128, 4, kernel_of("minmax"), 2048, 128) is None
    assert plans.attend_plan(0, torch.bfloat16, 8, 128, 4, 128).split.cluster == 1


def test_a_layer_without_digests_decodes_whole(launches: Launches) -> None:
    """What the fused step cannot serve goes op by op; without digests there is only everything to read."""
    step = list(arguments(4, 64)["sparse_decode"])
    step[6], width = [], step[3].shape[1]
    step[11] = width  # k
    expected = ops.for_backend("reference").sparse_decode(*step)
    for ours, theirs in zip(cuda.sparse_decode(*step), expected, strict=True):
        assert torch.equal(ours, theirs)
    assert launches.made == []


@pytest.mark.parametrize("op", [cuda.score_pages, reference.score_pages])
def test_pages_without_digests_cannot_be_scored(op: Any, launches: Launches) -> None:
    changed = list(arguments(4, 64)["score_pages"])
    changed[1] = []
    with pytest.raises(ConfigError, match="Pages without digests cannot be scored"):
        op(*changed)


@pytest.mark.parametrize(
    ("op", "inputs"),
    [
        (around.rotate_on_gpu, (torch.randn(2, 4, 1, 64), torch.randn(2, 2, 1, 64), *torch.randn(2, 1, 1, 64))),
        (around.rms_norm_on_gpu, (torch.randn(2, 3, 1024), torch.randn(1024), 1e-6)),
    ],
)
def test_arguments_of_what_lies_around(op: Any, inputs: tuple[Any, ...], launches: Launches) -> None:
    op(*(x.bfloat16() if isinstance(x, torch.Tensor) else x for x in inputs))
    assert launches.made == [op.__name__.removesuffix("_on_gpu")]
