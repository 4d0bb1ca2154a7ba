"""How many tokens fit on a device at once, known from shapes before anything is read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from sparsekv import DIGESTS
from sparsekv.cache import heads_of
from sparsekv.hf.support import text_config

MAX_AT_ONCE = 1 << 20  # tokens of a prompt, of all documents together, that go through a model at once
_BETWEEN = 16 << 30  # bytes that lie between two layers then, at most
_PAGES_SHARE = 0.6  # of the memory that is free
_ON_OTHERS = 1 << 15  # tokens of a batch where memory is not the device's own


def batch_tokens(model: Any, digests: Iterable[str], page_size: int) -> int:
    """Tokens of all documents of a batch: on a GPU, as many as have room for their pages beside the rest.

    Args:
        digests: names, of which one at a time is kept.
    """
    if model.device.type != "cuda":
        return _ON_OTHERS
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, int(_PAGES_SHARE * free / token_nbytes(model, digests, page_size)))


def token_nbytes(model: Any, digests: Iterable[str], page_size: int) -> float:
    """Bytes of a token's keys and values in all layers, and of its share of the largest digest; of layers with a
    window, too, so rather too many."""
    heads, text, size = heads_of(model.config), text_config(model), model.dtype.itemsize
    num_kv_heads, head_dim = (heads.num_kv_heads, heads.head_dim) if heads else (1, text.hidden_size)
    digest = max((digest_nbytes(name, page_size, head_dim, size) for name in digests), default=0)
    nbytes: float = text.num_hidden_layers * num_kv_heads * (2 * head_dim * size + digest / page_size)
    return nbytes


def digest_nbytes(name: str, page_size: int, head_dim: int, key_size: int = 2) -> int:
    """Bytes of a page's digest in one kv head.

    Args:
        key_size: bytes of a key's channel, for fields in the keys' dtype.
    """
    fields = DIGESTS.get(name)().fields(page_size, head_dim)
    return sum(torch.Size(f.shape).numel() * (f.dtype.itemsize if f.dtype else key_size) for f in fields)


def tokens_at_once(model: Any) -> int:
    """Tokens of a prompt that go through a model at once, so that what lies between its layers stays bounded."""
    text = text_config(model)
    wide = 4 * text.hidden_size + 3 * (getattr(text, "intermediate_size", None) or 4 * text.hidden_size)
    return min(MAX_AT_ONCE, int(_BETWEEN / (wide * model.dtype.itemsize)))
