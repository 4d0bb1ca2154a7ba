"""lm_eval with our model class and our tasks; all but the first few tests need the extra `eval`."""

import importlib.util
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from sparsekv import SparseConfig
from sparsekv.errors import ConfigError, SparseKVError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.lm_harness import command, documents
from sparsekv.evaluation.lm_harness.command import TASKS_DIR
from sparsekv.evaluation.tasks import TASKS

MODEL = str(testbed.MODEL_DIR)
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval: pip install '.[eval]' in the clone"
)


@pytest.fixture
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm_eval lists the machine's packages for every result, which takes a second."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


# -- without lm_eval


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.__main__", None)
    with pytest.raises(ConfigError, match=r"pip install '\.\[eval\]' in the clone"):
        command.main(["--tasks", "sparsekv"])


@pytest.mark.parametrize("arguments", [["--model", "hf"], ["run", "--model=hf"], ["-M", "hf"]])
def test_another_model_class_is_refused(arguments: list[str]) -> None:
    with pytest.raises(ConfigError, match="always runs --model sparsekv"):
        command.main([*arguments, "--tasks", "sparsekv"])


def test_every_file_names_a_task_of_ours() -> None:
    names = {path.stem for path in TASKS_DIR.glob("*.yaml")} - {"sparsekv", "_default"}
    assert names <= set(TASKS)
    group = (TASKS_DIR / "sparsekv.yaml").read_text()
    for name in names:
        assert f"task_name: {name}\n" in (TASKS_DIR / f"{name}.yaml").read_text()
        assert f"- sparsekv_{name}\n" in group


def test_a_right_answer_is_worth_one() -> None:
    row = {"metric": "recall", "answers": ["1 2", "3 4"], "length": 64, "several_lengths": True}
    assert documents.process_results(row, ["it is 1 2 , and 3 4 ."]) == {"recall": 1.0, "recall_64": 1.0}
    assert documents.process_results(row | {"several_lengths": False}, ["1 2"]) == {"recall": 0.5}


# -- tasks


@needs_lm_eval
def test_prompts_are_documents_and_questions_of_the_lengths_asked_for() -> None:
    made = documents.dataset("needle", pretrained=MODEL, lengths=[256, 512], num_examples=13)["test"]
    assert [row["length"] for row in made] == [256] * 13 + [512] * 13
    _, tokenizer = testbed.load()
    sizes = [len(tokenizer(row["input"]).input_ids) for row in made]
    assert all(row["length"] * 0.8 < size < row["length"] + 32 for row, size in zip(made, sizes, strict=True))
    assert all(documents.process_results(row, [row["target"]])["recall"] == 1 for row in made)
    assert list(documents.dataset("needle", tokenizer=MODEL, lengths=256, num_examples=13)["test"]["input"]) == [
        row["input"] for row in made if row["length"] == 256
    ]


@needs_lm_eval
def test_fewer_prompts_are_some_of_the_same_documents() -> None:
    few, many = (documents.dataset("needle", pretrained=MODEL, lengths=512, num_examples=n)["test"] for n in (3, 11))
    assert set(few["input"]) < set(many["input"])
    assert len(few) == 3
    other = documents.dataset("needle", pretrained=MODEL, lengths=512, num_examples=22, seed=1)["test"]
    assert not set(many["input"]) & set(other["input"])


