"""Lists the documents that `chat` and `generate` have read and kept, or deletes them.

They are in the user's cache folder, as large as keys and values are, one file for each document, model and settings.
Of more than `--keep-at-most` those go first that were used longest ago.

    sparsekv documents
    sparsekv documents --delete 3fa9 77c0
    sparsekv documents --delete-all
"""

from __future__ import annotations

import argparse
import datetime
from dataclasses import asdict
from typing import Any

from rich.table import Table

from sparsekv.command_line import add_json_option, new_console
from sparsekv.errors import ConfigError
from sparsekv.hf.memory import GIB

from .shelf import Shelf

_NAME = 8  # signs of a name that are shown


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv documents`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--delete", nargs="+", metavar="NAME", help="delete these: the beginning of a name will do")
    which.add_argument("--delete-all", action="store_true", help="delete all")
    add_json_option(parser)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Prints what is kept, or what was deleted, and returns it.

    Raises:
        ConfigError: a name is that of none, or of several; or there is no home.
    """
    shelf = Shelf.of_user()
    if shelf is None:
        raise ConfigError("There is no home directory. SPARSEKV_CACHE_DIR=... names a folder.")
    names = [document.name for document in shelf.documents()] if args.delete_all else args.delete
    found = shelf.documents() if names is None else shelf.delete(names)
    table = Table(box=None, pad_edge=False)
    for heading in ("name", "document", "model", "tokens", "GiB", "last used"):
        table.add_column(heading, overflow="fold")
    for x in found:
        used = datetime.datetime.fromtimestamp(x.used).strftime("%Y-%m-%d %H:%M")
        title = x.title or ("-" if x.num_tokens else "damaged")
        table.add_row(x.name[:_NAME], title, x.model or "-", f"{x.num_tokens:,}", f"{x.nbytes / GIB:.2f}", used)
    console = new_console()
    if found:
        console.print(table)
    done = "deleted" if names is not None else f"in {shelf.folder}"
    console.print(f"{len(found)} documents {done}, {sum(x.nbytes for x in found) / GIB:.2f} GiB", highlight=False)
    return {"folder": str(shelf.folder), "documents": [{**asdict(x), "path": str(x.path)} for x in found]}
