"""The only place that knows how transformers' models are wired."""

from sparsekv.hf.patch import Patch, patch, unpatch

__all__ = ["Patch", "patch", "unpatch"]
