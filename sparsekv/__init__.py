"""Query-aware sparse attention for Hugging Face models, in one call.

>>> import sparsekv
>>> from sparsekv.evaluation import testbed  # a small model, and stories with questions; any supported model will do
>>> model, tokenizer = testbed.load("cpu")
>>> story = testbed.make_story(2048, tasks=("needle",), num_questions=1, seed=1)
>>> inputs = tokenizer(f"{story.text} {story.questions[0].prompt}", return_tensors="pt")

>>> patch = sparsekv.patch(model, budget=256)  # in force at once
>>> output = model.generate(**inputs, max_new_tokens=8)
>>> story.questions[0].answer in tokenizer.decode(output[0, -8:])
True
>>> patch.stats.sparse_steps > 0
True
>>> patch.undo()

Importing this package changes nothing in transformers or torch.
"""

from sparsekv.cache import DecodeStats, PagedCache
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS, Digest
from sparsekv.errors import (
    CacheFileError,
    CacheFullError,
    CacheStateError,
    ConfigError,
    PatchError,
    RankError,
    SparseKVError,
    UnknownNameError,
    UnsupportedModelError,
)
from sparsekv.hf import Patch, Support, patch, supports, unpatch
from sparsekv.policies import POLICIES, DecodeStep, Policy

__version__ = "0.2.0"

__all__ = [
    "DIGESTS",
    "POLICIES",
    "CacheFileError",
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
    "RankError",
    "SparseConfig",
    "SparseKVError",
    "Support",
    "UnknownNameError",
    "UnsupportedModelError",
    "patch",
    "supports",
    "unpatch",
]
