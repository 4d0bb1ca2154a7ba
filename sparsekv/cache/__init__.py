"""transformers' cache and its layers, over pages. What is read of them is the policies' business."""

from sparsekv.cache.handshake import tagged_layer
from sparsekv.cache.layer_kinds import own_layers, plain_layers
from sparsekv.cache.model_check import check_settings, heads_of
from sparsekv.cache.paged_cache import PagedCache
from sparsekv.cache.paged_layer import Observer, PagedLayer
from sparsekv.cache.stats import DecodeStats

__all__ = [
    "DecodeStats",
    "Observer",
    "PagedCache",
    "PagedLayer",
    "check_settings",
    "heads_of",
    "own_layers",
    "plain_layers",
    "tagged_layer",
]
