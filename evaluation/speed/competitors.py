"""What a user could run instead of sparsekv on a GPU: dense attention, or sparse attention from parts off the shelf.

None of them appends the new token, and sink logits are left out, which favours them. FlashInfer is optional: it
compiles its kernels at first use, with nvcc.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekv.pages.formats import Plain

from .attention_inputs import Inputs

WORKSPACE_BYTES = 256 << 20
TENSOR_CORES_FROM_GROUP = 4  # FlashInfer's faster decode from so many query heads per kv head on


class Unavailable(Exception):
    """A competitor that cannot take part, and why: caught where competitors are run."""


class Competitor(ABC):
    """Attention of the query over the cache."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs

    @abstractmethod
    def __call__(self, layer: int) -> Tensor:
        """Output `[b, hq, d]` of one layer."""

    def slots(self, layer: int) -> Tensor | None:
        """The pages `[b, hkv, k]` int32 that it attends to; None: all."""
        return None


class Sdpa(Competitor):
    """PyTorch's scaled_dot_product_attention, whatever kernel it picks, over contiguous keys and values."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        self.caches = [inputs.contiguous(i) for i in range(len(inputs.layers))]

    def __call__(self, layer: int) -> Tensor:
        query = self.inputs.layers[layer].query[:, :, None]
        return F.scaled_dot_product_attention(query, *self.caches[layer], enable_gqa=True)[:, :, 0]


def _flashinfer_decode(inputs: Inputs, num_pages: int, indices: Tensor, per_head: bool, last_page_len: int) -> Any:
    """FlashInfer's paged decode, planned: one request per sequence, or per sequence and kv head.

    Args:
        num_pages: of each request; indices: `[requests * num_pages]` int32, on the device, which is kept, not copied:
            writing to it changes what the next run reads.
    """
    try:
        import flashinfer
    except ModuleNotFoundError as error:
        missing = "" if error.name == "flashinfer" else f" completely: {error}"
        raise Unavailable(f"flashinfer is not installed{missing}") from error
    point, geometry = inputs.point, inputs.point.geometry
    if not isinstance(point.format, Plain):
        raise Unavailable(f"it reads plain pages, not {point.config.page_format}")
    requests = point.batch * (geometry.num_kv_heads if per_head else 1)
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=indices.device)
    decode = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "HND", use_tensor_cores=geometry.group >= TENSOR_CORES_FROM_GROUP
    )
    decode.plan(
        torch.arange(requests + 1, dtype=torch.int32) * num_pages,
        indices,
        torch.full((requests,), last_page_len, dtype=torch.int32),
        geometry.group if per_head else geometry.num_q_heads,
        1 if per_head else geometry.num_kv_heads,
        geometry.head_dim,
        point.config.page_size,
        q_data_type=geometry.dtype,
        kv_data_type=geometry.dtype,
        sm_scale=point.scaling,
    )
    return decode


class FlashInferDense(Competitor):
    """FlashInfer's paged decode over the very pages that sparsekv reads."""

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        point = inputs.point
        last = (point.context - 1) % point.config.page_size + 1
        self.decode = _flashinfer_decode(inputs, point.num_pages, inputs.block_table.flatten(), False, last)

    def __call__(self, layer: int) -> Tensor:
        step = self.inputs.layers[layer]
        out: Tensor = self.decode.run(step.query, step.kv_pool)
        return out


class Shelf(Competitor):
    """Quest's policy from parts off the shelf: a matrix product, torch.topk, and FlashInfer on the pages chosen.

    FlashInfer chooses pages per request, so every kv head of a sequence is a request of its own. No page is forced.
    """

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        point = inputs.point
        if (point.config.policy, point.config.digest) != ("top_k", "minmax"):
            raise Unavailable(f"it is Quest's policy, not {point.config.policy} over {point.config.digest}")
        if point.fits:
            raise Unavailable("the budget holds the whole context: nothing to choose")
        if point.context % point.config.page_size:
            raise Unavailable("FlashInfer wants the partly filled page last, which torch.topk does not know")
        heads = point.geometry.num_kv_heads
        head = torch.arange(heads, dtype=torch.int32, device=inputs.block_table.device)
        self.rows = inputs.block_table[:, None] * (2 * heads) + head[:, None]  # [b, hkv, pages]: one head's keys
        self.indices = self.rows[:, :, : point.k].contiguous()
        self.digests = [layer.summary[0][inputs.block_table].transpose(1, 2).flatten(3) for layer in inputs.layers]
        self.digests = [digests.contiguous() for digests in self.digests]  # [b, hkv, pages, 2 d], as Quest keeps them
        last = point.config.page_size
        self.decode = _flashinfer_decode(inputs, point.k, self.indices.view(-1), True, last)

    def __call__(self, layer: int) -> Tensor:
        step, geometry = self.inputs.layers[layer], self.inputs.point.geometry
        torch.gather(self.rows, 2, self._best(layer), out=self.indices)
        a_head = step.kv_pool.view(-1, 1, *step.kv_pool.shape[3:])  # pages of one kv head
        heads = geometry.num_kv_heads
        query = step.query.view(-1, geometry.group, geometry.head_dim)
        out: Tensor = self.decode.run(query, (a_head[:-heads], a_head[heads:]))  # a page's values follow its keys
        return out.view_as(step.query)

    def slots(self, layer: int) -> Tensor:
        return self._best(layer).sort(-1).values.int()

    def _best(self, layer: int) -> Tensor:
        query = self.inputs.layers[layer].query.unflatten(1, (-1, self.inputs.point.geometry.group))
        signed = torch.cat([query.clamp_max(0), query.clamp_min(0)], dim=-1)  # [b, hkv, g, 2 d]
        scores = (signed @ self.digests[layer].transpose(-1, -2)).amax(2)
        return scores.topk(self.inputs.point.k, dim=-1, sorted=False).indices


COMPETITORS: dict[str, type[Competitor]] = {"flashinfer": FlashInferDense, "sdpa": Sdpa, "shelf": Shelf}
DENSE_COMPETITORS = ("flashinfer", "sdpa")
