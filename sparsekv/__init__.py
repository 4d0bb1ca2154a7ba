"""Query-aware sparse attention for Hugging Face models, in one call.

    import sparsekv
    patch = sparsekv.patch(model, budget=2048)
    model.generate(**inputs)
    print(patch.stats)
    patch.undo()

Importing this package changes nothing in transformers or torch.
"""

from sparsekv.cache import DecodeStats, PagedCache
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS, Digest
from sparsekv.errors import (
    CacheFullError,
    CacheStateError,
    ConfigError,
    PatchError,
    SparseKVError,
    UnknownNameError,
    UnsupportedModelError,
)
from sparsekv.hf import Patch, patch, unpatch
from sparsekv.policies import POLICIES, DecodeStep, Policy

__version__ = "0.1.0.dev0"

__all__ = [
    "DIGESTS",
    "POLICIES",
    "CacheFullError",
    "CacheStateError",
    "ConfigError",
    "DecodeStats",
    "DecodeStep",
    "Digest",
    "PagedCache",
    "Patch",
    "PatchError",
    "Policy",
    "SparseConfig",
    "SparseKVError",
    "UnknownNameError",
    "UnsupportedModelError",
    "patch",
    "unpatch",
]
