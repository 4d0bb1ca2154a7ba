"""`sparsekv chat`: turns share one cache, each can be dropped, and a template's text is what the cache holds."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.cli import main
from sparsekv.commands import chat
from sparsekv.commands.conversation import Conversation
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed, wording

STORY = testbed.make_story(2048, tasks=("needle", "many_keys"), num_questions=3, seed=0)
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def typed(number: int) -> str:
    """A question as a user would type it."""
    prompt = STORY.questions[number].prompt
    return prompt.removeprefix("Question : ").removesuffix(" ? Answer :") + "?"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return testbed.load()


@pytest.fixture
def conversation(loaded: tuple[Any, Any]) -> Iterator[Conversation]:
    model, tokenizer = loaded
    with sparsekv.patch(model, budget=256) as patch:
        made = Conversation(patch, tokenizer, wording.of_testbed(), max_new_tokens=8)
        made.read(made.encode_document(STORY.text), lambda count: None)
        yield made


def quiet(text: str) -> None:
    """Shows nothing."""


def test_every_turn_is_answered_from_the_document(conversation: Conversation) -> None:
    shown: list[str] = []
    for i, question in enumerate(STORY.questions):
        turn = conversation.ask(typed(i), shown.append)
        assert turn is not None
        assert turn.answer.strip() == question.answer
        assert "".join(shown).endswith(turn.answer)
        assert turn.after.cache.stats.sparse_steps == turn.num_tokens - 1  # the first is the question's dense pass's
        assert turn.after.cache.stats.share < 0.5
        assert f"[{turn.num_tokens} tokens, {turn.after.cache.stats.share:.1%} of the cache read" in str(turn)
    assert len(conversation.turns) == 3


def test_the_cache_holds_the_tokens_that_are_counted(conversation: Conversation) -> None:
    """A turn over the shared cache is what one dense pass over all its tokens would be."""
    conversation.set_budget(1.0)  # all is read: the same as without a cache
    for i in range(2):
        conversation.ask(typed(i), quiet)
        state = conversation.state
        assert state.cache.get_seq_length() in (len(state.ids), len(state.ids) - 1)
    ids = conversation.state.ids
    conversation.patch.undo()
    logits = conversation.patch.model(torch.tensor([ids])).logits[0]
    said = conversation._encode(conversation.turns[-1].answer)
    assert logits[-len(said) - 1 : -1].argmax(-1).tolist() == said


def test_reading_ends_with_no_chunk_of_one_token(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be decoded, sparsely."""
    monkeypatch.setattr("sparsekv.commands.conversation.CHUNK", 64)
    parts: list[int] = []
    conversation.read([5] * 129, parts.append)
    assert parts == [80, 49]
    assert conversation.state.cache.stats.sparse_steps + conversation.state.cache.stats.dense_steps == 0


def test_a_stopped_turn_leaves_no_trace(conversation: Conversation) -> None:
    conversation.ask(typed(0), quiet)
    before, length = conversation.state, conversation.state.cache.get_seq_length()
    keys, _ = before.cache._store.dense(0)
    heard: list[str] = []
    assert conversation.ask(typed(1), heard.append, is_stopped=lambda: True) is None
    assert conversation.state is before
    assert before.cache.get_seq_length() == length
    assert torch.equal(before.cache._store.dense(0)[0], keys)
    turn = conversation.ask(typed(1), quiet)
    assert turn is not None
    assert turn.answer.strip() == STORY.questions[1].answer


def test_turns_can_be_taken_back_one_by_one_or_all(conversation: Conversation) -> None:
    document = conversation.state
    conversation.ask(typed(0), quiet)
    first = conversation.state
    conversation.ask(typed(1), quiet)
    assert conversation.undo()
    assert conversation.state is first
    conversation.reset()
    assert conversation.state is document
    assert not conversation.undo()
    turn = conversation.ask(typed(2), quiet)
    assert turn is not None
    assert turn.answer.strip() == STORY.questions[2].answer


