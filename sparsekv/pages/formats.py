"""The formats of pages: `PageFormat` is what a new one subclasses, under `@register("name")`."""

from __future__ import annotations

from collections.abc import Callable

from sparsekv.ops.formats import FORMATS, KEYS, VALUES, FormatKernel, PageFormat, Plain, halves, page_format

__all__ = ["FORMATS", "KEYS", "VALUES", "FormatKernel", "PageFormat", "Plain", "halves", "page_format", "register"]


def register(name: str) -> Callable[[type[PageFormat]], type[PageFormat]]:
    """Class decorator: files a format under `name` for `SparseConfig(kv=name)`.

    Raises:
        ConfigError: another format has that name.
    """
    return FORMATS.register(name)
