"""`supports`: what patching a model would do, told from its config alone."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sparsekv.cache import places
from sparsekv.config import SparseConfig
from sparsekv.errors import UnsupportedModelError
from sparsekv.hf import support
from sparsekv.hf.capture.decoder import CapturedDecoder

_VERDICTS = {"sparse": "every layer sparse", "some": "some layers sparse", "dense": "every layer dense"}


@dataclass(frozen=True)
class LayerSupport:
    """Layers of one kind that decode alike.

    Attributes:
        layer_type: transformers' word for them: "full_attention", "sliding_attention", ...
        count: how many there are.
        decodes: "sparse", in pages and by the policy; "dense", which is transformers' own way where `reason` does not
            say "in pages" or "in place"; or "refused", as the whole model is.
        reason: why, in the words of `print(patch)`.
        is_asked_for: whether they are dense only because the settings say so (`dense_layers`, a budget of 1.0).
    """

    layer_type: str
    count: int
    decodes: Literal["sparse", "dense", "refused"]
    reason: str
    is_asked_for: bool = False

    def __str__(self) -> str:
        told = "" if self.decodes == "refused" else f" ({self.reason})"
        return f"{self.count} {self.layer_type}: {self.decodes}{told}"


@dataclass(frozen=True)
class Support:
    """What patching a model would do; printable.

    Attributes:
        model: its class; of a model that hands `generate` on to one within, that one's.
        model_type: transformers' name of the type.
        layers: each kind of its layers and how they decode, in the order in which they come.
        refusal: why it cannot be patched; None: it can.
        why_eager: why its decode steps are not captured on a GPU; None: they are, unless the forward waits for the
            device, which only a run tells.
    """

    model: str
    model_type: str
    layers: tuple[LayerSupport, ...]
    refusal: str | None
    why_eager: str | None

    @property
    def verdict(self) -> Literal["sparse", "some", "dense", "refused"]:
        """How it decodes on the whole. Layers that are dense because the settings say so count as sparse."""
        if self.refusal is not None:
            return "refused"
        sparse = [layers.decodes == "sparse" or layers.is_asked_for for layers in self.layers]
        return "sparse" if all(sparse) else "some" if any(sparse) else "dense"

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"verdict": self.verdict, **asdict(self)}

    def __str__(self) -> str:
        told = _VERDICTS.get(self.verdict, f"refused: {self.refusal}")
        lines = [f"{self.model} ({self.model_type}): {told}", *(f"  {layers}" for layers in self.layers)]
        if self.refusal is None:
            eager = "CUDA graphs" if self.why_eager is None else f"eager ({self.why_eager})"
            lines.append(f"  decode loop of generate on a GPU: {eager}")
        return "\n".join(lines)


def supports(
    model_or_config: PreTrainedModel | PretrainedConfig, config: SparseConfig | None = None, **settings: Any
) -> Support:
    """What `patch` would do with a model: how each kind of its layers would decode, whether the decode steps would be
    captured on a GPU, and why not. Nothing is changed.

    >>> from transformers import Gemma3TextConfig
    >>> print(supports(Gemma3TextConfig(num_hidden_layers=12), dense_layers=0))
    Gemma3ForCausalLM (gemma3_text): some layers sparse
      10 sliding_attention: dense (sliding window of 4096, in pages)
      2 full_attention: sparse (top_k over sign_sketch digests)
      decode loop of generate on a GPU: CUDA graphs

    Args:
        model_or_config: a model; or its config, which says as much: the model is then built without weights.
        config, settings: as for `patch`.

    Raises:
        ConfigError, UnknownNameError: a setting is not allowed, or not for this model.
        UnsupportedModelError: it is neither, or no model can be built from the config, so that nothing can be said.
    """
    settled = SparseConfig.of(config, **settings)
    is_config = isinstance(model_or_config, PretrainedConfig)
    model = support.generating(without_weights(model_or_config) if is_config else model_or_config)
    refusal = support.reason_to_refuse(model) if isinstance(model, PreTrainedModel) else None
    if refusal is not None:
        return Support(*_names(model), _refused_layers(model.config, refusal), refusal, "it is not patched")
    settled, layers = support.examine(model, settled)
    why_eager = CapturedDecoder(model, settled, layers).why_eager(torch.device("cuda"))
    return Support(*_names(model), _grouped(model.config, layers), None, why_eager)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model that a config is of, on the meta device."""
    factory: Any = AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForMultimodalLM
    try:
        with torch.device("meta"):
            model: PreTrainedModel = factory.from_config(copy.deepcopy(config))
    except Exception as error:  # whatever a model's code has against what the config says or leaves out
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnsupportedModelError(
            f"No model that generates can be built from a {type(config).__name__} as this one ({why}). Give the "
            "config of a checkpoint, or the model itself."
        ) from error
    return model


def _names(model: PreTrainedModel) -> tuple[str, str]:
    return type(model).__name__, model.config.model_type


def _grouped(model_config: PretrainedConfig, layers: list[support.LayerStatus]) -> tuple[LayerSupport, ...]:
    counts = Counter(
        (place.layer_type, status.is_sparse, status.reason, status.is_asked_for)
        for place, status in zip(places(model_config), layers, strict=True)
    )
    return tuple(
        LayerSupport(layer_type, count, "sparse" if is_sparse else "dense", reason, is_asked_for)
        for (layer_type, is_sparse, reason, is_asked_for), count in counts.items()
    )


def _refused_layers(model_config: PretrainedConfig, refusal: str) -> tuple[LayerSupport, ...]:
    types: Counter[str] = Counter()
    with contextlib.suppress(AttributeError):  # not every config of such a model says which layers it has
        types.update(place.layer_type for place in places(model_config))
    return tuple(LayerSupport(layer_type, count, "refused", refusal) for layer_type, count in types.items())
