"""A store as facts and tensors of a file, and back: the pages that rows hold, packed, and the tables that name
them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import CacheFileError
from sparsekv.pages.formats import halves
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.pages.page_pool import PageIds
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.piece_file import PieceFile
from sparsekv.pages.pieces import Source, Spec, Target
from sparsekv.pages.store_part import StorePart
from sparsekv.pages.window_table import WindowTable

Facts = dict[str, Any]
DeviceOf = Callable[[int], torch.device]  # layer -> where its tokens belong

# -- out


def described(store: PageStore) -> tuple[Facts, dict[str, Source]]:
    """What of a store a file gets: what a fork of it would hold. It is between two passes."""
    parts, sources = [], {}
    for i, part in enumerate(part for part in store.parts if part.layers):
        facts, of_part = _described(part, f"tables.{i}")
        parts.append(facts)
        sources.update(of_part)
    memory, remembered = store.memory.described()
    sources |= {name: Source.of(tensor) for name, tensor in remembered.items()}
    return {"parts": parts, "memory": memory}, sources


def _described(part: StorePart, name: str) -> tuple[Facts, dict[str, Source]]:
    table = part.table
    pages, places = table.packed()
    sources = {name: Source.of(torch.from_numpy(places))}
    if table.valid is not None:
        sources[f"{name}.valid"] = Source.of(table.valid)
    facts: Facts = {"num_tokens": table.num_tokens, "lengths": table.lengths.tolist(), "window": None, "layers": {}}
    if isinstance(table, WindowTable):
        facts["window"] = {"kind": type(table).__name__, "size": table.window, "keeps_past": table.keeps_past}
    fill = _filled(part, pages, places)
    for layer_idx, layer in part.layers.items():
        facts["layers"][str(layer_idx)] = {
            "kv_heads_and_dim": [layer.no_tokens.shape[1], layer.no_tokens.shape[3]],
            "dtype": str(layer.no_tokens.dtype).removeprefix("torch."),
            "value_dim": layer.value_dim,
            "is_shared": layer.kv.shape[1] == 1,
            "is_scored": bool(layer.summary),
        }
        sources |= {f"pages.{layer_idx}.{end}": x for end, x in _sources(layer, pages, fill)}
    return facts, sources


def _filled(part: StorePart, pages: PageIds, places: PageIds) -> np.ndarray[Any, Any]:
    """How many tokens each of the packed pages holds, `[n]`."""
    fill, size = np.zeros(len(pages), np.int64), part.config.page_size
    column = np.arange(places.shape[1])
    held = (part.table.lengths[:, None] - column * size).clip(0, size)
    np.maximum.at(fill, places[held > 0], held[held > 0])
    return fill


def _sources(layer: LayerPages, pages: PageIds, fill: np.ndarray[Any, Any]) -> Iterator[tuple[str, Source]]:
    def content(first: int, last: int) -> Tensor:
        return _without_rests(layer, layer.residency.read(pages[first:last]), fill[first:last])

    num_pages = len(pages)
    yield "kv", Source(Spec((num_pages, *layer.kv.shape[1:]), layer.kv.dtype), content)
    for i, field in enumerate(layer.summary):
        spec = Spec((num_pages, *field.shape[1:]), field.dtype)
        yield f"digest.{i}", Source(spec, partial(_rows, field, torch.from_numpy(pages).to(field.device)))
    for i, state in enumerate(layer.state):
        yield f"fitted.{i}", Source.of(state)


def _rows(field: Tensor, pages: Tensor, first: int, last: int) -> Tensor:
    return field[pages[first:last]]


def _without_rests(layer: LayerPages, content: Tensor, fill: np.ndarray[Any, Any]) -> Tensor:
    """Pages `[n, 2, hkv, p, record]` with zeros where no token was written to: what an earlier cache had there is
    nobody's business. Where a page is encoded as a whole it stays."""
    page_size = content.shape[3]
    short = np.flatnonzero(fill < page_size)
    if not len(short) or not layer.format.by_token:
        return content
    content = content.clone()
    where = torch.from_numpy(np.argwhere(np.arange(page_size) >= fill[short, None])).to(content.device)
    pages, offset = torch.from_numpy(short).to(content.device)[where[:, 0]], where[:, 1]
    head_dim = layer.no_tokens.shape[3]
    for which in halves(content):
        record = layer.format.stored(content, head_dim, which).shape[3]
        zeros = content.new_zeros(len(pages), content.shape[2], record)
        layer.format.write(zeros, content, pages, offset, head_dim, which)
    return content


