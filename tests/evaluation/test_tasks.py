"""Tasks: documents of the length asked for, in the spelling of any tokenizer, whose evidence holds the answers."""

from __future__ import annotations

import re
from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import DynamicCache, PreTrainedTokenizerFast

from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.accuracy.asking import Row, decode, prefill, turns_of
from sparsekv.evaluation.tasks import TASKS, Document, Metric, Writer, make_task, score, spread

LOOK_UPS = ("passkey", "needle", "multi_key", "multi_value", "multi_query", "variable_tracking")
SERIES = ("chain", "table", "multi_turn")
AGGREGATION = ("common_words", "frequent_words")
LIKELIHOODS = ("perplexity",)
SCORED = [name for name in TASKS if name not in LIKELIHOODS]


def byte_level_bpe(texts: list[str]) -> PreTrainedTokenizerFast:
    """A small tokenizer of the kind most models have."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def word_level(words: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", *words])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@pytest.fixture(scope="module")
def model() -> Any:
    return testbed.load()


@pytest.fixture(scope="module")
def writers(model: Any) -> dict[str, Writer]:
    prose = testbed.make_story(4096, seed=1).text.replace(" .", ".")
    return {"spaced": Writer(model[1]), "natural": Writer(byte_level_bpe([prose]))}


@pytest.fixture(scope="module", params=["spaced", "natural"])
def writer(request: pytest.FixtureRequest, writers: dict[str, Writer]) -> Writer:
    return writers[request.param]


@cache  # tests look at the same documents from several sides
def written(writer: Writer, task: str, num_tokens: int = 2048, seed: int = 3, num_questions: int = 0) -> Document:
    made = make_task(task)
    return made.write(writer, num_tokens, num_questions or made.num_questions, seed)


# --- All tasks ---


def test_the_families_of_the_plan_are_registered() -> None:
    assert set(TASKS) >= {*LOOK_UPS, *SERIES, *AGGREGATION, *LIKELIHOODS}


def test_tasks_without_a_score_are_known() -> None:
    found = {name for name in TASKS if make_task(name).metric is Metric.PERPLEXITY}
    assert found == set(LIKELIHOODS), "a new task that is not scored belongs into LIKELIHOODS above"


def test_questions_are_spread_over_a_document() -> None:
    assert spread(11, 3) == [0, 5, 10]
    assert spread(11, 4) == [0, 3, 7, 10]
    assert spread(8, 1) == [0]
    assert spread(2, 99) == [0, 1]
    assert all(len(set(spread(n, count))) == count for n in range(1, 40) for count in range(1, n + 1))


@pytest.mark.parametrize("task", list(TASKS))
def test_seeds_share_no_document(task: str) -> None:
    made = make_task(task)
    seeds = [made.seed_of(seed, number) for seed in range(-2, 3) for number in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert made.seed_of(0, 7) == 7  # documents of runs that began before seeds were told apart
    assert made.sha256 is None


@pytest.mark.parametrize("task", list(TASKS))
def test_a_document_is_a_function_of_its_arguments(task: str, writer: Writer) -> None:
    document = written(writer, task)
    assert document == written(Writer(writer.tokenizer), task)
    assert document.text != written(writer, task, seed=4).text


@pytest.mark.parametrize("task", list(TASKS))
def test_a_document_is_hardly_shorter_than_asked_for(task: str, writer: Writer) -> None:
    for num_tokens, seed in ((1024, 0), (1500, 1), (2048, 3), (4096, 3)):
        document = written(writer, task, num_tokens, seed)
        assert document.num_tokens == len(writer.encode(document.text))
        assert 0.98 * num_tokens <= document.num_tokens <= num_tokens


@pytest.mark.parametrize("task", list(TASKS))
def test_as_many_questions_are_asked_as_wanted(task: str, writer: Writer) -> None:
    for count in {1, 2, make_task(task).num_questions}:
        document = written(writer, task, 3000, num_questions=count)
        prompts = {question.turns[0].prompt + question.turns[0].reference for question in document.questions}
        assert len(document.questions) == len(prompts) == count


@pytest.mark.parametrize("task", SCORED)
def test_evidence_is_whole_sentences_with_the_answers_and_the_reference_is_perfect(task: str, writer: Writer) -> None:
    document, metric = written(writer, task), make_task(task).metric
    for question in document.questions:
        for start, end in question.evidence:
            assert document.text[end - 1] == "."
            assert start == 0 or document.text[start - 2 : start] == ". "
        found = " ".join(document.text[start:end] for start, end in sorted(question.evidence))
        for turn in question.turns:
            words = [word for answer in turn.answers for word in re.findall(r"[A-Za-z]+|[\d ]+", answer.strip())]
            assert all(word in found for word in words)
            assert turn.reference.startswith(" ")
            assert turn.answers
        said = [turn.reference for turn in question.turns]
        assert score(metric, said, [turn.answers for turn in question.turns]) == 1.0


@pytest.mark.parametrize("task", list(TASKS))
def test_no_word_is_unknown(task: str, writers: dict[str, Writer]) -> None:
    writer = writers["spaced"]
    document = written(writer, task, seed=9)
    for question in document.questions:
        for turn in question.turns:
            ids = writer.encode(document.text) + writer.encode(turn.prompt) + writer.encode(turn.reference)
            assert writer.tokenizer.unk_token_id not in ids
            assert writer.tokenizer.decode(ids) == document.text + turn.prompt + turn.reference


@pytest.mark.parametrize("task", list(TASKS))
def test_text_is_written_as_people_write(task: str, writers: dict[str, Writer]) -> None:
    document = written(writers["natural"], task)
    texts = [turn.prompt + turn.reference for question in document.questions for turn in question.turns]
    for text in [document.text, *texts]:
        assert not re.search(r" [.,?:]|\d \d|</s>|  ", text)
    for question in document.questions:
        assert all(turn.prompt.startswith("\n\nQuestion:") for turn in question.turns)


# --- Single tasks ---


def test_needles_lie_at_the_depths_that_they_name(writer: Writer) -> None:
    document = written(writer, "needle", 4096)
    depths = [question.details["depth"] for question in document.questions]
    assert depths == [0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    for question in document.questions:
        ((start, _),) = question.evidence
        before = len(writer.encode(document.text[:start])) / document.num_tokens
        assert abs(before - question.details["depth"] / 100) < 0.04
    assert document.questions[0].evidence[0][0] == 0
    assert document.questions[-1].evidence[0][1] == len(document.text)


def test_a_passkey_is_the_only_code(writer: Writer) -> None:
    document = written(writer, "passkey")
    assert document.text.count("secret code") == 1
    assert 0 <= document.questions[0].details["depth"] <= 100
    depths = {written(writer, "passkey", 1024, seed).questions[0].details["depth"] for seed in range(8)}
    assert len(depths) > 4


def test_multi_key_has_more_keys_in_longer_documents(writers: dict[str, Writer]) -> None:
    numbers = [written(writers["spaced"], "multi_key", n).text.count("secret code") for n in (1024, 4096)]
    assert numbers[0] >= 16
    assert numbers[1] >= 64


@pytest.mark.parametrize("task", ["multi_key", "multi_value", "variable_tracking", "multi_turn"])
def test_the_words_last_for_long_documents(task: str, writers: dict[str, Writer]) -> None:
    for num_tokens in (60_000, 140_000):  # below and above the 64k words that facts grow with
        assert written(writers["spaced"], task, num_tokens).num_tokens > 0.99 * num_tokens


@pytest.mark.parametrize(("task", "second"), [("common_words", 1), ("frequent_words", 4)])
def test_the_frequencies_of_words(task: str, second: int, writers: dict[str, Writer]) -> None:
    document = written(writers["spaced"], task, 4096)
    for question in document.questions:
        verb = question.turns[0].prompt.split()[5]
        counts = Counter(re.findall(rf"\w+ {verb} (\w+)", document.text)).most_common()
        assert counts[0] == (question.turns[0].answers[0], 8)
        assert counts[1][1] == second
        assert len(counts) == 10
        if task == "frequent_words":
            assert [count for _, count in counts] == [8, 4, 3, 2, 2, 1, 1, 1, 1, 1]


def test_a_chain_has_32_pointers(writer: Writer) -> None:
    document = written(writer, "chain")
    (question,) = document.questions
    pointers = dict(re.findall(r"(\w+) keeps the same number as (\w+)", document.text))
    for turn in question.turns:
        assert all(pointers[later] == earlier for earlier, later in pairwise(turn.answers))
        assert turn.answers[-1] not in pointers.values()
        number = re.search(r"number (\d+)", turn.prompt)
        assert f"{turn.answers[0]} keeps the number {number[1] if number else '?'}" in document.text
    assert sum(len(turn.answers) - 1 for turn in question.turns) == 32
    assert (len(question.turns) == 8) is writer.spaced
    assert len(pointers) > 32, "there is no other chain"
    order = [start for start, _ in question.evidence]
    assert writer.spaced or order == sorted(order)


def test_a_table_has_32_rows_in_one_piece(writer: Writer) -> None:
    document = written(writer, "table")
    (question,) = document.questions
    rows = re.findall(r"secret code of the (\w+ \w+) is ([\d ]*\d)", document.text)
    assert len(rows) == 32
    told = [[*turn.prompt.split()[-2:], turn.reference] for turn in question.turns]
    said = " ".join(" ".join(part) for part in told).replace(" ,", "")
    assert said.split() == " ".join(f"{key} {code}" for key, code in rows).split()
    assert sum(len(turn.answers) for turn in question.turns) == 32
    spans = sorted(question.evidence)
    assert all(earlier[1] + 1 == later[0] for earlier, later in pairwise(spans))


def test_turns_are_separated_as_the_testbed_has_learned(writers: dict[str, Writer]) -> None:
    for task in SERIES:
        for question in written(writers["spaced"], task).questions:
            assert question.turns[0].prompt.startswith(" Question : ")
            assert all(turn.prompt.startswith(" </s> Question : ") for turn in question.turns[1:])


def test_perplexity_is_of_some_256_tokens_that_tell_facts_again(writer: Writer) -> None:
    document = written(writer, "perplexity")
    (turn,) = document.questions[0].turns
    assert 250 <= len(writer.encode(turn.reference)) <= 300
    codes = re.findall(r"secret code of the (\w+ \w+) ?\?\s+Answer ?: (\d(?: ?\d){4})", turn.reference)
    assert 4 < len(set(codes)) == len(codes) <= 16
    assert all(f"secret code of the {key} is {code}" in document.text for key, code in codes)


# --- The writer ---


def test_the_spelling_follows_the_tokenizer(writers: dict[str, Writer]) -> None:
    words = "In Ashford , it is 0 4 2 1 7 ."
    assert writers["spaced"].spaced
    assert writers["spaced"].render(words) == words
    assert not writers["natural"].spaced
    assert writers["natural"].render(words.split()) == "In Ashford, it is 04217."
    assert writers["natural"].prompt("Question : who ? Answer : me") == "\n\nQuestion: who?\nAnswer: me"
    assert writers["natural"].prompt("Question : who ? Answer :", "Say it.") == "\n\nQuestion: who? Say it.\nAnswer:"
    assert writers["spaced"].prompt("Question : who ? Answer :", "Say it.") == " Question : who ? Answer :"


@pytest.mark.parametrize("task", SCORED)
def test_in_a_chat_nobody_says_answer(task: str, writers: dict[str, Writer]) -> None:
    """A question that ends with the beginning of its answer leaves that to the model."""
    for made in writers.values():
        for turn in written(made, task).questions[0].turns:
            assert turn.asked.startswith(("Question", "</s> Question"))
            assert "Answer:" not in turn.asked + turn.begun
            assert "Answer :" not in turn.asked + turn.begun
            assert turn.prompt.endswith(turn.begun)
            assert bool(turn.begun) == (not turn.prompt.rstrip().endswith(("Answer:", "Answer :")))


def test_counts_are_those_of_the_tokenizer(writer: Writer) -> None:
    texts = [writer.render(text) for text in ("The fox slept .", "Cold rain .", "The fox slept .")]
    assert writer.count(texts) == [len(writer.encode(f" {text}")) for text in texts]
    assert writer.count([]) == []


@pytest.mark.parametrize(
    ("template", "expected"),
    [("$A", []), ("<bos> $A", [0]), ("<bos> <sep> $A <eos>", [0, 1]), ("$A <eos>", []), ("$A <sep> <eos>", [])],
)
def test_a_document_begins_as_the_tokenizer_says(template: str, expected: list[int]) -> None:
    signs = ["<bos>", "<sep>", "<eos>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*signs, "goat"])}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    numbered = [(sign, i) for i, sign in enumerate(signs)]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=numbered)
    names = {"bos_token": "<bos>", "sep_token": "<sep>", "eos_token": "<eos>", "unk_token": "<unk>"}
    writer = Writer(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))
    assert writer.prefix == expected
    assert writer.document_ids("goat goat") == [*expected, 4, 4]
    assert writer.encode("goat") == [4]


def test_the_testbeds_documents_begin_with_their_text(writers: dict[str, Writer]) -> None:
    """Or the committed results would be of other documents."""
    assert writers["spaced"].prefix == writers["natural"].prefix == []


def test_unknown_words_are_named() -> None:
    with pytest.raises(ConfigError, match=r"does not know '.*' and more, .*choose other tasks"):
        written(Writer(word_level(["goat"])), "multi_key")


def test_an_unknown_word_of_a_question_is_named(model: Any) -> None:
    words = [word for word in model[1].get_vocab() if word not in ("Answer", "<unk>")]
    with pytest.raises(ConfigError, match="does not know 'Answer'"):
        written(Writer(word_level(words)), "needle")


@pytest.mark.parametrize("task", list(TASKS))
def test_too_short_a_document_is_refused(task: str, writer: Writer) -> None:
    with pytest.raises(ConfigError, match=r"too short.*--lengths"):
        written(writer, task, 8)


# --- Names ---


def test_an_unknown_task_gets_a_suggestion() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'multi_key'"):
        make_task("multi_keys")
    with pytest.raises(UnknownNameError, match="longbench:FILE"):
        make_task("longbanch:rows.jsonl")
    with pytest.raises(UnknownNameError, match="'ruler:'"):
        make_task("ruler:")


# --- The testbed answers ---


def dense_scores(model: Any, writer: Writer, task: str, num_tokens: int, num_questions: int = 0) -> list[float]:
    """The score of every question, each asked by itself over one prefilled document; perplexity: nats a token."""
    made, document = make_task(task), written(writer, task, num_tokens, num_questions=num_questions)
    cache = DynamicCache(config=model.config)
    mask = prefill(model, [writer.encode(document.text)], cache)
    cache.batch_repeat_interleave(len(document.questions))
    stops = frozenset([writer.tokenizer.eos_token_id] if made.stops else [])
    rows = [Row(turns_of(question, writer.encode), made.metric, stops) for question in document.questions]
    decode(model, cache, rows, mask.repeat_interleave(len(rows), 0))
    if made.metric is Metric.PERPLEXITY:
        return [row.nll / row.num_scored for row in rows]
    said = [[writer.tokenizer.decode(ids) for ids in row.said] for row in rows]
    expected = [[turn.answers for turn in question.turns] for question in document.questions]
    return [score(made.metric, *pair) for pair in zip(said, expected, strict=True)]


@pytest.mark.parametrize("task", SCORED)
def test_the_testbed_answers(task: str, model: Any, writers: dict[str, Writer]) -> None:
    most = {"chain": 1, "table": 1}.get(task, 2 if task in SERIES else 4)
    scores = dense_scores(model[0], writers["spaced"], task, 2048, min(most, make_task(task).num_questions))
    assert sum(scores) / len(scores) >= 0.9


def test_the_end_of_a_story_is_likely_to_the_testbed(model: Any, writers: dict[str, Writer]) -> None:
    (nll,) = dense_scores(model[0], writers["spaced"], "perplexity", 2048)
    assert nll < 0.5  # of a code's five digits alone, guessed, would be 0.6