def test_what_does_not_fit_is_refused_and_changes_nothing(conversation: Conversation) -> None:
    before = conversation.state
    with pytest.raises(ConfigError, match=r"takes 4\d,\d{3} tokens, and the model was made for 40,960"):
        conversation.ask("the " * 40_000, quiet)
    with pytest.raises(ConfigError, match="The document"):
        conversation.encode_document("the " * 41_000)
    with pytest.raises(ConfigError, match="budget=3 is below"):
        conversation.set_budget(3)
    assert conversation.state is before
    assert conversation.budget is None


def test_nothing_need_be_read_first(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with sparsekv.patch(model) as patch:
        made = Conversation(patch, tokenizer, wording.plain(has_document=False), max_new_tokens=1)
        turn = made.ask("who ?", quiet)
        assert turn is not None
        assert turn.num_tokens == 1
        assert str(turn) == f"[1 token, {turn.after.cache.get_seq_length()} tokens in the cache]"
        assert made.ask("and who else ?", quiet) is not None  # a cut-off answer's last token is read with the next


# -- wording


def test_a_model_with_a_template_chats_with_it(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(tokenizer, "chat_template", CHATML)
    monkeypatch.setattr(chat.model_options, "load", lambda args: (model, tokenizer))
    asked: list[str] = []
    encode = Conversation._encode
    monkeypatch.setattr(Conversation, "_encode", lambda self, text: asked.append(text) or encode(self, text))
    answers(["one", "two"], ["--model", "some/model", "--document", document(tmp_path)], monkeypatch)
    assert asked[0].startswith(f"<|user|>{STORY.text[:20]}")
    assert asked[1:] == ["\n\none<end><|assistant|>", "<end><|user|>two<end><|assistant|>"]


# -- the command, in a pipe


def document(folder: Path) -> str:
    path = folder / "story.txt"
    path.write_text(STORY.text)
    return str(path)


def answers(lines: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--max-new-tokens", "8", *options]) == code


def test_questions_through_a_pipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [typed(0), "", "/stats", "/undo", "/undo", "/budget 512", typed(1), "/reset", "/help", "/quit", typed(2)]
    lines.insert(0, "\ufeff/help")  # a file's byte-order mark
    answers(lines, ["--document", document(tmp_path), "--budget", "256"], monkeypatch)
    printed = capsys.readouterr()
    assert [line.strip() for line in printed.out.splitlines()] == [q.answer for q in STORY.questions[:2]]
    for told in (
        "2,048 tokens read.", "% of the cache read per token", "layers 2-5: sparse", "PagedCache(1 sequences",
        "The last question is forgotten.", "There is no question to forget.", "Budget from now on: 512.",
        "All questions are forgotten.", "/reset     forget all questions",
    ):  # fmt: skip
        assert told in printed.err
    assert "> " not in printed.out


@pytest.mark.parametrize(
    ("line", "message"), [("/rest", "Did you mean '/reset'"), ("/budget lots", "'lots' is no budget")]
)
def test_in_a_pipe_a_line_that_cannot_be_followed_is_an_error(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers([line], ["--document", document(tmp_path)], monkeypatch, code=1)
    assert message in capsys.readouterr().err


def test_without_anything_there_is_a_story_to_ask_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "STORY_TOKENS", 2048)
    text, hints = chat._story()
    answers([hints[1]], [], monkeypatch)
    printed = capsys.readouterr()
    assert hints[1] in printed.err
    assert printed.out.strip() == testbed.make_story(2048, ("needle", "many_keys"), 4).questions[0].answer
    assert json.dumps(text) not in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--document", "no_such_file"], "--document no_such_file cannot be read: No such file"),
        (["--document", str(testbed.MODEL_DIR / "model.safetensors")], "is no UTF-8 text"),
        (["--document", "/dev/null"], "is empty"),
        (["--budget", "3"], "budget=3 is below"),
    ],
)
def test_chat_says_what_is_wrong_before_it_loads_a_model(
    options: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat.model_options, "load", lambda args: pytest.fail("loaded"))
    answers([], options, monkeypatch, code=1)
    assert message in capsys.readouterr().err
