"""How a document comes into a cache: from the shelf, if it has been read before, else by reading it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from sparsekv import PagedCache, Patch
from sparsekv.errors import CacheFileError, CacheStateError, ConfigError
from sparsekv.hf import chunks, documents
from sparsekv.pages import pieces

from .shelf import Shelf

CHUNK = 4096  # tokens of a document that a CPU reads at once, so that progress can be shown


def start_ids(tokenizer: Any) -> list[int]:
    """The token that a tokenizer begins every text with, if there is one."""
    return [token for token in tokenizer("").input_ids if token == tokenizer.bos_token_id]


def cache_of(
    patch: Patch, ids: list[int], reserve_tokens: int, shelf: Shelf | None = None, title: str = ""
) -> PagedCache:
    """A cache that holds a document. What becomes of it on the shelf is told on stderr.

    Args:
        ids: of the document.
        reserve_tokens: tokens to allocate memory for at once.
        shelf: where it is looked for, and then kept; None: nowhere.
        title: what it is called in lists.
    """
    document = torch.tensor([ids], dtype=torch.int64, device="cpu")
    path = None if shelf is None else shelf.place(patch, document)
    if shelf is not None and path is not None and path.exists():
        try:
            with _bar("loading what was read before", path.stat().st_size) as advance:
                cache = shelf.take(patch, path, reserve_tokens, advance)
            print(f"Loaded, as it has been read before (--no-keep reads it anew): {path}", file=sys.stderr)
            return cache
        except (CacheFileError, CacheStateError, OSError) as error:
            print(f"{error} The document is read anew.", file=sys.stderr)
    cache = patch.new_cache(reserve_tokens)
    with _bar(f"reading {len(ids):,} tokens", len(ids)) as advance:
        chunk = CHUNK if patch.model.device.type == "cpu" else chunks.CHUNK
        documents.read(patch, document, cache, chunk, advance)
    if shelf is not None and path is not None:
        try:
            with _bar("keeping what was read", cache.nbytes) as advance:
                shelf.keep(cache, path, title, advance)
            print(f"Kept for the next time in {path} (--no-keep does not).", file=sys.stderr)
        except (CacheStateError, ConfigError, OSError) as error:
            print(f"The document is not kept: {error}", file=sys.stderr)
    return cache


@contextlib.contextmanager
def _bar(what: str, total: int) -> Iterator[pieces.Progress]:
    """A progress bar where stderr is a terminal: yields what is to be called with every piece that is done."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.advance(task, done)
