"""Damaged files of caches: each must be refused with a reason, or give what was saved.

python -m sparsekv.testing.damage --files 10000 --seed 0
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, Gemma3TextConfig

import sparsekv
from sparsekv import Patch
from sparsekv.errors import CacheFileError, SparseKVError
from sparsekv.hf.support import CACHE
from sparsekv.pages.checksums import CHECKSUMS, FASTEST

_WORD = 8  # bytes of a checksum, and of what says how long the header is


def _cut(content: bytearray, other: bytes, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def _lengthened(content: bytearray, other: bytes, rng: random.Random) -> None:
    content += other[: rng.randint(1, len(other))]


def _flipped(content: bytearray, other: bytes, rng: random.Random) -> None:
    end = _header_end(content) if rng.random() < 0.5 else len(content)
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(end)] ^= 1 << rng.randrange(8)


def _overwritten(content: bytearray, other: bytes, rng: random.Random) -> None:
    start = rng.randrange(len(content))
    end = min(start + rng.randint(1, 4096), len(content))
    content[start:end] = rng.choice((bytes(end - start), rng.randbytes(end - start), other[start:end]))


def _of_another(content: bytearray, other: bytes, rng: random.Random) -> None:
    """Another file's header, or another file's data."""
    content[: _header_end(content)] = other[: _header_end(other)]


def _told_otherwise(content: bytearray, other: bytes, rng: random.Random) -> None:
    """Another header, which its checksum agrees with."""
    end = _header_end(content)
    header = json.loads(content[_WORD:end])
    facts = json.loads(header["__metadata__"]["facts"])
    _change(rng.choice((facts, header)), rng)
    if isinstance(header.get("__metadata__"), dict):
        header["__metadata__"]["facts"] = json.dumps(facts)
    text = json.dumps(header).encode()
    new = len(text).to_bytes(_WORD, "little") + text
    content[:end] = new
    content[-_WORD:] = CHECKSUMS[FASTEST](new).to_bytes(_WORD, "little")


def _change(facts: Any, rng: random.Random) -> None:
    """Changes something in nested dicts and lists."""
    while True:
        place = rng.choice(list(facts) if isinstance(facts, dict) else range(len(facts)))
        if not (isinstance(facts[place], (dict, list)) and facts[place] and rng.random() < 0.9):
            break
        facts = facts[place]
    number = facts[place] if isinstance(facts[place], int) else 0
    new: tuple[Any, ...] = (number + 1, number - 1, -1, 1 << 62, 0.5, "text", None, [], {}, [1, 2], True)
    facts[place] = rng.choice(new)


def _header_end(content: bytes | bytearray) -> int:
    return _WORD + int.from_bytes(content[:_WORD], "little")


DAMAGES: list[Callable[[bytearray, bytes, random.Random], None]] = [
    _cut, _lengthened, _flipped, _overwritten, _of_another, _told_otherwise,
]  # fmt: skip


def small_model() -> Any:
    """A model with windows and full attention, of a few thousand weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 8, "vocab_size": 32, "num_hidden_layers": 2, "sliding_window": 8}
    config = Gemma3TextConfig(**sizes, layer_types=["sliding_attention", "full_attention"])
    return AutoModelForCausalLM.from_config(config).eval()


def fuzz(patch: Patch, folder: Path, files: int, seed: int) -> Counter[str]:
    """Damages so many files and loads them; returns how many were refused for which damage, or gave what was saved.

    Raises:
        SparseKVError: one gave something else.
    """
    rng, tally = random.Random(seed), Counter[str]()
    whole = [_saved(patch, folder / f"whole-{n}", n) for n in (30, 41)]
    path, again = folder / "damaged", folder / "again"
    for i in track(range(files), "Damaging", disable=files < 1000):
        content, damage = bytearray(whole[i % 2]), rng.choice(DAMAGES)
        damage(content, whole[1 - i % 2], rng)
        path.write_bytes(content)
        try:
            cache = patch.load(path)
        except CacheFileError:
            tally[f"refused:{damage.__name__}"] += 1
            continue
        cache.save(again)
        is_same = again.read_bytes() == whole[i % 2]
        if not is_same and damage is not _told_otherwise:
            raise SparseKVError(f"file {i} of seed {seed}, {damage.__name__}: other content was believed")
        tally["as saved" if is_same else "as told, checksum and all"] += 1
    return tally


def _saved(patch: Patch, path: Path, num_tokens: int) -> bytes:
    ids = torch.arange(2 * num_tokens, dtype=torch.int64, device="cpu").view(2, -1) % 32
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    cache = patch.new_cache()
    with torch.no_grad():
        patch.model(ids, attention_mask=mask, **{CACHE: cache})
    cache.save(path, ids)
    return path.read_bytes()


def main(argv: list[str] | None = None) -> int:
    """Entry point of `python -m sparsekv.testing.damage`."""
    parser = argparse.ArgumentParser(prog="python -m sparsekv.testing.damage", description=__doc__)
    parser.add_argument("--files", type=int, default=1000, help="damaged files (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damages (default %(default)s)")
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    patch = sparsekv.patch(small_model(), page_size=4, budget=16, sinks=1, recent=4)
    with tempfile.TemporaryDirectory() as folder:
        tally = fuzz(patch, Path(folder), args.files, args.seed)
    print(json.dumps(dict(sorted(tally.items())), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
