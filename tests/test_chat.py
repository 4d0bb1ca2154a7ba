"""`sparsekv chat`: turns share one cache, each can be dropped, and a template's text is what the cache holds."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsekv
from sparsekv.cli import main
from sparsekv.commands import chat
from sparsekv.commands.conversation import Conversation, Turn
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.hf import models, wording

STORY = testbed.make_story(1024, tasks=("needle", "many_keys"), num_questions=3, seed=0)
ASKED = [q.prompt.removeprefix("Question : ").removesuffix(" ? Answer :") + "?" for q in STORY.questions]  # as typed
CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return testbed.load()


@pytest.fixture
def conversation(loaded: tuple[Any, Any]) -> Iterator[Conversation]:
    model, tokenizer = loaded
    with sparsekv.patch(model, budget=128) as patch:
        made = Conversation(patch, tokenizer, wording.of_testbed(), max_new_tokens=8)
        made.read(STORY.text)
        yield made


def ask(conversation: Conversation, number: int) -> Turn:
    """A question, which is answered right."""
    shown: list[str] = []
    turn = conversation.ask(ASKED[number], shown.append)
    assert turn is conversation.turns[-1]
    assert turn.answer.said.strip() == "".join(shown).strip() == STORY.questions[number].answer
    return turn


def test_every_turn_is_answered_from_the_document(conversation: Conversation) -> None:
    for number in range(3):
        turn, stats = ask(conversation, number), conversation.turns[-1].cache.stats
        assert stats.sparse_steps == turn.answer.num_tokens - 1  # the first is the question's dense pass's
        assert stats.share < 0.6
        assert f"[{turn.answer.num_tokens} tokens, {stats.share:.1%} of the cache read" in str(turn)
    assert len(conversation.turns) == 4


def test_the_cache_holds_the_tokens_that_are_counted(conversation: Conversation) -> None:
    """A turn over the shared cache is what one dense pass over all its tokens would be."""
    conversation.config = conversation.config.with_(budget=1.0)  # all is read: the same as without a cache
    for number in range(2):
        turn = ask(conversation, number)
        assert turn.cache.get_seq_length() in (len(turn.ids), len(turn.ids) - 1)
    logits = conversation.patch.model(torch.tensor([turn.ids])).logits[0]
    said = conversation._encode(turn.answer.said)
    assert logits[-len(said) - 1 : -1].argmax(-1).tolist() == said


def test_reading_ends_with_no_chunk_of_one_token(conversation: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be decoded, sparsely."""
    monkeypatch.setattr("sparsekv.commands.reading.CHUNK", 64)
    stats = conversation.patch.stats
    passes = stats.dense_passes
    conversation.read(" ".join(STORY.words[:129]))
    assert conversation.turns[0].cache.get_seq_length() == 129
    assert (stats.dense_passes - passes, stats.sparse_steps, stats.dense_steps) == (2, 0, 0)


def test_a_stopped_turn_leaves_no_trace(conversation: Conversation) -> None:
    before = ask(conversation, 0)
    length, (keys, _) = before.cache.get_seq_length(), before.cache._store.dense(0)
    assert conversation.ask(ASKED[1], lambda text: None, is_stopped=lambda: True) is None
    assert conversation.turns[-1] is before
    assert before.cache.get_seq_length() == length
    assert torch.equal(before.cache._store.dense(0)[0], keys)
    ask(conversation, 1)


def test_turns_can_be_taken_back_one_by_one_or_all(conversation: Conversation) -> None:
    document, first, _ = conversation.turns[0], ask(conversation, 0), ask(conversation, 1)
    chat._follow(conversation, "/undo")
    assert conversation.turns == [document, first]
    chat._follow(conversation, "/reset")
    chat._follow(conversation, "/undo")
    assert conversation.turns == [document]
    ask(conversation, 2)


