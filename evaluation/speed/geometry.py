"""Sizes of one attention layer, which is timed alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig

from sparsekv.cache import heads_of
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed  # noqa: F401  (which has a name among models)
from sparsekv.hf.models import pretrained

from .known_models import MODELS


@dataclass(frozen=True)
class Geometry:
    """One attention layer of a model: query heads, kv heads, head size, and whether it has sink logits.

    Attributes:
        dtype: in which the layer is timed.
    """

    name: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype = torch.bfloat16
    sinks: bool = False

    @property
    def group(self) -> int:
        """Query heads that share a kv head."""
        return self.num_q_heads // self.num_kv_heads

    @classmethod
    def of(cls, model: str) -> Geometry:
        """The layers of a model on the hub or in a folder, whose config alone is read.

        Raises:
            ConfigError: there is no such model, or its config does not tell the heads.
        """
        try:
            return cls._of_config(model, pretrained(AutoConfig, model))
        except ConfigError as error:
            raise ConfigError(f"{error} A --geometry ({', '.join(NAMES)}) will do.") from error

    @classmethod
    def _of_config(cls, model: str, config: Any) -> Geometry:
        text, heads = config.get_text_config(decoder=True), heads_of(config)
        if heads is None or getattr(text, "kv_lora_rank", None):
            raise ConfigError(f"{model}: its config does not tell the keys and values of every layer.")
        sizes = heads.num_q_heads, heads.num_kv_heads, heads.head_dim
        return cls(model, *sizes, sinks=text.model_type == "gpt_oss")

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


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("gpt-oss", 64, 8, 64, sinks=True),
        Geometry("gemma", 16, 8, 256),
        Geometry("mha", 32, 32, 128, torch.float16),
    )
}


NAMES = (*MODELS, *GEOMETRIES)  # that `named` knows


def named(name: str) -> Geometry:
    """The geometry of this name, or the layers of a known model.

    Raises:
        UnknownNameError: there is none.
        ConfigError: the model's layers are of no such geometry.
    """
    if name not in NAMES:
        raise UnknownNameError("--geometry", name, NAMES)
    return GEOMETRIES[name] if name in GEOMETRIES else Geometry._of_config(name, MODELS[name].make())
