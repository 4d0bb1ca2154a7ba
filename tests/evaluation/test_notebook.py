"""What the notebooks share, on the smallest stories."""

from pathlib import Path

import pytest

import sparsekv
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import notebook
from sparsekv.evaluation.accuracy.options import RunOptions
from sparsekv.evaluation.pages_plot import pages_figure
from sparsekv.evaluation.tasks import Writer, make_task

SIZES = {"full": {"tokens": 16384}, "ci": {"tokens": 1024}}


@pytest.mark.parametrize(("name", "tokens"), [(None, 16384), ("full", 16384), ("ci", 1024)])
def test_profile(name: str | None, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(notebook.PROFILE, raising=False)
    if name:
        monkeypatch.setenv(notebook.PROFILE, name)
    assert notebook.profile(**SIZES).tokens == tokens


def test_profiles_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"only one has \['words'\]"):
        notebook.profile(full={"tokens": 1, "words": 2}, ci={"tokens": 1})
    monkeypatch.setenv(notebook.PROFILE, "cl")
    with pytest.raises(UnknownNameError, match="Did you mean 'ci'"):
        notebook.profile(**SIZES)


def test_ask_and_trace_a_story() -> None:
    model, tokenizer = notebook.load(device="cpu")
    story = make_task("needle").write(Writer(tokenizer), 1024, 3, seed=1)
    with sparsekv.patch(model, budget=256, dense_layers=2) as patch:
        cache = patch.new_cache()
        notebook.read(model, tokenizer, story.text, cache)
        replies = [notebook.ask(model, tokenizer, cache.fork(), question) for question in story.questions]
        trace = notebook.trace(model, tokenizer, cache.fork(), story, story.questions[1])
    assert cache.get_seq_length() == story.num_tokens
    assert [reply.is_right for reply in replies] == [reply.text == reply.expected for reply in replies] == [True] * 3
    assert trace.words == replies[1].pieces == [*story.questions[1].turns[0].prompt.split(), *replies[1].text.split()]
    assert trace.num_asked == len(story.questions[1].turns[0].prompt.split())
    words = story.text.split()
    ((start, end),) = trace.evidence
    assert " ".join(words[start:end]) == story.text[slice(*story.questions[1].evidence[0])]
    assert sorted(trace.slots) == [2, 3, 4, 5]
    assert {len(steps) for steps in trace.slots.values()} == {len(trace.words)}
    assert len(pages_figure(trace, story.num_tokens).axes) == 4


def test_a_dense_cache_can_be_asked_too() -> None:
    from transformers import DynamicCache

    model, tokenizer = notebook.load(device="cpu")
    story = make_task("needle").write(Writer(tokenizer), 512, 1, seed=1)
    cache = DynamicCache(config=model.config)
    notebook.read(model, tokenizer, story.text, cache)
    assert notebook.ask(model, tokenizer, cache, story.questions[0]).is_right


def test_answers_figure() -> None:
    figure = notebook.answers_figure({"top_k": [[True, True]], "recent": [[False, True]]}, (64, 2048))
    assert [axes.get_title() for axes in figure.axes] == ["policy top_k", "policy recent"]
    assert [text.get_text() for text in figure.axes[1].get_xticklabels()] == ["64", "2k"]


def test_measure_writes_into_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    options = RunOptions(
        tasks=("needle",), methods=("dense", "quest"), budgets=(128,), lengths=(512,), num_examples=1, device="cpu"
    )
    runs = [notebook.measure(options) for _ in range(2)]
    assert runs[0].folder != runs[1].folder
    assert [sorted(run.methods) for run in runs] == [["dense", "quest"]] * 2
    assert not any(run.errors for run in runs)
