r"""NVIDIA's kvpress as a peer: the same questions, answered on a cache that was compressed before they were known.

A script of its own, in one file: kvpress 0.5.5 wants transformers below 5.3, so it runs in another environment
(torch, transformers<5.3, kvpress) and imports nothing of sparsekv. `sparsekv eval export --out DIR` writes the
questions:

python tools/kvpress_peer.py --examples DIR/examples.jsonl --model M --methods snapkv --budgets 512 1024 \
    --out DIR/results-kvpress.jsonl

A document is prefilled densely and cut down to `budget` tokens per kv head; then every question is decoded token by
token, each on a copy, at the positions it would have had. `sparsekv eval report DIR` shows the results beside others.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import importlib.metadata
import itertools
import json
import os
import re
import shlex
import string
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Ours -> kvpress's class: SnapKV (Li et al. 2024), Expected Attention (Devoto et al. 2025), StreamingLLM (Xiao et al.
# 2023), KeyDiff (Park et al. 2025), TOVA (Oren et al. 2024), K-norm (Devoto et al. 2024).
METHODS = {
    "snapkv": "SnapKVPress",
    "expected_attention": "ExpectedAttentionPress",
    "streaming_llm": "StreamingLLMPress",
    "keydiff": "KeyDiffPress",
    "tova": "TOVAPress",
    "knorm": "KnormPress",
}
_OF_KEY = ("task", "length", "method", "budget", "document", "question")
_OF_EXAMPLE = ("task", "length", "document", "metric", "stops", "document_ids", "questions", "eos_token_id")
_SPARE_TOKENS = 4  # an answer may be so much longer than the expected one, as in our own runs
_ARTICLES = {"a", "an", "the"}
_METRICS = ("recall", "any", "prefix", "f1", "perplexity")
Line = dict[str, Any]
Cell = tuple[str, int]
Dialogue = Generator[int, Tensor, None]


class InputError(ValueError):
    """Something given cannot be used; the message says what, and what can."""


# -- what is asked, and what has been answered


def read_examples(path: Path) -> list[Line]:
    """Documents and their questions in tokens.

    Raises:
        InputError: the file is not what `sparsekv eval export` writes.
    """
    if not path.is_file():
        raise InputError(f"There is no {path}: write it with `sparsekv eval export --out {path.parent}`.")
    examples = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            example = json.loads(text)
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number} is no JSON ({error}): export the examples again.") from error
        lacking = [name for name in _OF_EXAMPLE if name not in example]
        if lacking or example["metric"] not in _METRICS:
            wrong = f"lacks {', '.join(lacking)}" if lacking else f"has an unknown metric {example['metric']!r}"
            raise InputError(f"{path}, line {number} {wrong}: export the examples again, with this script's version.")
        examples.append(example)
    return examples


def finished(path: Path) -> set[tuple[Any, ...]]:
    """The keys of the lines that hold results. Removes a half-written last line, which a killed run may have left."""
    if not path.exists():
        return set()
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    lines = [json.loads(text) for text in content[:whole].splitlines()]
    return {tuple(line[name] for name in _OF_KEY) for line in lines if not line["error"]}


def append(path: Path, lines: Iterable[Line]) -> None:
    """Writes lines and waits until they are on the disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


# -- how right an answer is: as in evaluation/tasks/scoring.py, which explains it (a test compares the two)


def score(metric: str, said: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """From 0 to 1; `said` and `answers` by turn."""
    if metric == "prefix":
        return _prefix(said, answers)
    points = []
    for text, expected in zip(said, answers, strict=True):
        if metric == "recall":
            points += [_holds(text, answer) for answer in expected]
        else:
            how_right = _f1 if metric == "f1" else _holds
            points.append(max((how_right(text, answer) for answer in expected), default=0.0))
    return sum(points) / max(len(points), 1)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower()) or text.split()


def _holds(text: str, answer: str) -> float:
    return float(f" {' '.join(_words(answer))} " in f" {' '.join(_words(text))} ")


