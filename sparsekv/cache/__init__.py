"""Storage: pages, tables and the transformers cache over them. What is read of it is the policies' business."""

from sparsekv.cache.arena import Arena
from sparsekv.cache.paged_cache import PagedCache
from sparsekv.cache.paged_layer import Observer, PagedLayer, tagged_layer
from sparsekv.cache.stats import DecodeStats

__all__ = ["Arena", "DecodeStats", "Observer", "PagedCache", "PagedLayer", "tagged_layer"]
