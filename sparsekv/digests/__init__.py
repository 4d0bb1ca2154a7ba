"""Page digests by name: what is kept per page so that it can be scored unread."""

from sparsekv.digests import mean_std, minmax, sign_sketch, sketch2  # noqa: F401  (they register themselves)
from sparsekv.digests.base import DIGESTS, Digest, DigestKernel, Field, register

__all__ = ["DIGESTS", "Digest", "DigestKernel", "Field", "register"]
