"""The accuracy harness on the testbed: what it measures, goes on with, shares out and refuses."""

import copy
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers.processors import TemplateProcessing

from sparsekv import PagedCache, Patch
from sparsekv.cli import main
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy import command as eval_command
from sparsekv.evaluation.accuracy import session
from sparsekv.evaluation.accuracy.methods import METHODS, method, pairs
from sparsekv.evaluation.accuracy.options import RunOptions
from sparsekv.evaluation.accuracy.results import Key, read_lines
from sparsekv.evaluation.accuracy.runner import Runner
from sparsekv.evaluation.accuracy.summary import Run
from sparsekv.evaluation.accuracy.tables import csv_text, markdown
from sparsekv.evaluation.accuracy.workload import Share
from sparsekv.evaluation.tasks import perplexity
from sparsekv.policies.top_k import TopK

SMALL: dict[str, Any] = {"tasks": ("multi_key",), "lengths": (1024,), "budgets": (128,), "num_examples": 1}


@pytest.fixture(scope="module")
def loaded() -> Any:
    return testbed.load()


@pytest.fixture(autouse=True)
def short_quizzes(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 tokens are more than has to be decoded to see how they are scored."""
    monkeypatch.setattr(perplexity, "SCORED_TOKENS", 24)


def runner_of(loaded: Any, folder: Path, share: Share | None = None, **settings: Any) -> Runner:
    return Runner(*loaded, "testbed", RunOptions(**SMALL | settings), folder, "a command", share or Share())


def run(loaded: Any, folder: Path, share: Share | None = None, **settings: Any) -> list[dict[str, Any]]:
    runner_of(loaded, folder, share, **settings).run(Console(quiet=True))
    return list(read_lines(folder, "results*.jsonl"))


def mean(lines: list[dict[str, Any]]) -> dict[str, float]:
    scores = defaultdict(list)
    for line in lines:
        scores[line["method"]].append(line["score"])
    return {name: sum(found) / len(found) for name, found in scores.items()}


def test_methods_differ_in_what_they_read(loaded: Any, tmp_path: Path) -> None:
    """A method that drops the needle's page fails; the counters say who read what."""
    lines = run(loaded, tmp_path, methods=tuple(METHODS), num_examples=8)
    assert all(line["error"] is None for line in lines)
    scores = mean(lines)
    assert scores["dense"] == scores["oracle"] == scores["sketch"] == 1
    assert scores["quest"] >= 0.75
    assert scores["recent"] <= 0.5 >= scores["random"]
    by_method = {line["method"]: line for line in lines}
    assert by_method["dense"]["bytes_per_token"] == by_method["dense"]["dense_bytes_per_token"]
    assert by_method["recent"]["bytes_per_token"] < by_method["quest"]["bytes_per_token"]
    assert by_method["quest"]["bytes_per_token"] < by_method["oracle"]["bytes_per_token"]
    assert by_method["dense"]["sparse_steps"] == 0 < by_method["quest"]["sparse_steps"]
    assert (by_method["dense"]["tokens_read"], by_method["quest"]["tokens_read"]) == (None, 128)
    probes = list(read_lines(tmp_path, "probes*.jsonl"))
    assert {line["method"] for line in probes} == set(METHODS) - {"dense"}
    assert all(0 <= share <= 1.001 for line in probes for share in (*line["mass"], *line["overlap"]))


def test_a_killed_run_goes_on(loaded: Any, tmp_path: Path) -> None:
    """What is there is not measured again, and what comes is what would have come."""
    settings = {"num_examples": 3, "probe": False}
    whole = run(loaded, tmp_path / "whole", methods=("dense", "quest"), **settings)
    run(loaded, tmp_path / "cut", methods=("dense",), **settings)
    path = tmp_path / "cut" / "results.jsonl"
    path.write_text(path.read_text()[:-20])  # killed while it wrote
    again = run(loaded, tmp_path / "cut", methods=("dense", "quest"), **settings)
    assert len(again) == 6
    key = ("method", "document", "question")
    found = {tuple(line[k] for k in key): line["said"] for line in again}
    assert found == {tuple(line[k] for k in key): line["said"] for line in whole}
    before = path.read_bytes()
    run(loaded, tmp_path / "cut", methods=("dense", "quest"), **settings)
    assert path.read_bytes() == before


def test_processes_share_the_documents(loaded: Any, tmp_path: Path) -> None:
    settings = {"tasks": ("passkey",), "num_examples": 2, "methods": ("quest",)}
    alone = run(loaded, tmp_path / "alone", **settings)
    run(loaded, tmp_path / "shared", Share(0, 2), **settings)
    together = run(loaded, tmp_path / "shared", Share(1, 2), **settings)
    assert {path.name for path in (tmp_path / "shared").glob("results*")} == {
        "results-00000.jsonl",
        "results-00001.jsonl",
    }

    def answers(lines: list[dict[str, Any]]) -> list[Any]:
        return sorted((line["document"], line["question"], line["said"], line["score"]) for line in lines)

    assert answers(alone) == answers(together)


@pytest.mark.wide
def test_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="needs the eval extra: pip install '.[eval]' in the clone")
    # --multi_gpu is torchrun, and needs no GPU; --cpu would be one process
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["-m", "sparsekv.cli", "eval", "run", "--out", str(tmp_path), "--tasks", "passkey", "--lengths", "512"]
    launch += ["--budgets", "128", "--examples", "2", "--methods", "quest"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = list(read_lines(tmp_path, "results*.jsonl"))
    assert len(lines) == 2
    assert {line["document"] for line in read_lines(tmp_path, "results-00001.jsonl")} == {1}


def read_all(self: TopK, step: Any, softcap: float, sinks: Any) -> Any:
    step.append()
    return step.attend(None, softcap, sinks), None


@pytest.mark.parametrize("sparse_layers", [set(), {5}], ids=["no layer", "one layer"])
def test_layers_that_read_everything_are_an_error_and_named(
    sparse_layers: set[int], loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if another layer chooses its pages. Such a line has no score: dense is never compared with dense."""
    choose = TopK.decode
    monkeypatch.setattr(
        TopK, "decode", lambda self, step, *rest: (choose if step.layer_idx in sparse_layers else read_all)(
            self, step, *rest
        ),
    )  # fmt: skip
    (line,) = run(loaded, tmp_path, methods=("quest",), dense_layers=2, probe=False)
    lost = ", ".join(str(i) for i in range(2, 6) if i not in sparse_layers)
    assert line["score"] is None
    assert "steps were dense" in line["error"]
    assert line["error"].endswith(f"although the document exceeds the budget, in layers {lost}")


def test_a_short_document_in_a_batch_excuses_nothing(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pages are chosen for the whole batch if its longest document exceeds the budget."""
    monkeypatch.setattr(TopK, "decode", read_all)
    rows = []
    for size in (100, 600):
        story = testbed.make_story(size, tasks=("needle",), num_questions=1, seed=size)
        asked = story.questions[0]
        rows.append({"context": story.text, "question": asked.prompt, "answer": [asked.answer]})
    data = jsonl(tmp_path / "rows.jsonl", *rows)
    lines = run(loaded, tmp_path / "run", tasks=(f"ruler:{data}",), methods=("quest",), num_examples=2, probe=False)
    assert len(lines) == 2
    assert all("were dense, although" in line["error"] for line in lines)


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_layers_that_turned_dense_are_in_the_manifest_and_the_report(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_cache = Patch.new_cache

    def with_odd_layer(self: Patch, reserve_tokens: int = 0) -> PagedCache:
        cache = new_cache(self, reserve_tokens)
        cache.layers[3].refuse("its head sizes differ")
        return cache

    monkeypatch.setattr(Patch, "new_cache", with_odd_layer)
    lines = run(loaded, tmp_path, methods=("quest",), dense_layers=2, probe=False)
    assert lines[0]["error"] is None
    found = json.loads((tmp_path / "manifest.json").read_text())["layers_not_sparse"]
    assert [(some["layers"], some["is_asked_for"]) for some in found] == [([0, 1], True), ([3], False)]
    (note,) = Run.read(tmp_path).notes
    assert note == "Layers that choose no pages, and whose reads are not counted: 3 (its head sizes differ)."


def test_logits_that_are_not_finite_are_an_error(loaded: Any, tmp_path: Path) -> None:
    """And are measured again."""
    settings = {"tasks": ("perplexity", "multi_key"), "methods": ("dense", "quest"), "probe": False}
    hook = loaded[0].lm_head.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    try:
        lines = run(loaded, tmp_path, **settings)
    finally:
        hook.remove()
    assert len(lines) == 4
    assert all("not finite" in line["error"] and line["score"] is line["nll"] is None for line in lines)
    assert len(run(loaded, tmp_path, **settings)) == 8
    assert not Run.read(tmp_path).errors


def test_a_run_may_grow_by_questions_of_the_same_documents(loaded: Any, tmp_path: Path) -> None:
    """However many are asked; each once."""
    settings = {"tasks": ("needle",), "probe": False}
    run(loaded, tmp_path, methods=("dense",), num_examples=2, **settings)
    run(loaded, tmp_path, methods=("quest",), num_examples=3, **settings)
    lines = run(loaded, tmp_path, methods=("dense", "quest"), num_examples=3, **settings)
    assert len(lines) == 6 == len({Key.of(line) for line in lines})
    asked = {
        name: sorted((x["question"], x["expected"], x["details"]["depth"]) for x in lines if x["method"] == name)
        for name in ("dense", "quest")
    }
    assert asked["dense"] == asked["quest"]
    assert not Run.read(tmp_path).errors
    assert len(run(loaded, tmp_path, methods=("dense", "quest"), num_examples=2, **settings)) == 6


def test_answers_about_other_documents_are_not_gone_on_with(loaded: Any, tmp_path: Path) -> None:
    (line, *_) = run(loaded, tmp_path, methods=("dense",), probe=False)
    jsonl(tmp_path / "results.jsonl", {**line, "expected": [["1 2 3 4 5"]]})
    with pytest.raises(ConfigError, match=r"question 0 about document 0 of multi_key.*documents were written otherw"):
        run(loaded, tmp_path, methods=("dense", "quest"), probe=False)


def test_runs_of_different_seeds_share_no_document(loaded: Any, tmp_path: Path) -> None:
    texts = []
    for seed in (0, 1):
        runner = runner_of(loaded, tmp_path / str(seed), num_examples=40, seed=seed)
        numbers = runner.work.documents("multi_key")
        texts.append({runner.document("multi_key", 1024, number).text for number in numbers})
    assert len(texts[0]) == len(texts[1]) == 5
    assert not texts[0] & texts[1]


def test_every_process_refuses_a_folder_of_another_run(loaded: Any, tmp_path: Path) -> None:
    run(loaded, tmp_path, Share(0, 2), methods=("dense",), probe=False)
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="of another run"):
        run(loaded, tmp_path, Share(1, 2), methods=("quest",), seed=7)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_file_whose_content_has_changed_is_another_run(loaded: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(testbed.make_story(2048, seed=1).text)
    settings = {"tasks": (f"perplexity:{path}",), "probe": False}
    run(loaded, tmp_path / "run", methods=("dense",), **settings)
    path.write_text(testbed.make_story(2048, seed=2).text)
    with pytest.raises(ConfigError, match=r"of another run \(the content of perplexity:.*text\.txt was"):
        run(loaded, tmp_path / "run", methods=("quest",), **settings)


def test_a_document_begins_as_the_tokenizer_begins_one(loaded: Any, tmp_path: Path) -> None:
    """With a BOS token, which counts in the length; what it would put behind is left out."""
    model, plain = loaded
    tokenizer = copy.deepcopy(plain)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<pad> $A </s>",
        special_tokens=[(name, plain.convert_tokens_to_ids(name)) for name in ("<pad>", "</s>")],
    )
    bos = plain.convert_tokens_to_ids("<pad>")
    runner = runner_of((model, tokenizer), tmp_path, methods=("dense",))
    ids = runner.writer("multi_key").document_ids(runner.document("multi_key", 1024, 0).text)
    assert ids[0] == bos
    assert ids[-1] != tokenizer.eos_token_id
    assert 1000 <= len(ids) <= 1024
    seen = fed(model, lambda: runner.run(Console(quiet=True)))
    assert seen[: len(ids)] == ids
    assert bos not in seen[len(ids) :]
    assert json.loads((tmp_path / "manifest.json").read_text())["prefix_ids"] == [bos]
    with pytest.raises(ConfigError, match=rf"prefix_ids was \[{bos}\] and is \[\]"):
        runner_of(loaded, tmp_path, methods=("dense",))


SPOKEN = (
    "{% for m in messages %}{{ 'Question' if m.role == 'user' else 'Answer' }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}Answer : {% endif %}"
)


def templated(loaded: Any) -> tuple[Any, Any]:
    """The small model, as if it were one that chats."""
    tokenizer = copy.deepcopy(loaded[1])
    tokenizer.chat_template = SPOKEN
    return loaded[0], tokenizer


def fed(model: Any, run: Callable[[], object]) -> list[int]:
    """The tokens that a run of one question feeds."""
    seen: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, inputs: seen.extend(inputs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        run()
    finally:
        hook.remove()
    return seen


def test_a_model_with_a_template_is_asked_with_it(loaded: Any, tmp_path: Path) -> None:
    """The user's turn opens before the document, which is read once, and all turns are one conversation."""
    model, tokenizer = templated(loaded)
    runner = runner_of((model, tokenizer), tmp_path, tasks=("multi_turn",), methods=("dense",))
    seen = fed(model, lambda: runner.run(Console(quiet=True)))
    document = runner.document("multi_turn", 1024, 0)
    (line,) = read_lines(tmp_path, "results.jsonl")
    messages = []
    for turn, said in zip(document.questions[0].turns, line["said"], strict=True):
        asked = turn.asked if messages else f"{document.text}\n\n{turn.asked}"
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": f"{turn.begun} {said}"}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert seen == tokenizer(whole, add_special_tokens=False).input_ids[: len(seen)]
    assert len(seen) >= len(tokenizer(whole).input_ids) - 2  # but for what ends the last answer
    assert len(runner.writer("multi_turn").document_ids(document.text)) <= 1024
    (note,) = Run.read(tmp_path).notes
    assert "by the model's chat template" in note


def test_perplexity_is_of_plain_text(loaded: Any, tmp_path: Path) -> None:
    settings = {"tasks": ("perplexity",), "methods": ("dense",)}
    plain = run(loaded, tmp_path / "plain", **settings)
    assert run(templated(loaded), tmp_path / "chat", chat="yes", **settings) == plain


def test_a_run_is_not_gone_on_with_in_other_words(loaded: Any, tmp_path: Path) -> None:
    """Runs that are from before there was a choice were asked in the tasks' own."""
    settings = {"methods": ("dense",), "probe": False}
    run(loaded, tmp_path, **settings)
    path = tmp_path / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["settings"].pop("chat") is None
    assert manifest["settings"].pop("group_pooling") == "max"
    path.write_text(json.dumps(manifest))
    run(templated(loaded), tmp_path, **settings, chat="no")
    with pytest.raises(ConfigError, match=r"of another run \(chat was None and is {'start'"):
        run(templated(loaded), tmp_path, **settings)
    with pytest.raises(ConfigError, match=r"of another run \(group_pooling was 'max' and is 'sum'"):
        run(loaded, tmp_path, **settings, group_pooling="sum")


def test_one_run_measures_every_pooling_and_number_of_dense_layers(
    loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With those methods to which they make a difference. The first of each are the run's own."""
    monkeypatch.setattr("sparsekv.config.MAX_WHOLE", 64)
    settings = {"methods": ("dense", "recent", "sketch", "oracle+sum", "oracle+share.2"), "probe": False}
    settings |= {"group_pooling": ("mean_softmax", "max"), "dense_layers": (1, 0)}
    options = RunOptions(**SMALL | settings)
    configs = {m.name: m.config(options.base, budget) for m, budget in options.cells}
    assert {name: (c.group_pooling, c.dense_layers) for name, c in configs.items() if name != "dense"} == {
        "recent": ("mean_softmax", 1),
        "recent+dense0": ("mean_softmax", 0),
        "sketch": ("mean_softmax", 1),
        "sketch+dense0": ("mean_softmax", 0),
        "sketch+max": ("max", 1),
        "sketch+max+dense0": ("max", 0),
        "oracle+sum": ("sum", 1),
        "oracle+sum+dense0": ("sum", 0),
        "oracle+share.2": ("share", 1),
        "oracle+share.2+dense0": ("share", 0),
    }
    lines = {line["method"]: line for line in run(loaded, tmp_path, **settings)}
    assert list(lines) == list(configs)
    assert not any(line["error"] for line in lines.values())
    assert lines["sketch+dense0"]["bytes_per_token"] < lines["sketch"]["bytes_per_token"]
    assert lines["oracle+share.2"]["pages_per_token"] < lines["oracle+sum"]["pages_per_token"]
    assert lines["oracle+share.2"]["tokens_read"] < lines["oracle+sum"]["tokens_read"] == 128
    told = json.loads((tmp_path / "manifest.json").read_text())["settings"]
    assert (told["group_pooling"], told["dense_layers"], told["methods"]) == ("mean_softmax", 1, list(configs))
    assert len(run(loaded, tmp_path, **settings | {"group_pooling": ("mean_softmax",)})) == len(lines)


def test_methods_are_measured_over_pages_in_several_formats(loaded: Any, tmp_path: Path) -> None:
    settings = {"methods": ("dense", "quest+int4"), "kv": ("plain", "int8"), "probe": False}
    lines = {line["method"]: line for line in run(loaded, tmp_path, **settings)}
    assert list(lines) == ["dense", "dense+int8", "quest+int4"]
    assert not any(line["error"] for line in lines.values())
    plain, int8 = (lines[name]["bytes_per_token"] for name in ("dense", "dense+int8"))
    assert plain * (64 + 4) == int8 * 64 * 4  # of float32
    assert json.loads((tmp_path / "manifest.json").read_text())["settings"]["kv"] == "plain"
    with pytest.raises(UnknownNameError, match=r"kv='int9' .* Did you mean 'int8'"):
        RunOptions(**SMALL | {"kv": "int9"})


def test_prompts_may_be_sparse(loaded: Any, tmp_path: Path) -> None:
    """All methods again for each mass, after the same prompts; the lines and the tables tell what these have read."""
    settings = {"methods": ("dense", "quest"), "prefill": "sparse", "prefill_mass": (0.9, 0.3), "probe": False}
    lines = {line["method"]: line for line in run(loaded, tmp_path, **settings)}
    assert set(lines) == {f"{name}{end}" for name in ("dense", "quest") for end in ("", "+prefill.9", "+prefill.3")}
    assert not any(line["error"] for line in lines.values())
    density = {name: line["prompt_density"] for name, line in lines.items()}
    assert density["dense"] == density["quest"] == 1 > density["dense+prefill.9"] > density["dense+prefill.3"] > 0
    assert density["quest+prefill.3"] == density["dense+prefill.3"]
    read = Run.read(tmp_path)
    assert f"| {100 * density['quest+prefill.3']:.1f}% |" in markdown(read)
    assert "prompt_density" in csv_text(read).splitlines()[0]


def test_perplexity_and_several_turns(loaded: Any, tmp_path: Path) -> None:
    settings = {"tasks": ("perplexity", "multi_turn"), "methods": ("dense", "random"), "probe": False}
    lines = run(loaded, tmp_path, **settings)
    nll = {line["method"]: line["nll"] for line in lines if line["task"] == "perplexity" and not line["document"]}
    assert nll["dense"] < nll["random"]
    turns = [line for line in lines if line["task"] == "multi_turn"]
    assert all(len(line["said"]) == 4 == len(line["expected"]) for line in turns)
    assert mean(turns)["dense"] > mean(turns)["random"]


def test_export(tmp_path: Path) -> None:
    options = ["--tasks", "needle", "--lengths", "1k", "--examples", "3"]
    assert main(["eval", "export", "--out", str(tmp_path), *options]) == 0
    (example,) = [json.loads(text) for text in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert len(example["document_ids"]) <= 1024
    assert [q["details"]["depth"] for q in example["questions"]] == [0, 50, 100]
    assert example["questions"][0]["turns"][0]["answers"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tasks": ("neddle",)}, UnknownNameError, "Did you mean 'needle'"),
        ({"methods": ("qest",)}, UnknownNameError, "Did you mean 'quest'"),
        ({"methods": ("minmaxx/top_k",)}, UnknownNameError, "Did you mean 'minmax'"),
        ({"budgets": (16,)}, ConfigError, "budget=16 is below"),
        ({"lengths": ()}, ConfigError, "lengths is empty"),
        ({"lengths": "4k"}, ConfigError, "lengths='4k' is not allowed: a list of whole numbers"),
        ({"tasks": (3,)}, ConfigError, "a list of names"),
        ({"budgets": (0,)}, ConfigError, "budgets=0 is not allowed: at least 1"),
        ({"num_examples": 0}, ConfigError, "num_examples=0 is not allowed: a whole number, at least 1"),
        ({"num_examples": "many"}, ConfigError, "num_examples='many'"),
        ({"batch_rows": 0}, ConfigError, "batch_rows=0"),
        ({"batch_tokens": "32k"}, ConfigError, "batch_tokens='32k'"),
        ({"seed": "x"}, ConfigError, "seed='x' is not allowed: a whole number"),
        ({"probe": "no"}, ConfigError, "probe='no' is not allowed: true or false"),
        ({"model": 3}, ConfigError, "model=3 is not allowed: a text"),
        ({"device": 3}, ConfigError, "device=3 is not allowed: a text"),
        ({"chat": "maybe"}, ConfigError, "chat='maybe' is not allowed: one of auto, yes, no"),
        ({"group_pooling": ("max", "mean")}, ConfigError, "group_pooling='mean'"),
        ({"methods": ("quest+mean",)}, UnknownNameError, "a method's setting='mean' is not known"),
        ({"dtype": "int8"}, ConfigError, "dtype='int8' is not allowed: one of auto, float32"),
        ({"dense_layers": "x"}, ConfigError, "dense_layers='x'"),
        ({"prefill": "spares"}, UnknownNameError, "Did you mean 'sparse'"),
        ({"prefill_mass": (0.9, 1.5)}, ConfigError, "prefill_mass=1.5 must be a share"),
        ({"prefill_mass": ("much",)}, ConfigError, "a list of numbers"),
        ({"dense_layers": (0, -1)}, ConfigError, "dense_layers=-1 is not allowed: at least 0"),
    ],
)
def test_what_cannot_be_measured(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RunOptions(**SMALL | settings)


def test_a_length_beyond_the_context(loaded: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="beyond the model's context of"):
        run(loaded, tmp_path / "run", lengths=(1 << 20,))
    assert not (tmp_path / "run").exists()


def test_questions_beyond_the_context(loaded: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The document alone would fit."""
    monkeypatch.setattr(loaded[0].config, "max_position_embeddings", 1030)
    with pytest.raises(ConfigError, match=r"multi_key at --lengths 1024 needs \d+ tokens with its questions"):
        run(loaded, tmp_path)


def test_a_device_without_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match="device='meta' holds no numbers"):
        session.load(RunOptions(**SMALL | {"device": "meta"}))


def test_other_devices_have_batches_too(loaded: Any, tmp_path: Path) -> None:
    """As large as a CPU's; what is left is the device's own business."""
    known = ("config", "generation_config", "dtype", "state_dict")
    model = SimpleNamespace(device=torch.device("mps"), **{name: getattr(loaded[0], name) for name in known})
    assert runner_of((model, loaded[1]), tmp_path).work.batch_tokens == 1 << 15


def test_methods() -> None:
    assert {"minmax/top_k", "sign_sketch/top_k"} <= set(pairs())
    assert method("sign_sketch/top_k").digest == "sign_sketch"
    assert method("minmax/recent").digest is None
    base = RunOptions(**SMALL).base
    assert method("quest").config(base, 64).recent == 16  # a small budget is not all recent tokens
    assert method("quest").config(base, 1024).recent == 64


def test_a_config_file_and_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags win; k counts 1024 in both."""
    seen: list[RunOptions] = []
    monkeypatch.setattr(session, "run", lambda parts, *rest: seen.extend(parts) or 0)
    monkeypatch.setattr(eval_command, "_print_tables", lambda *rest: None)
    text = "tasks: [needle, passkey]\nlengths: 2k\nbudgets: [128, 1k]\nseed: 3\nbatch_tokens: 32k\nchat: no\n"
    text += "group_pooling: sum\ndense_layers: [2, 0]\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8-sig")
    arguments = ["eval", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]
    assert main([*arguments, "--budgets", "256"]) == 0
    assert seen[0].tasks == ("needle", "passkey")
    assert (seen[0].lengths, seen[0].budgets, seen[0].seed) == ((2048,), (256,), 3)
    assert (seen[0].batch_tokens, seen[0].chat) == (32768, "no")  # which YAML takes for false
    assert (seen[0].group_pooling, seen[0].dense_layers) == (("sum",), (2, 0))


def test_a_config_file_of_several_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each is as the first one, but for what it names, and for flags; all go into one folder, none twice."""
    first = "tasks: [multi_key]\nlengths: [1024]\nbudgets: [128]\nmethods: [dense, quest]\nprobe: false\n"
    (tmp_path / "run.yaml").write_text(f"{first}---\nbudgets: [256]\n---\nlengths: [512]\nmethods: [dense]\n")
    arguments = ["eval", "run", "--config", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--examples", "1"]) == 0
    found = [(x["length"], x["method"], x["budget"]) for x in read_lines(tmp_path / "run", "results*.jsonl")]
    assert found == [(1024, "dense", None), (1024, "quest", 128), (1024, "quest", 256), (512, "dense", None)]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]["budgets"] == [128, 256]
    assert "4 answers written" in capsys.readouterr().out
    assert main(["eval", "export", *arguments[2:]]) == 1
    assert "has 3 parts, which only `eval run` takes" in capsys.readouterr().err
    (tmp_path / "run.yaml").write_text(f"{first}---\nmodel: smollm2\n")
    assert main(arguments) == 1
    assert "model, device and dtype are those of the first part" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [("task: needle", "Did you mean 'tasks'"), ("[", "cannot be read"), ("3", "names and values"),
     ("lengths: [many]", "no number of tokens"), ("num_examples: many", "num_examples='many' is not allowed"),
     ("batch_tokens: many", "no number of tokens")],
)  # fmt: skip
def test_a_bad_config_file(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert main(["eval", "--out", str(tmp_path / "run"), "--config", str(tmp_path / "run.yaml")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
