"""What every test gets: no network, the same seeds, and GPU tests only where there is a GPU; and a GGUF to load."""

import os
from importlib.util import find_spec
from pathlib import Path

# Before transformers is imported: nothing here may reach for a hub.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest
import torch
import transformers
from hypothesis import settings

from sparsekv.digests import DIGESTS, Field
from sparsekv.errors import ConfigError

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


@pytest.fixture
def of_eights(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a digest that cannot be kept of every head size, for this test alone."""

    class OfEights(DIGESTS.get("minmax")):  # type: ignore[misc]
        def fields(self, page_size: int, head_dim: int) -> list[Field]:
            if head_dim % 8:
                raise ConfigError(f"head_dim={head_dim} must divide by 8.")
            return super().fields(page_size, head_dim)

    monkeypatch.setitem(DIGESTS._classes, "of_eights", OfEights)
    return "of_eights"


SIGNS = [*(chr(i) for i in range(ord("!"), ord("~") + 1)), "ab"]


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of one layer with random weights, and a tokenizer of hardly more than letters."""
    path = tmp_path / "tiny.gguf"
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install '.[gguf]' in the clone")
    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20):
        pytest.skip(f"transformers {transformers.__version__} misreads the tokenizers of GGUFs")
    writer, tokens = gguf.GGUFWriter(path, "llama"), [*SIGNS, "<|end|>"]
    width, inner = 32, 64
    writer.add_context_length(512)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * len(SIGNS) + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(len(SIGNS))
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), width),
        "output": (len(tokens), width),
        "blk.0.attn_q": (width, width),
        "blk.0.attn_k": (width // 2, width),
        "blk.0.attn_v": (width // 2, width),
        "blk.0.attn_output": (width, width),
        "blk.0.ffn_gate": (inner, width),
        "blk.0.ffn_up": (inner, width),
        "blk.0.ffn_down": (width, inner),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, dtype=np.float32))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(width, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return path
