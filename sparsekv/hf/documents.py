"""Documents that are read once: a prompt in a cache, for many questions, in this process or from a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparsekv.cache import PagedCache, saving
from sparsekv.errors import CacheFileError, ConfigError
from sparsekv.hf import support
from sparsekv.hf.chunks import CHUNK, without_single
from sparsekv.hf.fingerprint import check_alone, fingerprint
from sparsekv.pages.piece_file import PieceFile
from sparsekv.pages.pieces import Progress

if TYPE_CHECKING:
    from sparsekv.hf.patch import Patch


class Prefix:
    """A document that many questions begin with, read once.

    Attributes:
        ids: `[1, n]` int64 on the CPU, its tokens.
        cache: holds them. It stays as it is: questions go on in forks of it.
    """

    def __init__(self, ids: Tensor, cache: PagedCache, device: torch.device, tokenizer: Any = None) -> None:
        self.ids, self.cache, self._device, self._tokenizer = ids, cache, device, tokenizer

    def fork(self, n: int = 1) -> PagedCache:
        """A cache of `n` sequences that begin with the document, whose pages all share."""
        twin = self.cache.fork()
        if n > 1:
            twin.batch_repeat_interleave(n)
        return twin

    def inputs(self, questions: Sequence[str | Sequence[int]]) -> dict[str, Any]:
        """What `generate` is given to continue the document with each of the questions: `input_ids` and
        `attention_mask` `[questions, n]`, on the model's device, and a cache. Shorter questions have padding before
        them, behind the document.

        Raises:
            ConfigError: there are none, one is empty, or text is given and no tokenizer.
        """
        rows = [_in_one_row(_ids_of(question, self._tokenizer, False))[0] for question in questions]
        if not rows or not all(len(row) for row in rows):
            raise ConfigError("Give at least one question, and none that has no tokens.")
        longest = max(map(len, rows))
        asked, real = (
            torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in some])
            for some in (rows, [torch.ones_like(row) for row in rows])
        )
        ids = torch.cat([self.ids.expand(len(rows), -1), asked], 1).to(self._device)
        mask = torch.cat([torch.ones_like(ids[:, : self.ids.shape[1]]), real.to(self._device)], 1)
        return {"input_ids": ids, "attention_mask": mask, support.CACHE: self.fork(len(rows))}


def prefix(
    patch: Patch,
    document: str | Sequence[int] | Tensor,
    tokenizer: Any = None,
    reserve_tokens: int = 0,
    progress: Progress = lambda num_tokens: None,
) -> Prefix:
    """Reads a document; see `Patch.prefix`."""
    ids = _in_one_row(_ids_of(document, tokenizer, True))
    if not ids.shape[1]:
        raise ConfigError("A document must have at least one token.")
    cache = patch.new_cache(reserve_tokens=ids.shape[1] + reserve_tokens)
    read(patch, ids, cache, progress=progress)
    return Prefix(ids, cache, patch.model.device, tokenizer)


def read(
    patch: Patch, ids: Tensor, cache: PagedCache, chunk: int = CHUNK, progress: Progress = lambda num_tokens: None
) -> None:
    """Reads tokens into an empty cache, a chunk at a time.

    Args:
        ids: `[b, n]`, which the cache is told.
        progress: called with the number of tokens of each chunk.
    """
    step, model = without_single(chunk, ids.shape[1]), patch.model
    with patch.decoder.around_prompt(ids.numel()):
        for part in ids.split(step, 1):
            with torch.inference_mode():
                model(input_ids=part.to(model.device), use_cache=True, logits_to_keep=1, **{support.CACHE: cache})
            progress(part.shape[1])
    cache.ids = ids.cpu()


def _ids_of(text_or_ids: Any, tokenizer: Any, with_specials: bool) -> Any:
    if not isinstance(text_or_ids, str):
        return text_or_ids
    if tokenizer is None:
        raise ConfigError("Text needs a tokenizer: patch.prefix(text, tokenizer), or give ids.")
    return tokenizer(text_or_ids, add_special_tokens=with_specials).input_ids


def load(
    patch: Patch,
    path: str | os.PathLike[str],
    prompt_ids: Tensor | None,
    reserve_tokens: int,
    progress: Progress,
) -> PagedCache:
    """A cache from a file; see `Patch.load`."""
    check_alone(patch.model)
    file = PieceFile(path)
    shared = None if prompt_ids is None else _shared(file, prompt_ids)
    cache = patch.new_cache(reserve_tokens)
    saving.restore(cache, file, fingerprint(patch.model), _Devices(patch.model), progress)
    if prompt_ids is not None and shared is not None:
        past = int(cache.get_seq_length())
        if shared < past:
            cache.crop(shared - past)
        if cache.ids is not None and len(cache.ids) < len(prompt_ids):
            cache.batch_repeat_interleave(len(prompt_ids))
    return cache


def _shared(file: PieceFile, prompt_ids: Tensor) -> int:
    """How many columns of a saved cache a prompt `[b, n]` begins with. Its last token is read anew: it has to say
    what comes next."""
    saved = saving.ids_of(file)
    if saved is None:
        raise CacheFileError(f"{file.path} was saved without its tokens, so it cannot be compared with a prompt.")
    prompt = prompt_ids.cpu()
    if prompt.ndim != 2 or len(saved) not in (1, len(prompt)) or prompt.shape[1] < 2:
        raise CacheFileError(
            f"{file.path} has {len(saved)} sequences, and the prompt {tuple(prompt.shape)}: both must have the same "
            "number, or the file one, and a prompt at least two tokens."
        )
    most = min(saved.shape[1], prompt.shape[1] - 1)
    is_same = (saved[:, :most] == prompt[:, :most]).all(0)
    shared = int(is_same.long().cumprod(0).sum())
    if not shared:
        raise CacheFileError(f"{file.path} holds no tokens that the prompt begins with.")
    return shared


class _Devices:
    """Where the tokens of each layer belong: where the layer is."""

    def __init__(self, model: Any) -> None:
        self._layers = getattr(support.decoder_of(model), "layers", None)
        self._default = model.device

    def __call__(self, layer_idx: int) -> torch.device:
        """The device of a layer's first weight, or the model's."""
        layer = self._layers[layer_idx] if self._layers is not None and layer_idx < len(self._layers) else None
        first = None if layer is None else next(layer.parameters(), None)
        found: torch.device = self._default if first is None else first.device
        return found


def _in_one_row(ids: Any) -> Tensor:
    """`[1, n]`, on the CPU."""
    return torch.as_tensor(ids, dtype=torch.int64, device="cpu").reshape(1, -1)
