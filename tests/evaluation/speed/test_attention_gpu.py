"""The GPU benchmark's own logic, run on the CPU with tiny layers: what it checks, counts, times and writes."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from sparsekv import SparseConfig
from sparsekv.cli import main
from sparsekv.errors import SparseKVError
from sparsekv.evaluation.speed import attention_gpu, attention_points
from sparsekv.evaluation.speed.attention_gpu import Bench, Machine, Options, sweep
from sparsekv.evaluation.speed.attention_inputs import Inputs
from sparsekv.evaluation.speed.attention_points import GEOMETRIES, Geometry, K, M, Point, grid, preset_points
from sparsekv.evaluation.speed.attention_step import Check, DecodeStep, same_pages
from sparsekv.evaluation.speed.competitors import COMPETITORS, Unavailable
from sparsekv.evaluation.speed.graph_timer import Spread, Timer, read_tb_per_s
from sparsekv.ops import reference

CPU = torch.device("cpu")
MACHINE = Machine(CPU, l2_bytes=4096, tb_per_s=0.01, measured_tb_per_s=0.011)


def point(context: int = 160, batch: int = 3, budget: int = 64, digest: str = "minmax", **changes: Any) -> Point:
    geometry = Geometry("tiny", **{"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, **changes})
    return Point(geometry, batch, context, SparseConfig(budget=budget, page_size=8, recent=16, digest=digest))


def check_of(where: Point) -> Check:
    return Check(DecodeStep(Inputs(where, 2, CPU)))


@pytest.mark.parametrize(
    ("batch", "context", "sparse_us", "dense_us"),
    [
        (1, 8 * K, 2.4, 7.6),
        (1, 32 * K, 3.8, 30.5),
        (1, M, 63.0, 977),
        (16, 128 * K, 152.7, 1955),
        (64, 32 * K, 244, 1955),
    ],
)
def test_floors_are_those_worked_out_for_an_h200(batch: int, context: int, sparse_us: float, dense_us: float) -> None:
    (where,) = grid([GEOMETRIES["llama-3.1-8b"]], [batch], [context], [2 * K])
    h200 = Machine(CPU, 60 << 20, 4.39, 4.39)
    assert h200.floor_us(where.sparse_bytes) == pytest.approx(sparse_us, rel=0.02)
    assert h200.floor_us(where.dense_bytes) == pytest.approx(dense_us, rel=0.02)


def test_a_context_within_the_budget_is_read_in_full() -> None:
    where = point(context=60)
    assert where.fits
    assert where.k == where.num_pages == 8
    assert where.sparse_bytes == where.dense_bytes
    assert not point(context=65).fits


def test_layers_reach_past_the_l2_cache_and_stay_within_memory() -> None:
    (where,) = grid([GEOMETRIES["llama-3.1-8b"]], [1], [128 * K], [2 * K])
    l2, much = 60 << 20, 140 << 30
    assert where.num_layers(l2, much) * where.sparse_bytes >= 4 * l2
    assert where.num_layers(l2, 3 << 30) < where.num_layers(l2, much)
    assert where.num_layers(l2, 0) == 2
    assert point().num_layers(l2, much) == 32


def test_presets_name_known_shapes_and_quests_own_times_belong_to_one_of_them() -> None:
    full = preset_points("full")
    assert len({str(p.describe()) for p in full}) == len(full)
    assert {p.geometry.name for p in full} == set(GEOMETRIES)
    quest = {p.context: p.quest_us for p in full if p.quest_us}
    assert quest == {32 * K: 64.9, 128 * K: 183.7}
    assert len(preset_points("quick")) == 3


@pytest.mark.parametrize("context", [160, 157])
def test_inputs_are_shuffled_pages_with_their_digests(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekv.evaluation.speed.attention_inputs.CHUNK_ELEMENTS", 2000)  # several pieces
    inputs = Inputs(point(context), 2, CPU)
    assert torch.equal(inputs.block_table.flatten().sort().values, torch.arange(60, dtype=torch.int32))
    first, second = inputs.layers
    assert not torch.equal(first.kv_pool, second.kv_pool)
    keys = first.kv_pool[:, 0]
    assert torch.equal(first.summary[0], torch.stack([keys.amin(2), keys.amax(2)], 2))
    keys, values = inputs.contiguous(1)
    assert keys.shape == values.shape == (3, 2, context, 16)
    page, offset = inputs.block_table[2, 9], 11 * 8 + 3
    assert torch.equal(values[2, :, 9 * 8 + 3], second.kv_pool[page, 1, :, 3])
    assert torch.equal(keys[0, :, offset], second.kv_pool[inputs.block_table[0, 11], 0, :, 3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("context", [160, 157, 153, 60, 1], ids=lambda n: f"{n} tokens")
@pytest.mark.parametrize("digest", ["minmax", "sign_sketch"])
def test_the_check_accepts_the_operators(digest: str, context: int, dtype: torch.dtype) -> None:
    with torch.inference_mode():
        check_of(point(context, digest=digest, dtype=dtype, sinks=context == 157)).all()


def wrong_output(step: Any) -> Any:
    return lambda i: (1.05 * step(i)[0], step(i)[1])


def other_pages(step: DecodeStep) -> Any:
    def sparse(i: int) -> tuple[Tensor, Tensor]:
        step.append(i)
        slots = step.select(-step.score(i))
        return step.attend(i, slots, None), slots

    return sparse


def no_append(step: DecodeStep) -> Any:
    def sparse(i: int) -> tuple[Tensor, Tensor]:
        slots = step.select(step.score(i))
        return step.attend(i, slots, None), slots

    return sparse


def stale_digest(step: DecodeStep) -> Any:
    def sparse(i: int) -> tuple[Tensor, Tensor | None]:
        (summary,) = step.inputs.layers[i].summary
        before = summary.clone()
        out = step.composed(i)
        summary.copy_(before)
        return out

    return sparse


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda step: wrong_output(step.sparse), "output of sparse is 5.0e-02 off"),
        (other_pages, "sparse step reads other pages"),
        (no_append, "sparse step did not store the new token"),
        (stale_digest, "Digests after the sparse step"),
    ],
)
def test_the_check_refuses_a_wrong_step(broken: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check = check_of(point())
    monkeypatch.setattr(check.step, "sparse", broken(check.step))
    with torch.inference_mode(), pytest.raises(SparseKVError, match=f"{message}.*no speed"):
        check.all()


def test_pages_may_differ_only_where_their_scores_nearly_tie() -> None:
    scores = torch.tensor([[[5.0, 3.0, 3.001, 2.0]]])
    best = torch.tensor([[[0, 2]]], dtype=torch.int32)
    assert same_pages(best, best, scores)
    assert same_pages(torch.tensor([[[0, 1]]]), best, scores)
    assert not same_pages(torch.tensor([[[0, 3]]]), best, scores)
    assert not same_pages(torch.tensor([[[1, 2]]]), best, scores)  # a page that had to be there is not
    assert not same_pages(torch.tensor([[[0, -1]]]), best, scores)
    assert not same_pages(torch.tensor([[[0, 0]]]), best, scores)


class FakeDecode:
    """FlashInfer's paged decode by the reference: pages listed one request after the other, HND."""

    def __init__(self, workspace: Tensor, layout: str, use_tensor_cores: bool = False) -> None:
        assert layout == "HND"

    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, hq: int, hkv: int, d: int, p: int, **kw: Any
    ):
        self.indptr, self.indices, self.scaling, self.heads = indptr, indices, kw["sm_scale"], hkv
        self.lengths = (indptr[1:] - indptr[:-1] - 1) * p + last_page_len

    def run(self, query: Tensor, cache: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        keys, values = cache if isinstance(cache, tuple) else (cache[:, 0], cache[:, 1])
        assert keys.shape[1] == self.heads
        table = self.indices.view(len(self.lengths), -1)
        return reference.attend_pages(
            query, torch.stack([keys, values], 1), table, self.lengths.int(), None, self.scaling
        )[0]


class Doubled:
    def __init__(self, competitor: Any) -> None:
        self.competitor, self.slots = competitor, competitor.slots

    def __call__(self, layer: int) -> Tensor:
        return 2 * self.competitor(layer)


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=FakeDecode))


