"""The only place that knows how transformers' models are wired."""

from sparsekv.hf.forecast import Support, supports
from sparsekv.hf.patch import Patch, patch, unpatch

__all__ = ["Patch", "Support", "patch", "supports", "unpatch"]