def test_what_does_not_fit_is_refused_and_changes_nothing(conversation: Conversation) -> None:
    turns, config = [*conversation.turns], conversation.config
    with pytest.raises(ConfigError, match=r"takes 4\d,\d{3} tokens, and the model was made for 40,960"):
        conversation.ask("the " * 40_000, print)
    with pytest.raises(ConfigError, match="The document"):
        conversation.read("the " * 41_000)
    with pytest.raises(ConfigError, match="budget=3 is below"):
        chat._follow(conversation, "/budget", "3")
    assert (conversation.turns, conversation.config) == (turns, config)


def test_nothing_need_be_read_first(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    with sparsekv.patch(model) as patch:
        made = Conversation(patch, tokenizer, wording.plain(has_document=False), max_new_tokens=1)
        turn = made.ask("who ?", print)
        assert turn is not None
        assert str(turn) == f"[1 token, {turn.cache.get_seq_length()} tokens in the cache]"
        assert made.ask("and who else ?", print) is not None  # a cut-off answer's last token is read with the next


# -- the command, in a pipe


def answers(lines: list[str], options: list[str], monkeypatch: pytest.MonkeyPatch, code: int = 0) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert main(["chat", "--max-new-tokens", "8", "--budget", "128", *options]) == code


@pytest.fixture
def document(tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The options that name it; the model need not be loaded again."""
    monkeypatch.setattr(models, "load", lambda *names: loaded)
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path))
    (tmp_path / "story.txt").write_text(STORY.text)
    return ["--document", str(tmp_path / "story.txt")]


def test_questions_through_a_pipe(
    document: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [ASKED[0], "", "/stats", "/undo", "/undo", "/budget 512", ASKED[1], "/reset", "/help", "/quit", ASKED[2]]
    answers(["\ufeff/help", *lines], document, monkeypatch)  # with a file's byte-order mark
    printed = capsys.readouterr()
    assert [line.strip() for line in printed.out.splitlines()] == [q.answer for q in STORY.questions[:2]]
    for told in (
        "1,024 tokens read.", "% of the cache read per token", "layers 0-5: sparse", "PagedCache(1 sequences",
        "The last question is forgotten.", "There is no question to forget.", "Budget from now on: 512.",
        "All questions are forgotten.", "/reset     forget all questions",
    ):  # fmt: skip
        assert told in printed.err
    assert "> " not in printed.out


@pytest.mark.parametrize(
    ("line", "message"), [("/rest", "Did you mean '/reset'"), ("/budget lots", "'lots' is no budget")]
)
def test_in_a_pipe_a_line_that_cannot_be_followed_is_an_error(
    line: str, message: str, document: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers([line], document, monkeypatch, code=1)
    assert message in capsys.readouterr().err


def test_a_model_with_a_template_chats_with_it(
    document: list[str], loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaded[1], "chat_template", CHATML)
    asked: list[str] = []
    encode = Conversation._encode
    monkeypatch.setattr(Conversation, "_encode", lambda self, text: asked.append(text) or encode(self, text))
    answers(["one", "two"], ["--model", "some/model", *document], monkeypatch)
    assert asked[0].startswith(f"<|user|>{STORY.text[:20]}")
    assert asked[1:] == ["\n\none<end><|assistant|>", "<end><|user|>two<end><|assistant|>"]
    answers(["one"], ["--model", "some/model", "--plain", *document], monkeypatch)
    assert asked[4] == "\n\nQuestion: one\nAnswer:"


def test_without_anything_there_is_a_story_to_ask_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat, "STORY_TOKENS", 1024)
    _, hints = chat._story()
    answers([hints[1]], [], monkeypatch)
    printed = capsys.readouterr()
    assert hints[1] in printed.err
    assert printed.out.strip() == testbed.make_story(1024, ("needle", "many_keys"), 4).questions[0].answer


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
    monkeypatch.setattr(models, "load", lambda *names: pytest.fail("loaded"))
    answers([], options, monkeypatch, code=1)
    assert message in capsys.readouterr().err
