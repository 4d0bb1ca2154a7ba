"""Fast checksums of 64 bits, against torn and worn files (not against people who forge them)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

try:
    import xxhash
except ImportError:  # ten times as slow, in as many threads as there are
    xxhash = None  # type: ignore[assignment]

Checksum = Callable[[Any], int]  # of anything that has bytes; other threads go on in the meantime


def _blake2b(content: Any) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


CHECKSUMS: dict[str, Checksum] = {"blake2b_64": _blake2b}
if xxhash is not None:
    CHECKSUMS["xxh3_64"] = xxhash.xxh3_64_intdigest
FASTEST = list(CHECKSUMS)[-1]
