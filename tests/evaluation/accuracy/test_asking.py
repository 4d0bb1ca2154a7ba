"""Questions side by side: what each row is fed, and that it says what it would say alone."""

from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import sparsekv
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import PromptTurn, Row, decode, prefill, stepper, turns_of
from sparsekv.evaluation.accuracy.probes import Probe
from sparsekv.evaluation.tasks import Metric, Question, Turn
from sparsekv.hf import chunks
from sparsekv.hf.wording import Wording, stop_ids

STOP = 9
CHAT = Wording("( ", (" # ", " ) "), (" > ( ", " ) "))


def run(row: Row, replies: list[int]) -> list[int]:
    """Feeds a row from a list of what the model says after each token; returns what was fed."""
    fed = []
    for reply in replies:
        if row.is_done:
            break
        fed.append(row.feed())
        row.take(reply)
    return fed


def test_an_answer_ends_with_the_stop_token() -> None:
    row = Row([PromptTurn([1, 2], [3])], Metric.RECALL, frozenset({STOP}))
    assert run(row, [0, 4, 5, STOP, 7, 7]) == [1, 2, 4, 5]
    assert row.said == [[4, 5]]
    assert row.is_done
    assert row.num_tokens == 4


def test_an_answer_is_not_much_longer_than_expected() -> None:
    row = Row([PromptTurn([1], [3, 3])], Metric.RECALL, frozenset({STOP}))
    run(row, [4] * 20)
    assert row.said == [[4] * 6]


def test_without_stops_it_is_as_long_as_expected() -> None:
    row = Row([PromptTurn([1], [3, 3, 3])], Metric.PREFIX, frozenset())
    run(row, [STOP] * 9)
    assert row.said == [[STOP] * 3]


def test_turns_follow_each_other() -> None:
    row = Row([PromptTurn([1], [3]), PromptTurn([2, 2], [3])], Metric.RECALL, frozenset({STOP}))
    assert run(row, [5, STOP, 0, 6, STOP]) == [1, 5, 2, 2, 6]
    assert row.said == [[5], [6]]


def test_in_a_chat_the_user_asks_and_the_model_answers() -> None:
    """What begins the answer is the model's, and a whole sentence has room around what is expected."""
    first = Turn("\n\nQuestion: one?\nAnswer: a fox", ("1",), " 1", opening="Answer: a fox")
    later = Turn("\n\nQuestion: two?\nAnswer:", ("2",), " 2", opening="Answer:")
    own = Turn(" Three!", ("3",), " 3")
    plain = turns_of(Question((first, later, own)), lambda text: [text])  # type: ignore[arg-type]
    assert [turn.prompt for turn in plain] == [[first.prompt], [later.prompt], [own.prompt]]
    chat = turns_of(Question((first, later, own)), lambda text: [text], CHAT)  # type: ignore[arg-type]
    texts = [" # Question: one? ) a fox", " > ( Question: two? ) ", " > ( Three! ) "]
    assert [turn.prompt for turn in chat] == [[text] for text in texts]
    assert [turn.reference for turn in chat] == [[" 1"], [" 2"], [" 3"]]
    row = Row([PromptTurn([1], [3], chat[0].spare)], Metric.RECALL, frozenset({STOP}))
    run(row, [4] * 50)
    assert len(row.said[0]) == 1 + 32
    assert row.longest >= row.num_tokens


def test_an_answer_ends_with_what_a_template_puts_behind_it(loaded: Any) -> None:
    """Whether or not the model's settings name it: the first special token."""
    model, tokenizer = loaded
    pad = tokenizer.convert_tokens_to_ids("<pad>")
    assert stop_ids(model, tokenizer) == stop_ids(model, tokenizer, CHAT) == {tokenizer.eos_token_id}
    ended = Wording("", ("", ""), ("\n<pad>\nQuestion", "</s>"))
    assert stop_ids(model, tokenizer, ended) == {tokenizer.eos_token_id, pad}


@pytest.fixture(scope="module")
def loaded() -> tuple[LlamaForCausalLM, Any]:
    return testbed.load()


def test_rows_say_what_they_would_say_alone(loaded: Any) -> None:
    """Documents of different lengths, questions of different lengths, some done before others."""
    model, tokenizer = loaded
    stories = [testbed.make_story(n, ("needle", "multi_value"), 4, seed=n) for n in (700, 512)]

    def encode(text: str) -> list[int]:
        return tokenizer(text).input_ids

    questions = [
        (d, Question((Turn(q.prompt, (q.answer,), q.answer),)))
        for d, story in enumerate(stories)
        for q in story.questions
    ]
    with sparsekv.patch(model, budget=128, recent=16) as patch:
        cache = patch.new_cache()
        mask = prefill(model, [encode(story.text) for story in stories], cache)
        assert mask.sum(1).tolist() == [700, 512]
        rows = [Row(turns_of(q, encode), Metric.RECALL, frozenset({tokenizer.eos_token_id})) for _, q in questions]
        which = torch.tensor([d for d, _ in questions])
        fork = cache.fork()
        fork.batch_select_indices(which)
        decode(model, fork, rows, mask[which])
        for (d, asked), row in zip(questions, rows, strict=True):
            alone = Row(turns_of(asked, encode), Metric.RECALL, frozenset({tokenizer.eos_token_id}))
            single = patch.new_cache()
            decode(model, single, [alone], prefill(model, [encode(stories[d].text)], single))
            assert alone.said == row.said
    right = [
        tokenizer.decode(row.said[0]) == q.turns[0].answers[0] for (_, q), row in zip(questions, rows, strict=True)
    ]
    assert sum(right) >= 6


