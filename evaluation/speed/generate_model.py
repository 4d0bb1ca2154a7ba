"""The model whose `generate` is timed: from the hub, from a folder, or random weights in the sizes of a known one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, LlamaConfig, Qwen3Config

from sparsekv import POLICIES, SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation.models import pretrained
from sparsekv.hf.support import context_of

MOST_POSITIONS = 1 << 20


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_theta": theta, "rope_type": "default"}


def _llama_8b() -> Any:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128, vocab_size=128256, max_position_embeddings=MOST_POSITIONS,
        rope_parameters=_rope(500000.0),
    )  # fmt: skip


def _qwen_32b() -> Any:
    return Qwen3Config(
        hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=MOST_POSITIONS,
        rope_parameters=_rope(1000000.0),
    )  # fmt: skip


def _tiny() -> Any:
    return LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=64, vocab_size=512, max_position_embeddings=MOST_POSITIONS,
        rope_parameters=_rope(500000.0),
    )  # fmt: skip


GEOMETRIES: dict[str, Callable[[], Any]] = {"llama-3.1-8b": _llama_8b, "qwen3-32b": _qwen_32b, "tiny": _tiny}

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Subject:
    """A model to be timed: its config first, so that it can be checked before the weights are loaded.

    Args:
        model: id on the hub or folder; None: random weights in the sizes of `geometry`.
        geometry: a name in `GEOMETRIES`.
        dtype: of the weights.

    Raises:
        ConfigError: there is no such geometry, or no such model.
    """

    def __init__(self, model: str | None, geometry: str, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.name, self.dtype = model, model or geometry, dtype
        if model is None and geometry not in GEOMETRIES:
            raise UnknownNameError("--geometry", geometry, GEOMETRIES)
        self.config = GEOMETRIES[geometry]() if model is None else pretrained(AutoConfig, model)
        self.model: Any = None

    @property
    def text(self) -> Any:
        """The config of the language model."""
        return self.config.get_text_config(decoder=True)

    def check(self, context: int, new_tokens: int) -> None:
        """Whether the model takes so many tokens. Rotary positions go on past their nominal end, which matters to
        what is said and not to how long it takes: they are held to the context alone.

        Raises:
            ConfigError: it does not.
        """
        most = context_of(self.config)
        needed = context + (0 if getattr(self.text, "rope_parameters", None) else new_tokens)
        if most is not None and needed > most:
            raise ConfigError(
                f"{self.name} takes {most:,} tokens, and {needed:,} are asked for: choose other --points."
            )

    def load(self, device: torch.device) -> None:
        """Makes or loads the weights. What a checkpoint asks of `generate` (sampling, ends) is left out: everything
        is greedy, and nothing ends early."""
        if self.source is None:
            torch.manual_seed(0)
            with torch.device(device):
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        else:
            self.model = pretrained(AutoModelForCausalLM, self.source, dtype=self.dtype).to(device)
        self.model.eval()
        self.model.generation_config = GenerationConfig(pad_token_id=0)

    def cache_bytes(self, num_tokens: int, config: SparseConfig | None) -> int | None:
        """Bytes of the keys and values of so many tokens, and of the digests that a patch with `config` keeps (None:
        unpatched); None where the layers are not all alike."""
        try:
            text = self.text
            if set(getattr(text, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
                return None
            head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
            num_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
            num_layers = int(text.num_hidden_layers)
        except (
            AttributeError,
            RuntimeError,
            TypeError,
        ):  # transformers refuses what differs per layer; lists do, too
            return None
        pairs = 2 * num_heads * head_dim * self.model.dtype.itemsize * num_layers * num_tokens  # keys and values
        if config is None or POLICIES.get(config.policy).reads_all:
            return int(pairs)
        fields = DIGESTS.get(config.digest)().fields(config.page_size, head_dim)
        digest = sum(math.prod(f.shape) * (f.dtype or self.model.dtype).itemsize for f in fields)
        pages = (num_layers - len(config.dense_among(range(num_layers)))) * config.pages_for(num_tokens)
        return int(pairs + pages * num_heads * digest)

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self.model.parameters())

    @property
    def step_bytes(self) -> int | None:
        """Bytes of weights that a step reads: all but the embedding, of which it reads rows; None with experts."""
        if any(getattr(self.text, name, None) for name in _EXPERTS):
            return None
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        is_tied = head is not None and head.weight is embedding.weight
        return self.weight_bytes - (0 if is_tied else embedding.weight.nbytes)
