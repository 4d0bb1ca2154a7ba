"""Sizes of known models: of one attention layer, which is timed alone, and of some the rest, too."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from sparsekv.cache import heads_of
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed  # noqa: F401  (which has a name among models)
from sparsekv.hf.models import pretrained

MAX_POSITIONS = 1 << 20


@dataclass(frozen=True)
class Geometry:
    """One attention layer of a model: query heads, kv heads, head size, and whether it has sink logits.

    Attributes:
        dtype: in which the layer is timed.
        model: makes the config of a whole model of such layers; None: only the layer is known.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False
    model: Callable[..., Any] | None = None

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def config(self) -> Any:
        """Of a whole model; None where only the layer is known."""
        return self.model and self.model(
            num_attention_heads=self.num_q_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=MAX_POSITIONS,
        )

    @classmethod
    def of(cls, model: str) -> Geometry:
        """The layers of a model on the hub or in a folder, whose config alone is read.

        Raises:
            ConfigError: there is no such model, or its config does not tell the heads.
        """
        others = f"A --geometry ({', '.join(GEOMETRIES)}) will do."
        try:
            heads = heads_of(pretrained(AutoConfig, model))
        except ConfigError as error:
            raise ConfigError(f"{error} {others}") from error
        if heads is None:
            raise ConfigError(f"--model {model}: its config does not tell the heads of every layer. {others}")
        return cls(model, heads.num_q_heads, heads.num_kv_heads, heads.head_dim)

    @classmethod
    def of_heads(cls, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Geometry:
        """A layer with these heads.

        Raises:
            ConfigError: kv heads cannot be shared evenly by the query heads.
        """
        if num_q_heads % num_kv_heads:
            raise ConfigError(
                f"--q-heads={num_q_heads} must be a multiple of --kv-heads={num_kv_heads}: every kv head "
                "serves as many query heads."
            )
        return cls(f"{num_q_heads}/{num_kv_heads} heads of {head_dim}", num_q_heads, num_kv_heads, head_dim)


def _model(family: type, hidden: int, inner: int, layers: int, vocabulary: int, theta: float) -> Callable[..., Any]:
    rope = {"rope_theta": theta, "rope_type": "default"}
    return partial(
        family, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=vocabulary,
        rope_parameters=rope,
    )  # fmt: skip


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("llama-3.1-8b", 32, 8, 128, model=_model(LlamaConfig, 4096, 14336, 32, 128256, 5e5)),
        Geometry("qwen3-32b", 64, 8, 128, model=_model(Qwen3Config, 5120, 25600, 64, 151936, 1e6)),
        Geometry("gpt-oss", 64, 8, 64, sinks=True),
        Geometry("gemma", 16, 8, 256),
        Geometry("mha", 32, 32, 128, torch.float16),
        Geometry("tiny", 2, 1, 64, model=_model(LlamaConfig, 128, 256, 4, 512, 5e5)),
    )
}


def named(name: str, known: Collection[str] = GEOMETRIES) -> Geometry:
    """The geometry of this name.

    Raises:
        UnknownNameError: there is none among the known ones.
    """
    if name not in known:
        raise UnknownNameError("--geometry", name, known)
    return GEOMETRIES[name]