# -- and back


def restored(store: PageStore, facts: Facts, file: PieceFile, device_of: DeviceOf) -> dict[str, Target]:
    """Makes the tables of an empty store, and room for the pages.

    Args:
        facts: as `described` gave them, for the same layers.

    Returns:
        Where the file's tensors go that are pages.

    Raises:
        CacheFileError: the file says what cannot be. CacheFullError: there is no room.
    """
    targets: dict[str, Target] = {}
    for i, told in enumerate(facts["parts"]):
        part = _part_of(store, told["window"])
        pages = _restore_table(part, told, file, f"tables.{i}")
        for name, layer in told["layers"].items():
            targets |= _restore_layer(part, int(name), layer, len(pages), device_of(int(name)))
    store.step.past = store.step.end = store.newest.num_tokens
    return targets


def _part_of(store: PageStore, window: Facts | None) -> StorePart:
    """That of windows is there, as the layers have asked for it."""
    if window is None:
        return store
    asked = (window["kind"], window["size"])
    part = next((p for (kind, size), p in store.windows.items() if (kind.__name__, size) == asked), None)
    if part is None:
        raise CacheFileError(f"The saved cache has windows of {window['size']}, which the model has not.")
    table: Any = part.table
    table.keeps_past = bool(window["keeps_past"])
    return part


def _restore_table(part: StorePart, told: Facts, file: PieceFile, name: str) -> PageIds:
    lengths, num_tokens = np.asarray(told["lengths"], np.int64), told["num_tokens"]
    places = file.tensor(name).numpy()
    valid = file.tensor(f"{name}.valid") if f"{name}.valid" in file.specs else None
    if not (_is_table(places, -(-lengths // part.config.page_size)) and _is_mask(valid, len(lengths), num_tokens)):
        raise CacheFileError(f"{file.path}: its tables do not name its pages.")
    pages, table = part.table.unpack(lengths, places), part.table
    table.num_tokens, table.valid = num_tokens, valid
    tokens = table.tokens_in(0, num_tokens)
    if (lengths > tokens).any() or (told["window"] is None and (lengths != tokens).any()):
        raise CacheFileError(f"{file.path}: its tables hold other tokens than it says.")
    return pages


def _is_table(places: PageIds, counts: np.ndarray[Any, Any]) -> bool:
    """Whether rows of so many pages name all of 0, 1, 2 ... and nothing else."""
    if places.ndim != 2 or places.dtype != np.int32 or len(places) != len(counts) or (counts < 0).any():
        return False
    named = places[np.arange(places.shape[1]) < counts[:, None]]
    return counts.sum() == len(named) and np.array_equal(np.unique(named), np.arange(places.max(initial=0) + 1))


def _is_mask(valid: Tensor | None, batch_size: int, num_tokens: int) -> bool:
    return valid is None or (
        valid.dtype == torch.bool
        and valid.ndim == 2
        and len(valid) == batch_size
        and 0 < valid.shape[1] <= num_tokens
    )


def _restore_layer(
    part: StorePart, layer_idx: int, told: Facts, num_pages: int, device: torch.device
) -> dict[str, Target]:
    (num_kv_heads, head_dim), dtype = told["kv_heads_and_dim"], getattr(torch, told["dtype"])
    like = torch.zeros(1, num_kv_heads, 1, head_dim, dtype=dtype, device=device)
    value_dim, is_shared, is_scored = told["value_dim"], told["is_shared"], told["is_scored"]
    layer = part.add_layer(layer_idx, like, None, is_scored, value_dim, is_shared)
    found = {"kv": _pages_target(layer, num_pages)}
    found |= {f"digest.{i}": Target.of(field[:num_pages]) for i, field in enumerate(layer.summary)}
    found |= {f"fitted.{i}": Target.of(state) for i, state in enumerate(layer.state)}
    return {f"pages.{layer_idx}.{end}": target for end, target in found.items()}


def _pages_target(layer: LayerPages, num_pages: int) -> Target:
    """Where whole pages go: they are the first ones of a new pool."""
    if layer.residency.in_place:
        return Target.of(layer.kv[:num_pages])
    lock, ids = threading.Lock(), np.arange(num_pages, dtype=np.int32)

    def write(first: int, last: int, rows: Tensor) -> None:
        with lock:
            layer.residency.write(ids[first:last], rows.to(layer.kv.device))

    return Target(Spec((num_pages, *layer.kv.shape[1:]), layer.kv.dtype), layer.kv.device, write)
