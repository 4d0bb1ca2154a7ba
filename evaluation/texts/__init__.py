"""A text that ships: plain English for the demo, the tests and whoever has no text at hand. README.md has its source.

>>> from sparsekv.evaluation import texts
>>> texts.excerpt().split()[:6]
['CHAPTER', '1', 'No', 'one', 'who', 'had']
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["EXCERPT", "NAME", "excerpt"]

NAME, EXCERPT = "excerpt", Path(__file__).parent / "northanger_abbey.txt"  # the word stands for the file in tasks


def excerpt() -> str:
    """The first 21 chapters of Jane Austen's Northanger Abbey (1817): public domain, some 280,000 characters."""
    return EXCERPT.read_text(encoding="utf-8")
