"""transformers' cache and its layers, over pages. What is read of them is the policies' business."""

from sparsekv.cache.attention_layer import AttentionLayer
from sparsekv.cache.cache_layer import LAYER_KINDS, CacheLayer, Observer
from sparsekv.cache.handshake import tagged_layer
from sparsekv.cache.latent_layer import LatentLayer
from sparsekv.cache.layer_kinds import own_layers, places, plain_layers
from sparsekv.cache.model_check import heads_of, settings_for
from sparsekv.cache.paged_cache import PagedCache
from sparsekv.cache.paged_layer import PagedLayer
from sparsekv.cache.state_layer import BesideState, StateLayer
from sparsekv.cache.stats import DecodeStats
from sparsekv.cache.window_layer import ChunkLayer, WindowLayer

__all__ = [
    "LAYER_KINDS",
    "AttentionLayer",
    "BesideState",
    "CacheLayer",
    "ChunkLayer",
    "DecodeStats",
    "LatentLayer",
    "Observer",
    "PagedCache",
    "PagedLayer",
    "StateLayer",
    "WindowLayer",
    "heads_of",
    "own_layers",
    "places",
    "plain_layers",
    "settings_for",
    "tagged_layer",
]
