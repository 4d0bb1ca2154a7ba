"""How a layer's step is timed, run on the CPU with tiny layers: what is checked, counted, timed and written."""

import json
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from sparsekv import DecodeStep, SparseConfig
from sparsekv.cli import main
from sparsekv.errors import ConfigError, SparseKVError
from sparsekv.evaluation import speed
from sparsekv.evaluation.speed import attention_bench
from sparsekv.evaluation.speed.attention_bench import LayerBench, Machine, Options
from sparsekv.evaluation.speed.attention_check import Check, same_pages
from sparsekv.evaluation.speed.attention_inputs import Inputs
from sparsekv.evaluation.speed.attention_points import K, LayerPoint, M, grid, preset_points
from sparsekv.evaluation.speed.competitors import COMPETITORS, Unavailable
from sparsekv.evaluation.speed.geometry import GEOMETRIES, Geometry, named
from sparsekv.evaluation.speed.graph_timer import Spread, Timer, read_tb_per_s
from sparsekv.evaluation.speed.planted_keys import check_read
from sparsekv.ops import reference
from sparsekv.policies import POLICIES, Policy, register
from sparsekv.policies.top_k import TopK

CPU = torch.device("cpu")
MACHINE = Machine(CPU, l2_bytes=4096, tb_per_s=0.01, measured_tb_per_s=0.011)
Decoded = tuple[Tensor, Tensor]


