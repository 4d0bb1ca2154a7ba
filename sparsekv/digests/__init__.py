"""Page digests by name: what is kept per page so that it can be scored unread."""

from sparsekv.digests import minmax  # noqa: F401  (registers itself)
from sparsekv.digests.base import DIGESTS, Digest, Field, register

__all__ = ["DIGESTS", "Digest", "Field", "register"]