@needs_lm_eval
@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({}, "name it with --model_args"),
        ({"pretrained": MODEL, "lengths": []}, "lengths is empty"),
        ({"pretrained": MODEL, "lengths": ["4k"]}, "lengths='4k' must be a whole number"),
        ({"pretrained": MODEL, "num_examples": 0}, "num_examples=0"),
    ],
)
def test_metadata_is_checked(metadata: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        documents.dataset("needle", **metadata)


# -- the model


def evaluate(
    tasks: list[str], limit: int, metadata: dict[str, Any], folder: Path = TASKS_DIR, gen_kwargs: Any = None,
    **model_args: Any,
) -> dict[str, Any]:  # fmt: skip
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from sparsekv.evaluation.lm_harness import model  # noqa: F401

    arguments = {"pretrained": MODEL, "dtype": "float32", "tail": 24, **model_args}
    manager = TaskManager(
        include_path=str(folder), include_defaults=False, metadata={**arguments, "num_examples": limit, **metadata}
    )
    found: dict[str, Any] = simple_evaluate(
        model="sparsekv", model_args=arguments, tasks=tasks, task_manager=manager, limit=limit, batch_size=8,
        bootstrap_iters=0, gen_kwargs=gen_kwargs,
    )  # fmt: skip
    return found


def recall(found: dict[str, Any], task: str = "sparsekv") -> float:
    return float(found["results"][task]["recall,none"])


@needs_lm_eval
@pytest.mark.usefixtures("no_inventory")
def test_our_tasks_are_answered_by_top_k() -> None:
    found = evaluate(["sparsekv"], 1, {"lengths": [1024]}, budget=256)
    files = {path.stem for path in TASKS_DIR.glob("*.yaml")} - {"_default"}
    assert len(found["results"]) == len(files)  # the group is one of them
    assert recall(found) >= 0.75
    counted = found["config"]["sparsekv"]
    assert counted["dense_steps"] == 0
    assert counted["sparse_steps"] > 24
    assert counted["share"] < 0.7


@needs_lm_eval
@pytest.mark.wide
@pytest.mark.usefixtures("no_inventory")
def test_top_k_answers_like_dense() -> None:
    dense = evaluate(["sparsekv"], 1, {"lengths": [2048]}, policy="all")
    sparse = evaluate(["sparsekv"], 1, {"lengths": [2048]}, budget=512)
    assert recall(dense) >= 0.9
    assert recall(sparse) >= recall(dense) - 0.15
    assert dense["config"]["sparsekv"]["sparse_steps"] == 0
    assert dense["config"]["sparsekv"]["share"] == 1


@needs_lm_eval
@pytest.mark.usefixtures("no_inventory")
def test_a_policy_that_drops_the_answers_page_does_not_find_it() -> None:
    task, few = ["sparsekv_multi_key"], {"lengths": [1024]}
    lost, found, dense = (evaluate(task, 4, few, policy=name, budget=128) for name in ("recent", "oracle", "all"))
    assert recall(lost, *task) <= 0.5 < 0.9 <= recall(found, *task) <= recall(dense, *task)
    counted = dense["config"]["sparsekv"]
    assert counted["sparse_steps"] == 0
    assert counted["share"] == 1


def make(**model_args: Any) -> Any:
    from sparsekv.evaluation.lm_harness.model import SparseLM

    return SparseLM(**{"pretrained": MODEL, "dtype": "float32", "batch_size": 3, "device": "cpu", **model_args})


def ask(lm: Any, prompts: list[str], **arguments: Any) -> list[str]:
    from lm_eval.api.instance import Instance

    arguments = {"until": [], "max_gen_toks": 12, **arguments}
    requests = [Instance("generate_until", {}, (prompt, arguments), i) for i, prompt in enumerate(prompts)]
    said: list[str] = lm.generate_until(requests)
    return said


def prompts() -> list[str]:
    """Of different lengths."""
    stories = [testbed.make_story(size, tasks=("many_keys",), num_questions=1, seed=size) for size in (200, 300, 700)]
    return [f"{story.text} {story.questions[0].prompt}" for story in stories]


@needs_lm_eval
def test_dense_decoding_says_what_lm_evals_own_model_says() -> None:
    import torch
    from lm_eval.models.huggingface import HFLM

    plain, ours = HFLM(MODEL, dtype="float32", batch_size=3, device="cpu"), make(policy="all")
    sampled = {"do_sample": True, "temperature": 0.7}
    for arguments in ({}, {"until": ["5", "."]}, {"num_beams": 2}, {"max_gen_toks": 3}, sampled):
        said = []
        for lm in (plain, ours):
            torch.manual_seed(1)
            said.append(ask(lm, prompts(), **arguments))
        assert said[0] == said[1], arguments


@needs_lm_eval
@pytest.mark.parametrize("num_prompts", [1, 3])
def test_the_end_of_the_prompt_is_decoded_sparsely(num_prompts: int) -> None:
    lm = make(tail=24, budget=128)
    ask(lm, prompts()[-num_prompts:], max_gen_toks=3)
    assert lm.patch.stats.dense_passes == 1
    assert lm.patch.stats.dense_steps == 0
    assert lm.patch.stats.sparse_steps == 24 + 2  # the last answer's token is not decoded


@needs_lm_eval
def test_a_gguf_is_a_model_too(gguf_file: Path) -> None:
    lm = make(pretrained=str(gguf_file), budget=128)
    assert lm.patch.model.config.num_hidden_layers == 1
    assert lm.tokenizer.decode(lm.tokenizer("cab").input_ids) == "cab"
    with pytest.raises(ConfigError, match=r"there is no folder \./nope"):
        make(pretrained="./nope")


@needs_lm_eval
def test_the_tail_covers_the_questions_of_our_tasks() -> None:
    from lm_eval.api.instance import Instance

    (doc, *_) = documents.dataset("multi_query", pretrained=MODEL, lengths=512, num_examples=1)["test"]
    assert doc["prompt_tokens"] > 8
    lm = make(tail=8, budget=128)
    arguments = {"until": [], "max_gen_toks": 3}
    with pytest.warns(UserWarning, match=rf"longest question has {doc['prompt_tokens']} tokens, and tail=8"):
        lm.generate_until([Instance("generate_until", doc, (doc["input"], arguments), 0)])
    assert lm.patch.stats.sparse_steps == doc["prompt_tokens"] + 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lm.generate_until([Instance("generate_until", {}, (doc["input"], arguments), 0)])
    assert lm.patch.stats.sparse_steps == doc["prompt_tokens"] + 2 + 8 + 2


@needs_lm_eval
@pytest.mark.filterwarnings("ignore:No prompt exceeded")
def test_short_prompts_in_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    story = prompts()[0]
    lm = make(tail=8)
    with pytest.warns(UserWarning, match="only the last 2 of each are decoded, instead of tail=8"):
        together = ask(lm, [story, "the secret code", "the"][:2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "No prompt exceeded")
        alone = [*ask(lm, [story]), *ask(lm, ["the secret code"])]
        assert len(ask(lm, ["the"])) == 1
    assert together == alone
    assert "DecodeStats" in capsys.readouterr().err


@needs_lm_eval
def test_what_never_decodes_is_warned_of() -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    lm, plain = make(budget=256), HFLM(MODEL, dtype="float32", device="cpu")
    scored = [Instance("loglikelihood", {}, (prompts()[0], " 7"), 0)]
    whole = [Instance("loglikelihood_rolling", {}, (prompts()[1],), 0)]
    with pytest.warns(UserWarning, match="never decode"):
        assert lm.loglikelihood(scored)[0] == pytest.approx(plain.loglikelihood(scored)[0], rel=1e-4)
    with pytest.warns(UserWarning, match="never decode"):
        assert lm.loglikelihood_rolling(whole) == pytest.approx(plain.loglikelihood_rolling(whole), rel=1e-4)
    with pytest.warns(UserWarning, match="No prompt exceeded the budget"):
        ask(lm, ["the secret code of"])


@needs_lm_eval
def test_steps_that_should_be_sparse_and_are_not_are_an_error() -> None:
    with pytest.raises(SparseKVError, match=r"(?s)exceeds the budget, and yet no step was sparse.*layers 0-5: dense"):
        ask(make(budget=128, dense_layers=6), prompts())


@needs_lm_eval
@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"budget": 10}, ConfigError, "budget=10 is below"),
        ({"policy": "topk"}, UnknownNameError, "Did you mean 'top_k'"),
        ({"tail": 0}, ConfigError, "tail=0 must be"),
        ({"backend": "causal"}, UnknownNameError, "backend='causal'"),
        ({"bugdet": 512}, ConfigError, "(?s)no bugdet. Did you mean 'budget'.*there are: tail, settings, budget"),
        ({"dtyp": "float32"}, ConfigError, "no dtyp. Did you mean 'dtype'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make(**settings)


@needs_lm_eval
def test_settings_of_json_and_of_a_file(tmp_path: Path) -> None:
    SparseConfig(sinks=8, budget=512).save(tmp_path / "settings.json")
    given = {"budget": {"3": 0.25, "rest": 256}, "dense_layers": [0, 3], "digest": "sign_sketch"}
    lm = make(settings=str(tmp_path / "settings.json"), **given)
    expected = SparseConfig(sinks=8, budget={3: 0.25, "rest": 256}, dense_layers=(0, 3), digest="sign_sketch")
    assert lm.patch.config == expected
    assert lm.get_model_info()["sparsekv"].items() >= expected.as_dict().items()


# -- the command


@needs_lm_eval
@pytest.mark.wide
def test_the_command(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--model_args", "pretrained=testbed,budget=256,tail=24", "--tasks", "sparsekv_passkey"]
    more = ["--metadata", '{"lengths": [1024], "num_examples": 2}', "--batch_size", "2", "--device", "cpu"]
    assert command.main([*arguments, *more, "--output_path", str(tmp_path)]) == 0
    printed = capfd.readouterr()
    assert "|passkey|" in printed.out.replace(" ", "")
    assert "sparse and 0 dense steps" in printed.err
    (written,) = tmp_path.rglob("results_*.json")
    assert '"sparse_steps"' in written.read_text()


@needs_lm_eval
def test_help_is_ours_and_lm_evals(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        command.main(["--help"])
    printed = capfd.readouterr().out
    assert done.value.code == 0
    assert "tail, the tokens of each prompt's end" in printed
    assert "--metadata" in printed


@needs_lm_eval
@pytest.mark.wide
@pytest.mark.usefixtures("no_inventory")
def test_rulers_own_tasks_that_need_no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their words are not the testbed's, so nothing is answered: what counts is that they run, sparsely."""
    pytest.importorskip("wonderwords", reason="needs RULER's words: pip install 'lm-eval[ruler]'")
    import lm_eval.tasks
    import nltk

    monkeypatch.setattr(nltk.data, "find", lambda *_: "there")  # or it would be fetched; only other tasks use it
    tasks, folder = ["niah_single_1", "ruler_vt", "ruler_cwe"], Path(lm_eval.tasks.__file__).parent / "ruler"
    lengths = {"max_seq_lengths": [1024]}
    found = evaluate(tasks, 1, lengths, folder, budget=256, gen_kwargs={"max_gen_toks": 4}, tail=64)
    assert all(found["results"][task]["1024,none"] >= 0 for task in tasks)
    counted = found["config"]["sparsekv"]
    assert counted["sparse_steps"] >= 64
    assert counted["dense_steps"] == 0