@pytest.mark.usefixtures("flashinfer")
@pytest.mark.parametrize("name", list(COMPETITORS))
@pytest.mark.parametrize("batch", [1, 3])
def test_competitors_do_the_same_work(name: str, batch: int) -> None:
    check = check_of(point(batch=batch, sinks=True))
    with torch.inference_mode():
        competitor = COMPETITORS[name](check.inputs)
        check.competitor(name, competitor)
        with pytest.raises(SparseKVError, match=f"output of {name}"):
            check.competitor(name, Doubled(competitor))


@pytest.mark.usefixtures("flashinfer")
def test_the_shelf_takes_no_part_where_it_cannot() -> None:
    with pytest.raises(Unavailable, match="nothing to choose"):
        COMPETITORS["shelf"](Inputs(point(60), 2, CPU))
    with pytest.raises(Unavailable, match="partly filled"):
        COMPETITORS["shelf"](Inputs(point(157), 2, CPU))
    COMPETITORS["flashinfer"](Inputs(point(157), 2, CPU))


def run_sweep(points: list[Point], tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    with torch.inference_mode():
        return sweep(points, MACHINE, Options(3, out=str(tmp_path), **options), "the command", Console(quiet=True))


def test_a_sweep_times_everything_and_goes_on_without_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # as if it were not installed
    rows = run_sweep([point(), point(60)], tmp_path)
    assert rows[0]["flashinfer_us"] is None
    assert "not installed" in rows[0]["flashinfer_note"]
    for name in ("sparse", "composed", "append", "score", "select", "attend", "dense", "sdpa"):
        assert rows[0][f"{name}_us"] > 0
        assert rows[0][f"{name}_iqr_us"] >= 0
    assert rows[0]["speedup"] == pytest.approx(rows[0]["sdpa_us"] / rows[0]["sparse_us"])
    assert rows[0]["of_floor"] == pytest.approx(rows[0]["floor_us"] / rows[0]["sparse_us"])
    assert rows[1]["fits"]
    assert "score_us" not in rows[1]
    result = json.loads((tmp_path / "attention_cuda.json").read_text())
    assert result["rows"] == rows
    assert result["settings"]["num_points"] == 2


def test_a_point_without_memory_says_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = attention_gpu.Inputs

    def inputs(where: Point, *rest: Any) -> Inputs:
        if where.context == 320:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(where, *rest)

    monkeypatch.setattr(attention_gpu, "Inputs", inputs)
    rows = run_sweep([point(320), point()], tmp_path, against=["sdpa"])
    assert rows[0]["error"] == "out of memory"
    assert rows[1]["sdpa_us"] > 0


def test_check_only_times_and_writes_nothing(tmp_path: Path) -> None:
    (row,) = run_sweep([point()], tmp_path, against=["sdpa"], check_only=True)
    assert not [key for key in row if key.endswith("_us")]
    assert not list(tmp_path.iterdir())


def test_attention_alone_visits_other_pages_at_every_turn() -> None:
    bench = Bench(point(batch=1, context=512), Machine(CPU, 1 << 16, 1.0, 1.0), Timer(CPU, 2))
    bench.num_layers = 2
    seen = []
    bench.step.attend = lambda layer, slots, sinks: seen.append((layer, tuple(slots[0, 0].tolist())))  # type: ignore
    attend = bench._attend([bench.step.score(i) for i in range(2)])
    for i in range(2 * bench._turns):
        attend(i)
    assert bench._turns == 8
    assert len(set(seen)) == 16
    assert all(pages == tuple(sorted(set(pages))) for _, pages in seen)


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert read_tb_per_s(CPU, Timer(CPU, 3), 1 << 20) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--preset", "full"], "--preset=full is for --device cuda"),
        (["--device", "cpu", "--budget", "512", "1024"], "several budgets"),
        (["--device", "cuda", "--head-dim", "128"], "--head-dim=128 is for --device cpu"),
        (["--device", "cuda", "--quick", "--contexts", "1k"], "set by --preset quick"),
        (["--device", "cuda", "--geometry", "llama"], "Did you mean 'llama-3.1-8b'"),
        (["--device", "cuda", "--budget", "16"], "budget=16 is below"),
        (["--device", "cuda", "--digest", "sign_sketsh"], "Did you mean 'sign_sketch'"),
        (["--device", "cuda", "--bandwidth", "0"], "more than 0 TB/s"),
    ],
)
def test_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", *options]) == (2 if "Did you mean" in message else 1)
    assert message in capsys.readouterr().err


