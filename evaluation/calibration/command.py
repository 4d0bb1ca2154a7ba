"""Finds the setting that reads least and still says what dense decoding says of a text of yours.

    sparsekv calibrate --model M --text FILE --out settings.json
    sparsekv generate --model M --prompt-file F --settings settings.json

Documents of the text are prefilled once; then what follows (natural) and a passage from the first half said again
(recall) are decoded by dense attention and by one setting after the other. A setting meets the tolerance if the upper
end of its interval does. For every digest the smallest budget that does is found by bisection; then layers that do
with half of it are found. With `--prefill sparse` documents are then read sparsely, too: the least mass that meets is
found. Beside settings.json lie the picture, and what was measured: the same command goes on there. Exit code 3: no
setting is known to meet the tolerance, and none is written.
"""

from __future__ import annotations

import argparse
import math

from sparsekv.command_line import EXIT_OK, new_console, positive, tokens
from sparsekv.config import GROUP_POOLINGS, PREFILLS, SparseConfig
from sparsekv.hf import models
from sparsekv.ops.formulas import with_kernels
from sparsekv.pages import FORMATS

EXIT_NOT_FOUND = 3  # no setting is known to meet the tolerance


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv calibrate`."""
    add = parser.add_argument
    add("--model", required=True, metavar="M", help=models.WHAT)
    add("--text", required=True, metavar="FILE", help="what the model is to be used on, UTF-8; - for standard input")
    add(
        "--out",
        required=True,
        metavar="FILE",
        help="the settings, as JSON; FILE's .png and .calibration.jsonl beside",
    )
    add("--tolerance", type=_nats, default=0.01, metavar="NATS", help="per token above dense (default %(default)s)")
    add(
        "--recall-tolerance",
        type=_nats,
        metavar="NATS",
        help="the same where a text repeats itself (default 3 times)",
    )
    add("--length", type=tokens, metavar="TOKENS", help="of a document (default: up to 8k, as model and text allow)")
    known = sorted(with_kernels(), key=lambda name: name != SparseConfig.digest)  # the default gives the first answer
    pooling = SparseConfig.group_pooling
    digests, poolings = ", ".join(known), ", ".join(GROUP_POOLINGS)
    add("--digests", nargs="+", choices=known, default=known, metavar="D", help=f"default: {digests}")
    add(
        "--poolings", nargs="+", choices=GROUP_POOLINGS, default=[pooling], metavar="P",
        help=f"of the scores of a kv head's query heads: {poolings} (default: {pooling})",
    )  # fmt: skip
    formats = list(FORMATS)
    add("--kv", choices=formats, metavar="FORMAT", help=f"of keys and values: {', '.join(formats)} (default plain)")
    add(
        "--prefill", choices=PREFILLS, default="dense",
        help="sparse: find, too, how sparsely prompts may be read (default %(default)s, which takes less time)",
    )  # fmt: skip
    add("--scored", type=positive, metavar="TOKENS", help="of a document, scored twice (default: 256, on a CPU 24)")
    add("--batch-tokens", type=tokens, metavar="N", help="of documents at once (default: 128k, on a CPU 32k)")
    add("--force", action="store_true", help="write the setting that comes closest, even if none is known to do")
    models.add_arguments(parser)


def _nats(text: str) -> float:
    value = float(text)
    if not (0 < value < math.inf):
        raise argparse.ArgumentTypeError(f"{text} is not allowed: more than 0")
    return value


def run(args: argparse.Namespace, command: str) -> int:
    """Calibrates; returns the exit code.

    Raises:
        ConfigError: the text is too short, an option is not allowed, or a file is of something else.
        UnsupportedModelError: the model cannot be served.
    """
    from .session import Session

    return EXIT_OK if Session(args, command, new_console()).run() else EXIT_NOT_FOUND