def test_given_texts_are_fed_and_scored_as_one_forward_would(loaded: Any) -> None:
    """All of a reference's tokens but the first, if nothing goes before it; the last is scored and not fed. Texts of
    other lengths beside it change nothing."""
    model, steps = loaded[0], []
    given = [([8], [4, 5, 6]), ([], [4, 5, 6]), ([1, 1], [9])]
    with sparsekv.patch(model, budget=128, recent=16) as patch:
        cache = patch.new_cache()
        mask = prefill(model, [[5, 6, 7]] * 3, cache)
        rows = [Row([PromptTurn(*turn)], Metric.PERPLEXITY, frozenset()) for turn in given]
        assert decode(model, cache, rows, mask, steps.append) == 3 == len(steps)
    assert [row.num_tokens for row in rows] == [3, 2, 2]
    assert [row.num_scored for row in rows] == [3, 2, 1]
    for row, (prompt, reference) in zip(rows, given, strict=True):
        text = torch.tensor([[5, 6, 7, *prompt, *reference]])
        with torch.inference_mode():
            log_probs = model(text).logits[0].log_softmax(-1)
        scored = [log_probs[i - 1, text[0, i]].item() for i in range(text.shape[1] - row.num_scored, text.shape[1])]
        assert row.nll == pytest.approx(-sum(scored), abs=1e-4)


def test_banned_tokens_are_never_said(loaded: Any) -> None:
    model = loaded[0]
    with sparsekv.patch(model, budget=128, recent=16) as patch:
        cache = patch.new_cache()
        mask = prefill(model, [[5, 6, 7]], cache)
        row = Row([PromptTurn([8], [0] * 12)], Metric.PREFIX, frozenset())
        likely = Row([PromptTurn([8], [0])], Metric.PREFIX, frozenset())
        decode(model, cache.fork(), [likely], mask)
        decode(model, cache, [row], mask, banned=likely.said[0])
        assert likely.said[0][0] not in row.said[0]
        assert len(row.said[0]) == 12


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_rows_without_finite_logits_are_told_so(wrong: float, loaded: Any) -> None:
    """Those rows alone. A model may rule out single tokens with minus infinity."""
    model = loaded[0]

    def step(**inputs: Any) -> Any:
        output = model(**inputs)
        output.logits[:, -1, 7] = float("-inf")
        if inputs["position_ids"][0, 0] == 4:
            output.logits[1, -1] = wrong
        return output

    with sparsekv.patch(model, budget=128, recent=16) as patch:
        cache = patch.new_cache()
        mask = prefill(model, [[5, 6, 7], [7, 6, 5]], cache)
        rows = [Row([PromptTurn([8], [0] * 3)], Metric.PREFIX, frozenset()) for _ in range(2)]
        decode(step, cache, rows, mask)
    assert [row.is_finite for row in rows] == [True, False]


def test_a_document_never_ends_with_a_chunk_of_one_token(loaded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be decoded, sparsely."""
    monkeypatch.setattr(chunks, "CHUNK", 64)
    monkeypatch.setattr(chunks, "WHOLE", 128)
    monkeypatch.setattr(chunks, "MIN_CHUNK", 1)
    model = loaded[0]
    with sparsekv.patch(model, budget=128, recent=16) as patch:
        for size in (192, 193):
            prefill(model, [[5] * size], patch.new_cache())
        assert patch.stats.sparse_steps + patch.stats.dense_steps == 0
        assert patch.stats.dense_passes == 3 + 3


@pytest.mark.gpu
def test_captured_steps_score_texts_as_eager_ones_do() -> None:
    """Also where a probe looks at some of them, which run eagerly."""
    model = testbed.load(device=torch.device("cuda"))[0]
    text, nll = PromptTurn([8], [5 + i % 90 for i in range(120)]), []
    with sparsekv.patch(model, budget=128, recent=16, dense_layers=0, fuse=False) as patch:
        cache = patch.new_cache(4096)
        mask = prefill(model, [[5 + i % 70 for i in range(600)]] * 2, cache)
        for step in (patch.model, stepper(patch, 120)):
            row, fork = [Row([text], Metric.PERPLEXITY, frozenset()) for _ in range(2)], cache.fork()
            probe = Probe(fork, 120)
            decode(step, fork, row, mask, probe.before_step)
            assert [line["steps"] for line in probe.lines()] == [4] * 6
            nll.append(row[0].nll)
        assert patch.decoder.replays > 100
    assert nll[1] == pytest.approx(nll[0], rel=1e-3)
