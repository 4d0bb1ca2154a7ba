"""How long it takes to save a document's cache, to load it, and to say the first token after that.

Beside saving stands what `cp` takes for the same file, without and with the wait for the disk (saving waits for it);
beside loading, what reading the document took. The file is in the page cache when it is loaded. What was loaded is
compared with what was saved, bit for bit, before a time is printed.

    sparsekv bench documents --device cuda --context 128k --kv plain int8 --folder /dev/shm --out evaluation/results
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

import sparsekv
from sparsekv import PagedCache, Patch, SparseConfig
from sparsekv.command_line import add_json_option, choose_device, new_console, positive, tokens
from sparsekv.errors import SparseKVError
from sparsekv.evaluation.report import result, save_json
from sparsekv.hf.documents import read
from sparsekv.hf.support import CACHE
from sparsekv.pages import FORMATS

from .generate_model import Subject
from .known_models import MODELS

_COLUMNS = ("kv", "GB", "read, s", "save, s", "cp, s", "cp and sync, s", "load, s", "first token, s")
_MORE = 64  # tokens that there is room for behind the document


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sparsekv bench documents`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", metavar="ID_OR_PATH", help="a model of yours")
    which.add_argument(
        "--geometry", default="llama-3.1-8b", choices=MODELS, help="random weights in its sizes (default %(default)s)"
    )
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument("--context", type=tokens, default=128 << 10, metavar="TOKENS", help="default 128k")
    parser.add_argument("--kv", nargs="+", default=["plain"], choices=list(FORMATS), help="formats (default plain)")
    parser.add_argument("--folder", help="where the file is written (default: that of temporary files)")
    parser.add_argument(
        "--repeats", type=positive, default=3, help="of which the median counts (default %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="write DIR/documents_DEVICE.json")
    add_json_option(parser)


def run(args: argparse.Namespace, command: str) -> dict[str, Any]:
    """Measures, prints a table and writes the file asked for; returns what it holds.

    Raises:
        ConfigError: the model cannot be used. SparseKVError: what was loaded is not what was saved.
    """
    device = choose_device(args.device)
    subject = Subject(args.model, args.geometry, torch.bfloat16 if device.type == "cuda" else torch.float32)
    subject.check(args.context, 2)
    subject.load(device)
    table, rows = Table(*_COLUMNS, box=None, pad_edge=False), []
    for kv in args.kv:
        with (
            sparsekv.patch(subject.model, SparseConfig(kv=kv)) as patch,
            tempfile.TemporaryDirectory(dir=args.folder) as folder,
        ):
            rows.append(_measured(patch, Path(folder, "document.safetensors"), args.context, args.repeats))
        table.add_row(*(x if isinstance(x, str) else f"{x:.2f}" for x in rows[-1].values()))
    new_console().print(table)
    settings = {"model": subject.name, "dtype": str(subject.dtype), "context": args.context, "repeats": args.repeats}
    content = result(command, settings, rows)
    if args.out is not None:
        save_json(args.out, f"documents_{device.type}", content)
    return content


def _measured(patch: Patch, path: Path, context: int, repeats: int) -> dict[str, Any]:
    """A row, in seconds and gigabytes."""
    ids = torch.randint(patch.model.config.get_text_config().vocab_size, (1, context), device="cpu")
    cache, timed = patch.new_cache(context + _MORE), partial(_seconds, patch.model.device)
    seconds = {"read": timed(partial(read, patch, ids, cache))}
    seconds["save"] = _median([timed(partial(cache.save, path)) for _ in range(repeats)])
    for name, then in (("cp", "true"), ("cp and sync", f"sync '{path}.copy'")):
        seconds[name] = _median([_copied(path, then) for _ in range(repeats)])
    _check(cache, patch.load(path, reserve_tokens=context + _MORE))
    prompt = torch.cat([ids, ids[:, :2]], 1).to(patch.model.device)  # two more, which are read and not decoded
    expected = _first(patch, prompt, cache)
    del cache  # its memory goes to the next
    runs = [_loaded(patch, path, prompt, expected) for _ in range(repeats)]
    seconds["load"], seconds["first token"] = (_median(column) for column in zip(*runs, strict=True))
    return {"kv": patch.config.page_format, "GB": path.stat().st_size / 1e9, **seconds}


def _loaded(patch: Patch, path: Path, prompt: Tensor, expected: Tensor) -> tuple[float, float]:
    """Seconds to load a file, and to say the first token after it."""
    found: list[Any] = []
    timed, reserved = partial(_seconds, patch.model.device), prompt.shape[1] + _MORE
    load = timed(lambda: found.append(patch.load(path, reserve_tokens=reserved)))
    first = timed(lambda: found.append(_first(patch, prompt, found[0])))
    if not torch.equal(found[1], expected):
        raise SparseKVError("the first token after a load is another")
    return load, first


def _first(patch: Patch, prompt: Tensor, cache: PagedCache) -> Tensor:
    mask = torch.ones_like(prompt)
    output: Tensor = patch.model.generate(
        prompt, attention_mask=mask, **{CACHE: cache}, max_new_tokens=1, do_sample=False
    )
    return output[:, -1]


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def _copied(path: Path, then: str) -> float:
    """Seconds to copy a file to a new one, and for what comes then."""
    twin = path.with_name(f"{path.name}.copy")
    start = time.perf_counter()
    subprocess.run(f"cp '{path}' '{twin}' && {then}", shell=True, check=True)
    taken = time.perf_counter() - start
    twin.unlink()
    return taken


def _median(found: Sequence[float]) -> float:
    return sorted(found)[len(found) // 2]


def _check(one: PagedCache, other: PagedCache) -> None:
    """Whether both hold the same bits.

    Raises:
        SparseKVError: they do not.
    """
    for layer_idx, pages in one._store.layers.items():
        held = one._store.table.pages_of(0)
        content, summary = pages.read(held)
        loaded = other._store.layers[layer_idx]
        theirs, their_summary = loaded.read(other._store.table.pages_of(0))
        full = len(held) - 1  # behind the last token there may be anything
        for mine, their in zip((content, *summary), (theirs, *their_summary), strict=True):
            if not torch.equal(mine[:full].view(torch.uint8), their[:full].view(torch.uint8)):
                raise SparseKVError(f"layer {layer_idx} is not what was saved")