def _prefix(said: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    right, total = 0, max(sum(map(len, answers)), 1)
    for text, expected in zip(said, answers, strict=True):
        words = _words(text)
        for wanted in map(_words, expected):
            if words[: len(wanted)] != wanted:
                return right / total
            words = words[len(wanted) :]
            right += 1
    return right / total


def _f1(said: str, answer: str) -> float:
    ours, theirs = _plain(next(iter(said.strip().splitlines()), "")), _plain(answer)
    same = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * same / (len(ours) + len(theirs)) if same else float(ours == theirs)


def _plain(text: str) -> list[str]:
    text = "".join(sign for sign in text.lower() if sign not in string.punctuation)
    return [word for word in text.split() if word not in _ARTICLES]


# -- decoding


@dataclass
class Answer:
    """What became of a question.

    Attributes:
        said: tokens, by turn.
        nll: of each token of the reference, in nats, where the metric is perplexity.
        num_tokens: decoded, prompts included.
    """

    said: list[list[int]] = field(default_factory=list)
    nll: list[float] = field(default_factory=list)
    num_tokens: int = 0


def ask(example: Line, turns: Sequence[Line], answer: Answer) -> Dialogue:
    """Yields the tokens of a question and its answers, one by one; is sent the logits that follow each."""
    if example["metric"] == "perplexity":
        yield from _follow(turns[0], answer)
        return
    stop_ids, stops = example["eos_token_id"], example["stops"]
    for turn in turns:
        said: list[int] = []
        answer.said.append(said)
        logits = torch.empty(0)
        for token in turn["prompt_ids"]:
            logits = yield token
        limit = len(turn["reference_ids"]) + (turn.get("spare", _SPARE_TOKENS) if stops else 0)
        while (best := _best(logits, () if stops else stop_ids)) not in (stop_ids if stops else ()):
            if len(said) >= limit:
                break
            said.append(best)
            logits = yield best


def _follow(turn: Line, answer: Answer) -> Dialogue:
    """Feeds the reference whatever the model says of it; the last token need not be decoded."""
    answer.said.append([])
    given = [*turn["prompt_ids"], *turn["reference_ids"]]
    for i, (token, following) in enumerate(itertools.pairwise(given), 1):
        logits = yield token
        if i >= len(turn["prompt_ids"]):
            answer.nll.append(-float(logits.float().log_softmax(-1)[following]))


def _best(logits: Tensor, banned: Sequence[int]) -> int:
    if banned:
        logits = logits.index_fill(0, torch.tensor(banned, device=logits.device), float("-inf"))
    return int(logits.argmax())


@dataclass(frozen=True)
class Reads:
    """Bytes of keys and values over all layers, of one token of one sequence; and the steps."""

    bytes_per_token: float
    dense_bytes_per_token: float
    steps: int


@torch.inference_mode()
def decode(
    model: Any, cache: Any, num_tokens: int, questions: Sequence[Dialogue], answers: Sequence[Answer]
) -> Reads:
    """Decodes all questions about a document side by side, a row each.

    Args:
        cache: of the document, cut down or not. It is used up.
        num_tokens: of the document: positions go on from there.
    """
    layers = [(layer.keys.shape[-2], _nbytes(layer)) for layer in _full_layers(cache)]
    cache.batch_repeat_interleave(len(questions))
    tokens: list[int | None] = [next(question) for question in questions]
    read = dense = step = 0
    while any(token is not None for token in tokens):
        ids = torch.tensor([[token or 0] for token in tokens], device=model.device)
        positions = torch.full_like(ids, num_tokens + step)
        logits = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[:, -1]
        for row, question in enumerate(questions):
            if tokens[row] is not None:
                answers[row].num_tokens += 1
                tokens[row] = _next(question, logits[row])
        step += 1
        read += sum((kept + step) * nbytes for kept, nbytes in layers)
        dense += sum((num_tokens + step) * nbytes for _, nbytes in layers)
    return Reads(read / step, dense / step, step)


def _next(question: Dialogue, logits: Tensor) -> int | None:
    try:
        return question.send(logits)
    except StopIteration:
        return None


def _full_layers(cache: Any) -> list[Any]:
    """Without those that see a window only."""
    return [layer for layer in cache.layers if not getattr(layer, "is_sliding", False)]


def _nbytes(layer: Any) -> int:
    """Of a token."""
    pairs = (layer.keys, layer.values)
    return sum(x.shape[1] * x.shape[-1] * x.element_size() for x in pairs)


def make_press(method: str, budget: int, num_tokens: int) -> Any:
    """kvpress's context manager that keeps `budget` tokens per kv head; None if all fit."""
    if budget >= num_tokens:
        return None
    import kvpress

    # kvpress rounds down what is left: half a token more makes that exact.
    return getattr(kvpress, METHODS[method])(compression_ratio=1 - (budget + 0.5) / num_tokens)


@torch.inference_mode()
def prefill(model: Any, ids: Sequence[int], press: Any, budget: int) -> Any:
    """The document's cache, compressed.

    Raises:
        RuntimeError: the press has not kept what was asked for.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with contextlib.nullcontext() if press is None else press(model):
        model(input_ids=torch.tensor([list(ids)], device=model.device), past_key_values=cache, logits_to_keep=1)
    kept = {layer.keys.shape[-2] for layer in _full_layers(cache)}
    if kept != {min(budget, len(ids))}:
        raise RuntimeError(f"of {len(ids)} tokens {sorted(kept)} were kept, not {budget}")
    return cache


# -- the run


class Peer:
    """A model and its tokenizer, and where results go."""

    def __init__(self, model: Any, tokenizer: Any, out: Path) -> None:
        self.model, self.tokenizer, self.out = model, tokenizer, out
        self.gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "CPU"

    def run(self, examples: Sequence[Line], cells: Sequence[Cell]) -> int:
        """Answers what is not answered yet; returns the number of answers that are errors."""
        from tqdm import tqdm

        done, failed = finished(self.out), 0
        todo = [(example, cell, open_) for cell in cells for example in examples
                if (open_ := _open(example, cell, done))]  # fmt: skip
        for example, cell, numbers in (bar := tqdm(todo, unit="document")):
            bar.set_description(f"{example['task']}, {example['length']:,} tokens, {cell[0]} {cell[1]}")
            lines = self._answer(example, cell, numbers)
            append(self.out, lines)
            failed += sum(line["error"] is not None for line in lines)
        return failed

    def _answer(self, example: Line, cell: Cell, numbers: Sequence[int]) -> list[Line]:
        method, budget = cell
        questions = [example["questions"][number] for number in numbers]
        answers = [Answer() for _ in questions]
        rows = [ask(example, q["turns"], answer) for q, answer in zip(questions, answers, strict=True)]
        reads: Reads | None = None
        error: str | None = None
        try:
            press = make_press(method, budget, len(example["document_ids"]))
            cache = prefill(self.model, example["document_ids"], press, budget)
            reads = decode(self.model, cache, len(example["document_ids"]), rows, answers)
        except Exception as raised:  # a method that cannot serve this document does not end the run
            error = f"{type(raised).__name__}: {raised}"
        return [
            {
                **{name: example[name] for name in ("task", "length", "document")},
                "method": method,
                "budget": budget,
                "question": question["question"],
                **self._outcome(example["metric"], question, answer, error),
                **_counts(reads, budget < len(example["document_ids"])),
                "tokens_read": None,
                "gpu": self.gpu,
            }
            for question, answer in zip(questions, answers, strict=True)
        ]

    def _outcome(self, metric: str, question: Line, answer: Answer, error: str | None) -> Line:
        said = [self.tokenizer.decode(ids) for ids in answer.said]
        expected = [list(turn["answers"]) for turn in question["turns"]]
        is_scored = error is None and metric != "perplexity"
        return {
            "score": score(metric, said, expected) if is_scored else None,
            "nll": sum(answer.nll) / len(answer.nll) if answer.nll and error is None else None,
            "num_scored": len(answer.nll) or None,
            "said": said,
            "expected": expected,
            "num_tokens": answer.num_tokens,
            "details": question["details"],
            "error": error,
        }


def _open(example: Line, cell: Cell, done: set[tuple[Any, ...]]) -> list[int]:
    """Places of the questions that this cell lacks."""
    place = (example["task"], example["length"], *cell, example["document"])
    return [i for i, question in enumerate(example["questions"]) if (*place, question["question"]) not in done]


def _counts(reads: Reads | None, is_compressed: bool) -> Line:
    steps = reads.steps if reads else 0
    return {
        "bytes_per_token": reads.bytes_per_token if reads else None,
        "dense_bytes_per_token": reads.dense_bytes_per_token if reads else None,
        "pages_per_token": None,  # tokens are kept one by one
        "sparse_steps": steps if is_compressed else 0,
        "dense_steps": 0 if is_compressed else steps,
        "prompt_density": 1.0,
    }


def read_manifest(path: Path) -> Line:
    """Of the run that the examples are from.

    Raises:
        InputError: it is not there, or is no manifest.
    """
    try:
        manifest: Line = json.loads(path.read_text(encoding="utf-8"))
        manifest["model"]["dtype"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no manifest ({error!r}): `sparsekv eval export` writes it.") from error
    return manifest


def load(name: str, device: str, dtype: str) -> tuple[Any, Any]:
    """The model and its tokenizer.

    Raises:
        InputError: there is no such model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(f"--model {name}: {' '.join(str(error).split())[:300]}") from error
    return model.to(where).eval(), tokenizer


def weights_hash(model: Any) -> str:
    """As in evaluation/accuracy/manifest.py: of names, shapes and a sample of the values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 4096, 1)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample)
    return digest.hexdigest()


def check_methods(names: Sequence[str]) -> None:
    """Raises InputError if one is not known, or kvpress is not there."""
    for name in names:
        if name not in METHODS:
            near = difflib.get_close_matches(name, METHODS, n=2, cutoff=0.5)
            hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise InputError(f"method={name!r} is not known.{hint} Known: {', '.join(METHODS)}.")
    try:
        import kvpress  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"kvpress cannot be imported ({error}). It needs an environment of its own: "
            "pip install torch kvpress==0.5.5 'transformers<5.3'"
        ) from error


def _save_circumstances(out: Path, model_hash: str) -> None:
    """Beside the results: the manifest there tells of another environment."""
    versions = {name: importlib.metadata.version(name) for name in ("kvpress", "transformers", "torch")}
    told = {"command": shlex.join(["python", *sys.argv]), "versions": versions, "model": {"sha256": model_hash}}
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f"manifest-{out.stem.removeprefix('results-')}.json")
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--examples", type=Path, required=True, metavar="FILE", help="examples.jsonl; manifest.json lies beside it")
    add("--model", required=True, metavar="M", help="id on the hub or folder, the one the examples were written for")
    add("--methods", nargs="+", required=True, metavar="M", help=", ".join(METHODS))
    add("--budgets", nargs="+", type=int, required=True, metavar="TOKENS", help="kept per kv head")
    add("--out", type=Path, required=True, metavar="FILE", help="results-kvpress.jsonl; an old one is gone on with")
    add("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 1 if anything went wrong, 130 if interrupted."""
    args = _parser().parse_args(argv)
    try:
        return _run(args)
    except (InputError, OSError) as error:
        print(f"kvpress_peer: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"kvpress_peer: interrupted; the same command goes on with {args.out}", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if min(args.budgets) < 1:
        raise InputError(f"--budgets {min(args.budgets)} is not allowed: at least 1.")
    check_methods(args.methods)
    examples, manifest = read_examples(args.examples), read_manifest(args.examples.with_name("manifest.json"))
    model, tokenizer = load(args.model, args.device, manifest["model"]["dtype"])
    found = weights_hash(model)
    if found != manifest["model"].get("sha256"):
        print("kvpress_peer: these weights are not those of the manifest: is --model the same?", file=sys.stderr)
    _save_circumstances(args.out, found)
    failed = Peer(model, tokenizer, args.out).run(examples, [(m, b) for m in args.methods for b in args.budgets])
    if failed:
        print(f"kvpress_peer: {failed} answers are errors (see 'error' in {args.out})", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
