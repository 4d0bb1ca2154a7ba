"""The exceptions sparsekv raises: one family, so that `except SparseKVError` catches all of them.

Every message names what was wrong, what is allowed and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SparseKVError(Exception):
    """Base class of every error raised on purpose by sparsekv."""


class ConfigError(SparseKVError, ValueError):
    """A setting has a value that is not allowed."""


class UnknownNameError(ConfigError):
    """A name is not in its registry; the message suggests the nearest names and lists all of them."""

    def __init__(self, field: str, name: object, known: Iterable[str]) -> None:
        self.field, self.name, self.known = field, name, sorted(known)
        hint = did_you_mean(str(name), self.known)
        super().__init__(f"{field}={name!r} is not known.{hint} Known: {', '.join(self.known)}.")

    def __reduce__(self) -> tuple[type[UnknownNameError], tuple[str, object, list[str]]]:
        return type(self), (self.field, self.name, self.known)  # else it could not leave a worker process


class UnsupportedModelError(SparseKVError, TypeError):
    """The model cannot be served sparsely; the message says why and what to do instead."""


class PatchError(SparseKVError, RuntimeError):
    """A model is patched twice, was made with the config of a patched one, or is unpatched without being patched."""


class CacheFullError(SparseKVError, RuntimeError):
    """The page pool's limit (`SparseConfig.max_tokens`) would be exceeded; nothing was written."""


class CacheStateError(SparseKVError, RuntimeError):
    """A cache is used in a way its content does not allow (another batch, an edited mask, a half-done step)."""


class CacheFileError(SparseKVError, ValueError):
    """A saved cache is torn, or of another model, other settings or other tokens; nothing has changed."""


class RankError(SparseKVError, RuntimeError):
    """Of several processes that hold a model together, another has failed, or does not do the same."""


class KernelCompileError(SparseKVError, RuntimeError):
    """A CUDA kernel cannot be compiled: the message has NVRTC's log, or says what is missing and how to get it."""


class KernelError(SparseKVError, RuntimeError):
    """CUDA refuses to set up or launch a kernel."""


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """The nearest names as a sentence that begins with a space; empty if none is near.

    Args:
        prefix: what all names begin with; having it in common does not make two of them near.
    """
    rest = [other.removeprefix(prefix) for other in known]
    near = difflib.get_close_matches(name.removeprefix(prefix), rest, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(prefix + other) for other in near)}?" if near else ""
