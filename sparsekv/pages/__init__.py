"""Storage: ids and counts of pages, tables, and the tensors of every layer. It knows nothing of transformers."""

from sparsekv.pages.arena import Arena
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.pages.page_store import PageStore

__all__ = ["Arena", "LayerPages", "PageStore"]
