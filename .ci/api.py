"""Makes the API reference, HTML pages from the docstrings; a warning is an error.

python .ci/api.py [FOLDER]  # default: build/api
"""

from __future__ import annotations

import sys
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
    pdoc.render.configure(docformat="google", footer_text=f"sparsekv {__import__('sparsekv').__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)
    print(f"Written: {folder / 'index.html'}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
