"""The model whose `generate` is timed: from the hub, from a folder, or random weights in the sizes of a known one."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    StaticCache,
)

from sparsekv import POLICIES, SparseConfig
from sparsekv.cache import heads_of
from sparsekv.digests import DIGESTS
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed  # noqa: F401  (which has a name among models)
from sparsekv.hf import parallel
from sparsekv.hf.models import pretrained
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import context_of
from sparsekv.pages import FORMATS

from .known_models import MODELS

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


class Subject:
    """A model to be timed: its config first, so that it can be checked before the weights are loaded.

    Args:
        model: id on the hub or folder; None: random weights in the sizes of `geometry`.
        geometry: the name of a known model.
        dtype: of the weights.

    Attributes:
        sizes: whose they are, and what is left out, of a known model; None: the model's own.
        ranks: the processes that hold the model together, if they were started to.

    Raises:
        ConfigError: there is no such geometry, or no such model.
    """

    def __init__(self, model: str | None, geometry: str, dtype: torch.dtype = torch.float32) -> None:
        self.source, self.name, self.dtype = model, model or geometry, dtype
        if model is None and geometry not in MODELS:
            raise UnknownNameError("--geometry", geometry, MODELS)
        self.config = MODELS[geometry].make() if model is None else pretrained(AutoConfig, model)
        self.sizes = MODELS[geometry].source if model is None else None
        self.model: Any = None
        self.ranks = Ranks.of_launch()
        self._divided = parallel.divided(self.config)

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
        allowed = context_of(self.config)
        needed = context + (0 if getattr(self.text, "rope_parameters", None) else new_tokens)
        if allowed is not None and needed > allowed:
            raise ConfigError(
                f"{self.name} takes {allowed:,} tokens, and {needed:,} are asked for: choose other --points."
            )

    def load(self, device: torch.device) -> None:
        """Makes or loads the weights. What a checkpoint asks of `generate` (sampling, ends) is left out: everything
        is greedy, and nothing ends early."""
        torch.manual_seed(0)
        if self._divided and self.source is None:  # what no weights are given for is drawn, by each rank its part
            factory: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
            self.model = factory.from_pretrained(
                None, config=self.config, state_dict={}, dtype=self.dtype, **self._divided
            )
        elif self.source is None:
            with torch.device(device):
                self.model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype)
        elif self._divided:
            self.model = pretrained(AutoModelForCausalLM, self.source, dtype=self.dtype, **self._divided)
        else:
            self.model = pretrained(AutoModelForCausalLM, self.source, dtype=self.dtype).to(device)
        self.model.eval()
        self.model.generation_config = GenerationConfig(pad_token_id=0)

    @property
    def why_not_static(self) -> str | None:
        """Why there is no static cache of this model; None: there is."""
        if self._divided:
            return "not measured (what is compiled in each rank by itself may not go together)"
        try:
            StaticCache(config=self.text, max_cache_len=1)
        except Exception as error:  # whatever transformers raises for a kind of layer that has none
            return f"not measured (transformers makes no static cache for it: {error!r})"
        return None

    def cache_bytes(self, num_tokens: int, config: SparseConfig | None) -> int | None:
        """Bytes of this rank's keys and values of so many tokens, and of the digests that a patch with `config` keeps
        (None: unpatched); None where the layers are not all alike."""
        text, heads = self.text, heads_of(self.config)
        types = set(getattr(text, "layer_types", None) or ["full_attention"])
        if heads is None or types != {"full_attention"} or getattr(text, "kv_lora_rank", None):
            return None
        num_layers, pages = int(text.num_hidden_layers), config or SparseConfig()
        num_kv_heads = heads.num_kv_heads // (self.ranks.size if parallel.divides_heads(self.config) else 1)
        kind = FORMATS.get(pages.page_format)()
        record, dtype = kind.mean_record(pages.page_size, heads.head_dim, self.model.dtype, heads.num_halves)
        pairs = heads.num_halves * num_kv_heads * record * dtype.itemsize * num_layers * num_tokens
        if config is None or POLICIES.get(config.policy).reads_all:
            return pairs
        fields = DIGESTS.get(config.digest)().fields(config.page_size, heads.head_dim)
        digest = sum(math.prod(f.shape) * (f.dtype or self.model.dtype).itemsize for f in fields)
        scored = (num_layers - len(config.dense_among(range(num_layers)))) * config.pages_for(num_tokens)
        return pairs + scored * num_kv_heads * digest

    @property
    def weight_bytes(self) -> int:
        """Of this rank's part."""
        return sum(_nbytes(p) for p in self.model.parameters())

    def step_bytes(self, batch: int) -> int | None:
        """Bytes of weights that a step of so many sequences reads: not the embedding, of which it reads rows, nor
        experts without a token, which are few in a large batch: tokens are supposed to go to all alike. None where
        it is not known which weights are experts'."""
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        is_tied = head is not None and head.weight is embedding.weight
        read = self.weight_bytes - (0 if is_tied else _nbytes(embedding.weight))
        num_experts = next(filter(None, (getattr(self.text, name, None) for name in _EXPERTS)), None)
        if num_experts is None:
            return read
        expert_bytes = sum(_nbytes(p) for p in self.model.parameters() if p.ndim == 3 and len(p) == num_experts)
        chosen = getattr(self.text, "num_experts_per_tok", None)
        if not expert_bytes or not chosen:
            return None
        return read - int(expert_bytes * (1 - chosen / num_experts) ** batch)


def _nbytes(weight: Any) -> int:
    """Of this rank's part."""
    local = weight.to_local() if hasattr(weight, "to_local") else weight
    return int(local.nbytes)
