"""A model in another form than transformers' own, and the program that puts committed figures into the README."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

SIGNS = [*(chr(i) for i in range(ord("!"), ord("~") + 1)), "ab"]


@pytest.fixture(scope="session")
def readme() -> ModuleType:
    """`tools/readme.py`."""
    spec = importlib.util.spec_from_file_location("readme_figures", Path(__file__).parents[2] / "tools" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    """A llama of one layer with random weights, and a tokenizer of hardly more than letters."""
    path = tmp_path / "tiny.gguf"
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra: pip install '.[gguf]' in the clone")
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
