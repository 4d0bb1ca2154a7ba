"""Asks a question about a document and writes a page that shows what each token of the answer read: which pages of
the text, in which layers and kv heads, and which ones dense attention would have wanted.

The page is one HTML file that needs no network; other budgets can be tried on it. To know what dense attention wants,
every key is read at every step: it takes longer than `sparsekv generate`. Without --model it is the small model that
ships, which knows nothing but what its document says.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import sparsekv
from sparsekv.command_line import EXIT_OK, read_text
from sparsekv.errors import ConfigError
from sparsekv.evaluation import testbed
from sparsekv.hf import models, wording

from . import model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv inspect`."""
    parser.add_argument("--document", metavar="FILE", required=True, help="text file to ask about; - for stdin")
    parser.add_argument("--question", metavar="TEXT", required=True, help="what is asked")
    parser.add_argument("--out", metavar="FILE", default="page.html", help="write this page (default %(default)s)")
    parser.add_argument("--plain", action="store_true", help="plain text, even if the model has a chat template")
    model_options.add_arguments(parser, needs_model=False)
    parser.set_defaults(max_new_tokens=64)


def run(args: argparse.Namespace, command: str) -> int:
    """Prints the answer and writes the page.

    Raises:
        ConfigError, UnsupportedModelError: the document, the question, the model or a setting cannot be used; or the
            page cannot be written.
    """
    out = Path(args.out)
    if args.parallel is not None:
        raise ConfigError("--parallel: each rank sees its own kv heads only. inspect takes one GPU: leave it out.")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out={args.out} is a folder, or in none that exists: name a file, as page.html.")
    document, config = read_text("--document", args.document), model_options.config_of(args)
    model, tokenizer = models.load(args.model, args.device, args.dtype)
    words = wording.of_testbed() if args.model == testbed.NAME else wording.plain(True) if args.plain else None
    with sparsekv.patch(model, config) as patch:
        page = patch.inspect(tokenizer, document, args.question, args.max_new_tokens, words)
    page.save(out)
    print(page.answer.strip(), flush=True)
    print(f"What it read: {out}", file=sys.stderr)
    return EXIT_OK
