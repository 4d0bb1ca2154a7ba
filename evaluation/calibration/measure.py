"""Measures settings on documents: each prefilled once, then decoded by every setting from the same pages.

Both turns of a document are rows of one decode, token by token through the patched model: what a setting reads here
is what it reads in `generate`. Another digest is made from the keys that are in pages already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sparsekv import POLICIES, PagedCache, Patch, SparseConfig
from sparsekv.cache import AttentionLayer, BesideState, CacheLayer
from sparsekv.cache.gradients import untracked_copy
from sparsekv.errors import SparseKVError
from sparsekv.evaluation.accuracy.asking import PromptTurn, Row, decode, prefill, stepper
from sparsekv.evaluation.accuracy.counters import Counters
from sparsekv.evaluation.tasks import Metric
from sparsekv.policies import Reads

from .documents import Piece

Nats = tuple[float, float]  # per token, natural and recall
_FREE_ELSEWHERE = 16 << 30  # bytes, supposed where memory is not the device's own


class Measurer:
    """A patched model and the documents that it is to be measured on.

    Args:
        at_once: documents that are prefilled and decoded side by side.
    """

    def __init__(self, patch: Patch, pieces: Sequence[Piece], at_once: int) -> None:
        self.patch, self.pieces, self.at_once = patch, pieces, min(at_once, len(pieces))
        device = patch.model.device
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _FREE_ELSEWHERE
        self._room = free // 4  # the pages in use, and what they are made of, have the rest
        self._held: dict[tuple[object, ...], PagedCache] = {}

    def nats(self, config: SparseConfig, numbers: Sequence[int]) -> list[Nats]:
        """How unlikely the scored tokens of documents are to a setting.

        Raises:
            SparseKVError: the model's logits are not finite, or a layer did not do what the setting says.
        """
        numbers = tuple(numbers)
        rows = [
            Row([turn], Metric.PERPLEXITY, frozenset())
            for n in numbers
            for turn in (self.pieces[n].natural, self.pieces[n].recall)
        ]
        fork = self._prefilled(numbers, config)
        fork.batch_select_indices(torch.arange(len(numbers)).repeat_interleave(2))
        counters = Counters(fork)
        length = len(self.pieces[numbers[0]].document)
        mask = torch.ones(len(rows), length, dtype=torch.long, device=self.patch.model.device)
        num_steps = decode(stepper(self.patch, rows[0].longest), fork, rows, mask)
        wrong = counters.error(num_steps, length)
        if wrong is None and not all(row.is_finite for row in rows):
            wrong = "the model gave logits that are not finite (NaN or infinite)"
        if wrong is not None:
            raise SparseKVError(f"{config.digest}, budget {config.budget}: {wrong}.")
        means = [row.nll / row.num_scored for row in rows]
        return list(zip(means[::2], means[1::2], strict=True))

    def bytes_per_token(self, config: SparseConfig, numbers: Sequence[int]) -> float:
        """What a token reads of the cache, counted in one step of the first of some documents."""
        fork = self._prefilled(tuple(numbers), config)
        fork.batch_select_indices([0])
        counters = Counters(fork)
        piece = self.pieces[numbers[0]]
        row = Row([PromptTurn(piece.natural.prompt[:1], piece.natural.reference[:1])], Metric.PERPLEXITY, frozenset())
        mask = torch.ones(1, len(piece.document), dtype=torch.long, device=self.patch.model.device)
        num_steps = decode(self.patch.model, fork, [row], mask)
        bytes_per_token: float = counters.counts(num_steps, 1)["bytes_per_token"]
        return bytes_per_token

    def density(self, config: SparseConfig, numbers: Sequence[int]) -> float:
        """The share of its blocks that is computed of a prompt, in some documents; 1 where all are dense."""
        self._prefilled(tuple(numbers), config)
        return self._held[_prompts(tuple(numbers), config)].stats.prefill.density

    def _prefilled(self, numbers: tuple[int, ...], config: SparseConfig) -> PagedCache:
        """A cache of the documents that decodes by a setting."""
        prompts = _prompts(numbers, config)
        cache = self._held.pop(prompts, None)
        if cache is None:
            while self._held and sum(x.nbytes for x in self._held.values()) * (1 + 1 / len(self._held)) > self._room:
                self._held.popitem()  # the last: documents are gone through in turn, so it is needed last
            cache = PagedCache(self.patch.model.config, config.with_(policy=SparseConfig.policy))
            prefill(self.patch.model, [self.pieces[n].document for n in numbers], cache)
        elif POLICIES.get(config.policy).reads is not Reads.DIGESTS:
            config = config.with_(digest=cache.config.digest)
        elif cache.config.digest != config.digest:
            cache = _with_digest(cache, config)
        self._held[prompts] = cache
        return cache.fork(config)


def _prompts(numbers: tuple[int, ...], config: SparseConfig) -> tuple[object, ...]:
    """What settings that share prefilled documents have in common."""
    return numbers, config.prefill, config.prefill_mass


@torch.inference_mode()
def _with_digest(cache: PagedCache, config: SparseConfig) -> PagedCache:
    """A cache of the same tokens, without padding, whose digests are others."""
    twin = PagedCache(cache.model_config, config)
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, CacheLayer):
            twin.layers[i] = untracked_copy(layer)
        elif isinstance(layer, AttentionLayer) and layer.is_served:
            twin.update(*layer.content(), i)
            twin.layers[i].commit(None)
        else:
            layer.fork(twin.layers[i])
        if isinstance(layer, BesideState):
            layer.state.fork(twin.layers[i].state)
    return twin