def point(context: int = 160, batch: int = 3, budget: int = 64, **changes: Any) -> LayerPoint:
    names = ("digest", "policy", "group_pooling", "min_share", "kv")
    settings = {name: changes.pop(name) for name in names if name in changes}
    read = changes.pop("read", None)
    geometry = Geometry("tiny", **{"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, **changes})
    return LayerPoint(geometry, batch, context, SparseConfig(budget=budget, page_size=8, recent=16, **settings), read)


def check_of(where: LayerPoint) -> Check:
    return Check(Inputs(where, 2, CPU), POLICIES.get(where.config.policy)())


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
    (where,) = grid([named("llama-3.1-8b")], [batch], [context], [SparseConfig(budget=2 * K, digest="minmax")])
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
    (where,) = grid([named("llama-3.1-8b")], [1], [128 * K], [SparseConfig(budget=2 * K)])
    l2, much = 60 << 20, 140 << 30
    assert where.num_layers(l2, much) * where.sparse_bytes >= 4 * l2
    assert where.num_layers(l2, 3 << 30) < where.num_layers(l2, much)
    assert where.num_layers(l2, 0) == 2
    assert point().num_layers(l2, much) == 32


def test_presets_name_known_shapes_and_quests_own_times_belong_to_one_of_them() -> None:
    full = preset_points("full", [SparseConfig(digest="minmax")])
    assert len({str(p.describe()) for p in full}) == len(full)
    assert {p.geometry.name for p in full} == {*GEOMETRIES, "llama-3.1-8b", "qwen3-32b"}
    quest = {p.context: p.quest_us for p in full if p.quest_us}
    assert quest == {32 * K: 64.9, 128 * K: 183.7}
    assert len(preset_points("quick")) == 3
    pair = [SparseConfig(budget=512), SparseConfig(budget=4096)]
    assert [p.config for p in preset_points("bars", pair)[:4]] == 2 * pair


@pytest.mark.parametrize("context", [160, 157])
def test_inputs_are_shuffled_pages_with_their_digests(context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekv.evaluation.speed.attention_inputs.CHUNK_ELEMENTS", 2000)  # several pieces
    inputs = Inputs(point(context, digest="minmax"), 2, CPU)
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
        listed = check_of(point(context, digest=digest, dtype=dtype, sinks=context == 157)).all()
    assert listed == min(8, -(-context // 8))


@pytest.mark.parametrize(("policy", "listed"), [("all", 20), ("oracle", 8), ("random", 8), ("recent", 8)])
def test_the_check_accepts_every_policy(policy: str, listed: int) -> None:
    with torch.inference_mode():
        assert check_of(point(policy=policy)).all() == listed


@pytest.mark.parametrize("policy", ["top_k", "oracle", "all"])
def test_the_check_accepts_pages_in_fewer_bits(policy: str) -> None:
    where = point(policy=policy, kv=("int8", "int4"), head_dim=32)
    assert where.dense_bytes == 3 * 2 * 160 * (32 + 4 + 16 + 2)  # of codes and their factors
    assert where.describe()["kv"] == "int8-int4"
    with torch.inference_mode():
        check_of(where).all()
        check_of(replace(where, context=157)).all()


@pytest.mark.parametrize(("context", "read", "budget"), [(1600, 80, 256), (1595, 160, 160), (2400, 500, 1024)])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_lists_the_pages_that_keys_are_planted_in(
    context: int, read: int, budget: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And beside them those that it always reads: of every sequence and head as many, wherever the query looks."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 100)
    where = point(context, batch, budget, digest="sketch2", group_pooling="share", min_share=0.003, read=read)
    where = replace(where, geometry=replace(where.geometry, head_dim=64))
    check_read(where)
    check = check_of(where)
    with torch.inference_mode():
        assert check.all() == where.k == -(-read // 8)
        slots = check.policy.select(check.step)
    assert slots is not None
    assert bool(((slots >= 0).sum(-1) == where.k).all())
    assert where.attend_bytes <= replace(where, read=None).attend_bytes


def test_nothing_is_planted_where_everything_is_read() -> None:
    assert point(60, group_pooling="share", min_share=0.003, read=40).k == 8


@pytest.mark.parametrize("budget", [64, 160])
def test_the_check_accepts_a_least_share(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 100)
    with torch.inference_mode():
        listed = check_of(point(budget=budget, group_pooling="share", min_share=0.1)).all()
    assert 3 <= listed < budget // 8


def wrong_output(step: DecodeStep) -> Decoded:
    out, slots = step.attend_best()
    return 1.05 * out, slots


def other_pages(step: DecodeStep) -> Decoded:
    step.append()
    slots = step.select(-step.digest_scores())
    return step.attend(slots), slots


def no_append(step: DecodeStep) -> Decoded:
    slots = step.select(step.digest_scores())
    return step.attend(slots), slots


def stale_digest(step: DecodeStep) -> Decoded:
    before = step.summary[0].clone()
    out = step.attend_best()
    step.summary[0].copy_(before)
    return out


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (wrong_output, r"output of sparse is 5.\de-02 off"),
        (other_pages, "sparse step reads other pages"),
        (no_append, "sparse step did not store the new token"),
        (stale_digest, "Digests after the sparse step"),
    ],
)
def test_the_check_refuses_a_wrong_step(broken: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TopK, "decode", lambda policy, step, softcap, sinks: broken(step))
    with torch.inference_mode(), pytest.raises(SparseKVError, match=f"{message}.*no speed"):
        check_of(point()).all()


def test_pages_may_differ_only_where_their_scores_nearly_tie() -> None:
    scores = torch.tensor([[[5.0, 3.0, 3.001, 2.0]]])
    best = torch.tensor([[[0, 2]]], dtype=torch.int32)
    assert same_pages(best, best, scores)
    assert same_pages(torch.tensor([[[0, 1]]]), best, scores)
    assert not same_pages(torch.tensor([[[0, 3]]]), best, scores)
    assert not same_pages(torch.tensor([[[1, 2]]]), best, scores)  # a page that had to be there is not
    assert not same_pages(torch.tensor([[[0, -1]]]), best, scores)
    assert not same_pages(torch.tensor([[[0, 0]]]), best, scores)
    one = torch.tensor([[[0, -1]]])  # ... or with the least score, which one of them may have left out
    assert same_pages(one, best, scores, min_score=3.002)
    assert not same_pages(one, best, scores, min_score=2.0)


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
    check = check_of(point(batch=batch, sinks=True, digest="minmax"))
    with torch.inference_mode():
        competitor = COMPETITORS[name](check.inputs)
        check.competitor(name, competitor)
        with pytest.raises(SparseKVError, match=f"output of {name}"):
            check.competitor(name, Doubled(competitor))


@pytest.mark.usefixtures("flashinfer")
def test_the_shelf_takes_no_part_where_it_cannot() -> None:
    with pytest.raises(Unavailable, match="nothing to choose"):
        COMPETITORS["shelf"](Inputs(point(60, digest="minmax"), 2, CPU))
    with pytest.raises(Unavailable, match="partly filled"):
        COMPETITORS["shelf"](Inputs(point(157, digest="minmax"), 2, CPU))
    COMPETITORS["flashinfer"](Inputs(point(157), 2, CPU))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Machine, "of", lambda device, options: MACHINE)


def rows_of(points: list[LayerPoint], tmp_path: Path, **options: Any) -> list[dict[str, Any]]:
    found = attention_bench.run(points, Options(3, out=str(tmp_path), **options), CPU, "the command")
    return list(found["rows"])


@pytest.mark.usefixtures("machine")
def test_what_is_missing_stops_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # as if it were not installed
    rows = rows_of([point(), point(60)], tmp_path)
    assert rows[0]["flashinfer_us"] is None
    assert "not installed" in rows[0]["flashinfer_note"]
    for name in ("sparse", "composed", "append", "score", "select", "attend", "dense", "sdpa"):
        assert rows[0][f"{name}_us"] > 0
        assert rows[0][f"{name}_iqr_us"] >= 0
    assert rows[0]["speedup"] == pytest.approx(rows[0]["sdpa_us"] / rows[0]["sparse_us"])
    assert rows[0]["of_floor"] == pytest.approx(rows[0]["floor_us"] / rows[0]["sparse_us"])
    assert rows[1]["fits"]
    assert "score_us" not in rows[1]
    result = json.loads((tmp_path / "attention_cpu.json").read_text())
    assert result["rows"] == rows
    assert result["settings"]["num_points"] == 2


@pytest.fixture
def first_pages() -> Iterator[str]:
    """A policy of one's own, which lists fewer pages than it may, without scores."""

    @register("first_pages")
    class FirstPages(Policy):
        def select(self, step: DecodeStep) -> Tensor:
            slots = torch.full((len(step.query), step.kv_pool.shape[2], step.k), -1, dtype=torch.int32)
            slots[..., :3] = torch.arange(3)
            return slots

    yield "first_pages"
    POLICIES.remove("first_pages")


@pytest.mark.usefixtures("machine")
def test_any_policy_can_be_timed(first_pages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of its parts those that it has; what it reads is what it listed."""
    sizes = ["--device", "cpu", "--contexts", "512", "--budget", "256", "--repeats", "2", "--out", str(tmp_path)]
    parts = {first_pages: {"append", "attend"}, "all": {"append"}, "recent": {"append", "select", "attend"}}
    for policy, expected in parts.items():
        assert main(["bench", "attention", "--policy", policy, *sizes]) == 0
        (row,) = json.loads((tmp_path / f"attention_cpu_{policy}.json").read_text())["rows"]
        assert {part for part in ("append", "score", "select", "attend") if f"{part}_us" in row} == expected
        assert row["policy"] == policy
        assert row["share"] == {"all": 1, "recent": 0.5, first_pages: 3 / 32}[policy]
        assert min(row["sparse_us"], row["dense_us"], row["sdpa_us"]) > 0
        assert "composed_us" not in row
    assert "512" in capsys.readouterr().out


@pytest.mark.usefixtures("machine")
def test_a_point_without_memory_says_so_and_the_others_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make = attention_bench.Inputs

    def inputs(where: LayerPoint, *rest: Any) -> Inputs:
        if where.context == 320:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(where, *rest)

    monkeypatch.setattr(attention_bench, "Inputs", inputs)
    rows = rows_of([point(320), point()], tmp_path, against=["sdpa"])
    assert rows[0]["error"] == "out of memory"
    assert rows[1]["sdpa_us"] > 0


@pytest.mark.usefixtures("machine")
def test_check_only_times_and_writes_nothing(tmp_path: Path) -> None:
    (row,) = rows_of([point()], tmp_path, against=["sdpa"], check_only=True)
    assert not [key for key in row if key.endswith("_us")]
    assert not list(tmp_path.iterdir())


def test_attention_alone_visits_other_pages_at_every_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = LayerBench(point(batch=1, context=512), Machine(CPU, 1 << 16, 1.0, 1.0), Timer(CPU, 2))
    bench.num_layers = 2
    seen = []
    monkeypatch.setattr(DecodeStep, "attend", lambda step, slots, *rest: seen.append((step.layer_idx, slots[0, 0])))
    slots = torch.arange(8, dtype=torch.int32).expand(1, 2, 8).clone()
    slots[..., 7] = -1
    attend = bench._attend([slots, slots])
    for i in range(2 * bench._turns):
        attend(i)
    assert bench._turns == 8
    assert len({(layer, tuple(pages.tolist())) for layer, pages in seen}) == 16
    for _, pages in seen:
        assert pages[7] == -1
        assert pages[:7].tolist() == sorted(set(pages[:7].tolist()))


def test_a_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)
    assert read_tb_per_s(CPU, Timer(CPU, 3), 1 << 20) > 0


SHARE = ["--device", "cpu", "--group-pooling", "share", "--min-share", "0.001"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu", "--preset", "full"], "--preset=full is for --device cuda"),
        (["--device", "cuda", "--quick", "--contexts", "1k"], "set by --preset quick"),
        (["--device", "cuda", "--quick", "--head-dim", "128"], "set by --preset quick"),
        (["--geometry", "gemma", "--head-dim", "128"], "--head-dim=128 is told by --model or --geometry"),
        (["--q-heads", "6", "--kv-heads", "4"], "--q-heads=6 must be a multiple of --kv-heads=4"),
        (["--geometry", "llama"], "Did you mean 'llama-3.1-8b'"),
        (["--budget", "16"], "budget=16 is below"),
        (["--digest", "sign_sketsh"], "Did you mean 'sign_sketch'"),
        (["--policy", "topk"], "Did you mean 'top_k'"),
        (["--bandwidth", "0"], "more than 0 TB/s"),
        (["--read", "1k"], "--read=1024 is for --min-share: without one a step reads its budget"),
        ([*SHARE, "--read", "2k"], "--read=2048 is not possible at a context of 4,096: at least 144 tokens"),
        ([*SHARE, "--read", "128"], "at most 1024 (the budget"),
        (["--min-share", "0.1"], "set group_pooling='share'"),
    ],
)
def test_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert main(["bench", *options]) == (2 if "Did you mean" in message else 1)
    assert message in capsys.readouterr().err


@pytest.mark.usefixtures("machine")
def test_the_whole_command_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Several geometries, batches and budgets, and a context that Quest's own kernels were measured at."""
    monkeypatch.setitem(GEOMETRIES, "mha", Geometry("mha", 2, 2, 16))
    command = ["bench", "--device", "cpu", "--geometry", "mha", "--contexts", "8k", "4000", "--batches", "1", "2"]
    command += ["--digest", "minmax", "--budget", "2k", "--repeats", "2", "--against", "sdpa", "shelf"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Quest's own kernels, measured separately (speed/attention_points.py): 35.4 us (mha 1 x 8k)" in printed
    assert "shelf: flashinfer is not installed" in printed or "flashinfer" in sys.modules
    result = json.loads((tmp_path / "attention_cpu_minmax.json").read_text())
    assert [(row["batch"], row["context"]) for row in result["rows"]] == [(1, 8192), (1, 4000), (2, 8192), (2, 4000)]
    assert {row["dtype"] for row in result["rows"]} == {"float32"}
    assert (tmp_path / "attention_cpu_minmax.png").stat().st_size > 5_000


def test_a_measurement_from_python_is_what_json_prints(capsys: pytest.CaptureFixture[str]) -> None:
    found = speed.measure("attention --device cpu --contexts 1k 2k --budget 256 --repeats 1")
    assert [row["context"] for row in found["rows"]] == [1024, 2048]
    assert found["rows"][0] | {"batch": 1, "budget": 256} == found["rows"][0]
    assert found["command"].startswith("sparsekv bench attention --device cpu")
    assert "1 x 2k" in capsys.readouterr().out


def test_a_file_of_settings_has_a_layer_for_each_of_its_budgets(tmp_path: Path) -> None:
    path, sizes = tmp_path / "settings.json", "--device cpu --contexts 1k --repeats 1 --check-only"
    SparseConfig(budget={3: 512, 4: 0.5, "rest": 256}, page_size=32, policy="recent").save(path)
    rows = speed.measure(f"attention --settings {path} {sizes}")["rows"]
    assert [(row["budget"], row["page_size"], row["policy"]) for row in rows] == [
        (budget, 32, "recent") for budget in (512, 0.5, 256)
    ]
    (row,) = speed.measure(f"attention --settings {path} --budget 128 --policy top_k {sizes}")["rows"]
    assert (row["budget"], row["page_size"], row["policy"]) == (128, 32, "top_k")


@pytest.mark.usefixtures("machine")
def test_files_of_settings_are_timed_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those with a least share over keys of which pages hold it; the others over random ones."""
    names = [str(tmp_path / name) for name in ("one.json", "other.json")]
    SparseConfig(budget=256, digest="minmax").save(names[0])
    SparseConfig(budget=512, digest="sketch2", group_pooling="share", min_share=0.001).save(names[1])
    command = f"attention --settings {shlex.join(names)} --device cpu --contexts 4k 256 --repeats 1 --read 320"
    rows = speed.measure(f"{command} --out {tmp_path}")["rows"]
    told = [[row[name] for name in ("context", "digest", "planted", "tokens_read", "fits")] for row in rows]
    assert told == [
        [4096, "minmax", None, 256, False],
        [4096, "sketch2", 320, 320, False],
        [256, "minmax", None, 256, True],
        [256, "sketch2", None, 256, True],
    ]
    assert rows[1]["floor_us"] < rows[1]["dense_floor_us"] / 4
    assert json.loads((tmp_path / "attention_cpu_minmax_sketch2.json").read_text())["rows"] == rows
    assert "sketch2     320" in capsys.readouterr().out


def test_an_option_that_is_not_allowed_is_an_error_in_python_too() -> None:
    with pytest.raises(ConfigError, match="--preset=quick is for --device cuda"):
        speed.measure("attention --device cpu --preset quick")


def test_a_models_layers_are_read_from_its_config(tmp_path: Path) -> None:
    LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2).save_pretrained(tmp_path)
    found = Geometry.of(str(tmp_path))
    assert (found.num_q_heads, found.num_kv_heads, found.head_dim, found.group) == (8, 2, 64, 4)
    assert replace(named("gpt-oss-20b"), name="gpt-oss") == GEOMETRIES["gpt-oss"]  # sink logits and all
    with pytest.raises(ConfigError, match="deepseek-v2-lite: its config does not tell the keys and values"):
        named("deepseek-v2-lite")


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--model .*nothing.*--geometry \(llama-3.1-8b"):
        Geometry.of(str(tmp_path / "nothing"))


@pytest.mark.gpu
def test_bench_on_a_gpu(tmp_path: Path) -> None:
    command = ["bench", "--device", "cuda", "--contexts", "1k", "4k", "--geometry", "llama-3.1-8b", "gpt-oss"]
    assert main([*command, "--against", "sdpa", "--repeats", "3", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "attention_cuda.json").read_text())["rows"]
    assert [row["fits"] for row in rows] == [True, False] * 2
    assert all(row["sparse_us"] > 0 and row["sdpa_us"] > 0 for row in rows)
