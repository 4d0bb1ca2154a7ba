"""What tells a model from others: its class, its config, and samples of its weights."""

from __future__ import annotations

import hashlib
import json
import weakref
from typing import Any

from sparsekv.errors import CacheStateError
from sparsekv.hf import support
from sparsekv.hf.ranks import Ranks

# Of a config, what says nothing of keys and values.
_ELSEWHERE = {"transformers_version", "architectures", "use_cache", "return_dict", "dtype", "torch_dtype"}
_ELSEWHERE |= {"output_attentions", "output_hidden_states", "eos_token_id", "pad_token_id", "bos_token_id"}


def model_hash(model: Any) -> str:
    """SHA-256 over the names, shapes and a sample of every parameter's values: the same weights, the same hash,
    without reading gigabytes."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # of ranks that share it
        flat = tensor.detach().flatten()
        sample = flat[:: max(flat.numel() // 4096, 1)].float().cpu().numpy().tobytes()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample)
    return digest.hexdigest()


def fingerprint(model: Any) -> dict[str, Any]:
    """What JSON can hold of a model: `class`, `name`, `config` (of the language model) and `weights`, a hash."""
    text = support.text_config(model)
    config = json.loads(text.to_json_string(use_diff=False))
    config = {name: x for name, x in config.items() if not name.startswith("_") and name not in _ELSEWHERE}
    name = getattr(model.config, "_name_or_path", "")
    return {"class": type(model).__name__, "name": name, "config": config, "weights": model_hash(model)}


class Origin:
    """Asks a model for its fingerprint, and does not keep it alive. A copy of it asks the same model; in another
    process there is none.

    Args:
        model: None: it is not here.
    """

    def __init__(self, model: Any = None) -> None:
        self._model = (lambda: None) if model is None else weakref.ref(model)

    def __call__(self) -> dict[str, Any]:
        """The fingerprint.

        Raises:
            CacheStateError: the model is gone, or several ranks hold it, each with its part of the cache.
        """
        model = self._model()
        if model is None:
            raise CacheStateError("The model that this cache is for is not here any more, so it cannot be saved.")
        check_alone(model)
        return fingerprint(model)

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[type[Origin], tuple[()]]:
        return Origin, ()


def check_alone(model: Any) -> None:
    """Raises CacheStateError if several ranks hold a model: each has a part of every cache."""
    size = Ranks.of(model).size
    if size > 1:
        raise CacheStateError(
            f"{size} ranks hold the model, and each has its part of the cache: it is neither saved nor loaded. Run "
            "it on one GPU."
        )
