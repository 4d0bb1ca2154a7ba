"""Makes the API reference, HTML pages from the docstrings; a warning is an error.

It is part of what .ci/documentation.py makes.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pdoc

# What users and researchers build on; the rest is free to change.
MODULES = (
    "sparsekv",
    "sparsekv.cache",
    "sparsekv.digests",
    "sparsekv.policies",
    "sparsekv.errors",
    "sparsekv.registry",
    "sparsekv.ops",
    "sparsekv.ops.reference",
    "sparsekv.evaluation.tasks",
    "sparsekv.evaluation.testbed",
    "sparsekv.evaluation.notebook",
)


def main(folder: Path) -> None:
    """Writes the pages; raises at the first warning."""
    warnings.simplefilter("error", UserWarning)
    pdoc.render.configure(
        docformat="google",
        footer_text=f"sparsekv {__import__('sparsekv').__version__}",
        template_directory=Path(__file__).with_name("templates"),
    )
    pdoc.pdoc(*MODULES, output_directory=folder)