def test_the_whole_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the CPU, told that it is a GPU."""
    monkeypatch.setattr(attention_gpu.Machine, "of", lambda device, options: MACHINE)
    monkeypatch.setitem(attention_points.GEOMETRIES, "mha", Geometry("mha", 2, 2, 16, torch.float16))
    where = SimpleNamespace(type="cuda", index=None)
    monkeypatch.setattr("sparsekv.evaluation.speed.command.choose_device", lambda name: where)
    command = ["bench", "--geometry", "mha", "--contexts", "8k", "4000", "--batches", "1", "2", "--repeats", "2"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Quest's own kernels, measured separately (speed/attention_points.py): 35.4 us (mha 1 x 8k)" in printed
    assert "shelf: flashinfer is not installed" in printed or "flashinfer" in sys.modules
    assert len(json.loads((tmp_path / "attention_cuda.json").read_text())["rows"]) == 4
    assert (tmp_path / "attention_cuda.png").stat().st_size > 5_000


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path: Path) -> None:
    command = ["bench", "--device", "cuda", "--contexts", "1k", "4k", "--geometry", "llama-3.1-8b", "gpt-oss"]
    assert main([*command, "--against", "sdpa", "--repeats", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention_cuda.json").read_text())["rows"]
    assert [row["fits"] for row in rows] == [True, False] * 2
    assert all(row["sparse_us"] > 0 and row["sdpa_us"] > 0 for row in rows)
