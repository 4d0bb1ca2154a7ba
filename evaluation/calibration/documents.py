"""Pieces of a text, each asked twice: what follows, and a passage from its beginning, said again."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.asking import PromptTurn
from sparsekv.evaluation.accuracy.intervals import MIN_DOCUMENTS
from sparsekv.evaluation.tasks import Writer

MAX_LENGTH, MIN_LENGTH = 8192, 1024  # of a document, where no length is asked for
CUE = 8  # tokens of what is asked that are decoded and not scored: a passage must begin before it can be recognised
_GOLDEN = 0.618  # its multiples spread the passages over the first half


@dataclass(frozen=True)
class Piece:
    """A document in tokens.

    Attributes:
        document: what is prefilled.
        natural: what follows.
        recall: an early passage of the document, as long.
    """

    document: list[int]
    natural: PromptTurn
    recall: PromptTurn


def length_for(num_tokens: int, context: int | None, asked: int | None) -> int:
    """The tokens of a document: those asked for, or up to 8k, as far as model and text allow.

    Args:
        num_tokens: of the text.
        context: of the model; None: no limit.

    Raises:
        ConfigError: the text is too short, or the length is not allowed.
    """
    if asked is not None and not MIN_LENGTH <= asked <= (context or asked):
        raise ConfigError(f"--length {asked} is not allowed: {MIN_LENGTH} to the model's context ({context}) tokens.")
    length = asked or min(context or MAX_LENGTH, MAX_LENGTH)
    if asked is None:
        length = max(min(length, num_tokens // MIN_DOCUMENTS // 256 * 256), MIN_LENGTH)
    if num_tokens < MIN_DOCUMENTS * length:
        raise ConfigError(
            f"--text has {num_tokens:,} tokens and must have at least {MIN_DOCUMENTS * length:,}: {MIN_DOCUMENTS} "
            f"documents of {length:,}, and {32 * length:,} for an answer worth having. Give a longer text"
            + (" or a smaller --length." if length > MIN_LENGTH else ".")
        )
    return length


def pieces(ids: Sequence[int], writer: Writer, length: int, scored: int) -> list[Piece]:
    """All documents of a text, in an order by lot: the first few are from all of it.

    Args:
        ids: the text's tokens.
        length: of a document, prefix and scored tokens counted.
        scored: tokens of each turn that are scored.
    """
    whole = length - len(writer.prefix)
    numbers = list(range(len(ids) // whole))
    random.Random(0).shuffle(numbers)
    return [_piece(list(ids[n * whole : (n + 1) * whole]), writer.prefix, CUE + scored, n) for n in numbers]


def _piece(ids: list[int], prefix: list[int], asked: int, number: int) -> Piece:
    early = int((number * _GOLDEN % 1) * (len(ids) // 2))
    natural, recall = (PromptTurn(said[:CUE], said[CUE:]) for said in (ids[-asked:], ids[early : early + asked]))
    return Piece([*prefix, *ids[:-asked]], natural, recall)
