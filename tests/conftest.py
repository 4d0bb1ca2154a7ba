"""What every test gets: no network, the same seeds, and GPU tests only where there is a GPU."""

import os
from importlib.util import find_spec

# Before transformers is imported: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
from hypothesis import settings

# Reproducible: the same examples at every run, and no deadline that a busy machine could miss.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# The workers of pytest-xdist share the cores; each with a thread per core would only get in the others' way.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)

# A GPU machine need not have the dev extra, without which these cannot be imported; none of their tests needs a GPU.
_NEEDED = {"test_notebooks.py": "nbclient", "test_docstrings.py": "pdoc"}
collect_ignore = [
    name for name, package in _NEEDED.items() if torch.cuda.is_available() and find_spec(package) is None
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU: run `make test-gpu` on a GPU machine")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002 (for code that draws from the global generator)
