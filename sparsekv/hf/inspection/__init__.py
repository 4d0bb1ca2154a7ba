"""What a model reads to answer a question about a document, on a page to look at: `Patch.inspect`."""

from .page import Page
from .question import inspect

__all__ = ["Page", "inspect"]
