"""A cache as a file, and back: what layers hold beside pages, and which model and settings it is for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor

from sparsekv.cache.cache_layer import CacheLayer
from sparsekv.cache.handshake import attention_of
from sparsekv.cache.layer_kinds import EMPTY
from sparsekv.cache.model_check import check_digests
from sparsekv.cache.stored_layer import StoredLayer
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import CacheFileError, CacheStateError, ConfigError, SparseKVError
from sparsekv.pages import piece_writer, saved_store
from sparsekv.pages.piece_file import PieceFile
from sparsekv.pages.pieces import Progress, Source, Target
from sparsekv.pages.saved_store import DeviceOf, Facts
from sparsekv.policies import POLICIES

if TYPE_CHECKING:
    from sparsekv.cache.paged_cache import PagedCache

_OF_PAGES = ("page_size", "digest", "kv")
_OF_PROMPTS = ("policy", "budget", "dense_layers", "prefill", "prefill_mass")
_IDS = "ids"
_DAMAGED = (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, OverflowError)


def save(
    cache: PagedCache, path: str | os.PathLike[str], model: Facts, ids: Tensor | None, title: str, progress: Progress
) -> None:
    """Writes a cache whose tokens are all stored; see `PagedCache.save`.

    Args:
        model: what tells its model from others.
    """
    store = cache._store
    num_tokens, layers = store.newest.num_tokens, []
    sources: dict[str, Source] = {}
    for i, part in enumerate(cache._parts):
        of_layer, tensors = _described(i, part)
        layers.append({"kind": type(part).__name__, **of_layer})
        sources |= {f"layers.{i}.{name}": Source.of(tensor) for name, tensor in tensors.items()}
    if not num_tokens:
        raise CacheStateError("There is nothing to save: the cache holds no tokens.")
    if any(layer.is_paged and layer.length != num_tokens for layer in cache.stored_layers):
        raise CacheStateError("A forward pass was interrupted, so there is nothing whole to save.")
    pages, of_pages = saved_store.described(store)
    sources |= of_pages
    if ids is not None:
        sources[_IDS] = Source.of(_checked(ids, store.newest.batch_size, num_tokens))
    facts = {
        "title": title,
        "model": model,
        "settings": cache.config.as_dict(),
        "pages_follow_from": what_pages_follow_from(cache.config),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "num_sequences": store.newest.batch_size,
        "num_tokens": num_tokens,
        "layers": layers,
        **pages,
    }
    piece_writer.write(path, facts, sources, progress)


def _described(index: int, part: Any) -> tuple[Facts, dict[str, Tensor]]:
    if isinstance(part, CacheLayer):
        facts, tensors = part.described()
        return {"facts": facts, "tensors": list(tensors)}, tensors
    if not isinstance(part, EMPTY) and part.is_initialized:
        raise CacheStateError(
            f"Layer {index} of this cache is transformers' own {type(part).__name__}, which is not saved."
        )
    return {}, {}


def _checked(ids: Tensor, batch_size: int, num_tokens: int) -> Tensor:
    """The ids of the tokens in a cache."""
    if ids.ndim != 2 or len(ids) != batch_size or ids.shape[1] < num_tokens or ids.is_floating_point():
        raise CacheStateError(
            f"ids {tuple(ids.shape)} {ids.dtype}: the cache holds {batch_size} sequences of {num_tokens} tokens. "
            "Give what `generate` has returned, or leave ids out."
        )
    return ids[:, :num_tokens].cpu().long()


def what_pages_follow_from(config: SparseConfig) -> Facts:
    """The settings on which it depends what pages hold of a prompt: where it is read sparsely, more of them."""
    is_sparse = POLICIES.get(config.policy)().chooses_blocks(config)
    settings = config.as_dict()
    found = {name: settings[name] for name in (*_OF_PAGES, *(_OF_PROMPTS if is_sparse else ()))}
    return {**found, "prefill": settings["prefill"], "digest revision": DIGESTS.get(config.digest).revision}


# -- and back


def ids_of(file: PieceFile) -> Tensor | None:
    """The tokens that a file says it holds, `[b, n]` int64 on the CPU; None: it does not say."""
    return file.tensor(_IDS) if _IDS in file.specs else None


def restore(cache: PagedCache, file: PieceFile, model: Facts, device_of: DeviceOf, progress: Progress) -> None:
    """Fills a new cache with what a file holds.

    Args:
        model: what tells the cache's model from others.
        device_of: where a layer's tokens belong.

    Raises:
        CacheFileError: it is of another model, other settings, or not whole. CacheFullError, OutOfMemoryError: there
            is no room. The cache is of no use then.
    """
    with _believed(file):
        _check_model(file, file.facts["model"], model)
        _check_settings(file, cache.config)
        _check_layers(cache, file)
        targets = saved_store.restored(cache._store, file.facts, file, device_of)
        if file.facts["settings"] == cache.config.as_dict():
            kept = cache._store.memory.restored(file.facts["memory"])
            targets |= {name: Target.of(tensor) for name, tensor in kept.items()}
    file.fill(targets, progress)
    with _believed(file):
        for i, (part, told) in enumerate(zip(cache._parts, file.facts["layers"], strict=True)):
            if isinstance(part, CacheLayer):
                tensors = {name: file.tensor(f"layers.{i}.{name}") for name in told["tensors"]}
                part.restored(told["facts"], tensors, device_of(part.layer_idx))
        cache.ids = ids_of(file)
    cache._attention = attention_of(cache.model_config)


@contextlib.contextmanager
def _believed(file: PieceFile) -> Iterator[None]:
    """Within it a header is followed that is what was written, whoever wrote it."""
    try:
        yield
    except (SparseKVError, torch.OutOfMemoryError):
        raise
    except _DAMAGED as error:
        raise CacheFileError(f"{file.path} says what cannot be: {error!r}.") from error


def _check_model(file: PieceFile, saved: Facts, here: Facts) -> None:
    was, now = saved["config"], here["config"]
    differing = [f"{x} was {was[x]!r} and is {now[x]!r}" for x in was if x in now and was[x] != now[x]]
    if saved["class"] != here["class"]:
        differing = [f"a {saved['class']}, and this is a {here['class']}"]
    elif saved["weights"] != here["weights"]:
        differing.append("its weights are others")
    if differing:
        raise CacheFileError(f"{file.path} is of another model: {'; '.join(differing[:4])}.")


def _check_settings(file: PieceFile, config: SparseConfig) -> None:
    saved, here = file.facts["pages_follow_from"], what_pages_follow_from(config)
    differing = [
        f"{name} was {saved.get(name, 'any')!r} and is {here.get(name, 'any')!r}"
        for name in {**saved, **here}
        if saved.get(name) != here.get(name)
    ]
    if differing:
        raise CacheFileError(f"{file.path} was made with other settings: {'; '.join(differing)}.")


def _check_layers(cache: PagedCache, file: PieceFile) -> None:
    kinds = [told["kind"] for told in file.facts["layers"]]
    if kinds != [type(part).__name__ for part in cache._parts]:
        raise CacheFileError(f"{file.path} has other layers ({', '.join(dict.fromkeys(kinds))}).")
    scored: dict[int, bool] = {}
    for told in file.facts["parts"]:
        layers: Mapping[str, Facts] = told["layers"]
        _check_homes(cache, file, layers, told)
        scored |= {int(i): layer["is_scored"] for i, layer in layers.items() if told["window"] is None}
    try:
        check_digests(cache.config, cache.dense_layers, scored)
    except ConfigError as error:
        raise CacheFileError(f"{file.path}: {error}") from error


def _check_homes(cache: PagedCache, file: PieceFile, layers: Mapping[str, Facts], told: Facts) -> None:
    """Whether these layers live in pages, and hold what their table does."""
    for name in layers:
        layer, facts = cache.layers[int(name)], file.facts["layers"][int(name)]
        is_so = isinstance(layer, StoredLayer) and facts["facts"] == {"length": told["num_tokens"]}
        if not is_so or told["num_tokens"] != file.facts["num_tokens"]:
            raise CacheFileError(f"{file.path}: layer {name} does not hold what its table names.")
