"""What a policy is told of a prompt, to choose which blocks of keys each block of queries sees."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from sparsekv.config import SparseConfig


@dataclass(frozen=True)
class PromptChunk:
    """The newest tokens of sequences, before a layer attends to what they see. Padding is left out.

    Attributes:
        layer_idx: the layer.
        query: `[b, hq, t, d]`, in the model's dtype.
        key: `[b, hkv, n, d]`, of all tokens so far; the last t of them are the query's.
        block_size: tokens of a block, a whole number of pages. Blocks are counted from a sequence's first token,
            however its prompt is cut: the first block of queries may lack its beginning, the last its end.
        scaling: the attention's factor on dot products.
        config: the settings in force, with the layer's own budget.
    """

    layer_idx: int
    query: Tensor
    key: Tensor
    block_size: int
    scaling: float
    config: SparseConfig

    @property
    def past(self) -> int:
        """Tokens of each sequence before the query's."""
        return self.key.shape[2] - self.query.shape[2]

    @property
    def first_block(self) -> int:
        """The block of keys that the first block of queries is."""
        return self.past // self.block_size

    @property
    def num_key_blocks(self) -> int:
        """Blocks of all tokens so far."""
        return -(-self.key.shape[2] // self.block_size)

    @property
    def num_query_blocks(self) -> int:
        """Blocks that the query's tokens are in."""
        return self.num_key_blocks - self.first_block

    @property
    def num_causal_blocks(self) -> int:
        """Blocks that dense attention of one head computes: of each block of queries, those up to its own."""
        first, last = self.first_block + 1, self.num_key_blocks
        return (last * (last + 1) - first * (first - 1)) // 2
