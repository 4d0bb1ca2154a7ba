"""Storage: ids and counts of pages, tables, and the tensors of every layer. It knows nothing of transformers."""

from sparsekv.pages.arena import Arena
from sparsekv.pages.codes import Codes
from sparsekv.pages.formats import FORMATS, PageFormat
from sparsekv.pages.layer_pages import LayerPages
from sparsekv.pages.page_store import PageStore
from sparsekv.pages.residency import RESIDENCIES, Residency

__all__ = ["FORMATS", "RESIDENCIES", "Arena", "Codes", "LayerPages", "PageFormat", "PageStore", "Residency"]
