"""What the ops need to know about a digest: how to summarise pages and how to score the summaries, and its kernel.

Digests live one floor up and are filed here under their name, because an op's schema can carry a name but not a
callable.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsekv.errors import ConfigError
from sparsekv.registry import Registry

MAX_TENSORS = 8  # `Digests` of cuda/common/digest.cuh


def no_words(head_dim: int, heads: int) -> int:
    """Nothing is needed."""
    return 0


@dataclass(frozen=True)
class DigestKernel:
    """How kernels keep and score a digest: a C++ type, as cuda/common/digest.cuh describes it, that is compiled into
    them.

    Attributes:
        header: the file that has the type, absolute or below `cuda/`.
        type_name: of it; `{heads}` becomes a power of two that is no less than the query heads of a kv head, nor 4.
        dtypes: of the fields and then of the state, as the header reads them; None: the keys'. Tensors of other
            dtypes are served in plain torch.
        staged: `(head_dim, heads)` -> words of 16 bytes that the queries of so many heads, a number as above, take
            when they are staged to be scored: the type's `Scorer::STAGED`, which the compiler holds against it.
        room: `(head_dim, heads)` -> words of 16 bytes of shared memory that a warp needs for itself when it scores:
            `Scorer::ROOM`.
        tolerance: relative error of a score that is no fault; of two pages so near to each other, the kernel may
            choose another than the reference.
        of_latents: whether it is for keys of `instances.LATENT_DIMS` channels, too.

    Raises:
        ConfigError: more than eight tensors.
    """

    header: str | Path
    type_name: str
    dtypes: tuple[torch.dtype | None, ...]
    staged: Callable[[int, int], int]
    room: Callable[[int, int], int] = no_words
    tolerance: float = 1e-4
    of_latents: bool = False

    def __post_init__(self) -> None:
        if len(self.dtypes) > MAX_TENSORS:
            raise ConfigError(
                f"A digest's kernel takes up to {MAX_TENSORS} tensors; {self.type_name} has {len(self.dtypes)}."
            )

    def serves(self, tensors: Sequence[Tensor], like: Tensor) -> bool:
        """Whether these are its fields and state, in its layout."""
        expected = [dtype or like.dtype for dtype in self.dtypes]
        return [x.dtype for x in tensors] == expected and all(x.is_contiguous() for x in tensors)


class Formula(ABC):
    """The two functions of a digest, in plain torch. Stateless: what they need lies in the tensors handed to them.

    Attributes:
        kernel: what does the same on a GPU; None: plain torch does.
    """

    kernel: DigestKernel | None = None

    @abstractmethod
    def summarize(self, keys: Tensor, valid: Tensor, state: Sequence[Tensor]) -> list[Tensor]:
        """Summaries of m pages.

        Args:
            keys: `[m, hkv, p, d]`, in the model's dtype.
            valid: `[m, p]` bool. Every page has at least one valid token; what lies in the others is arbitrary, NaN
                included.
            state: the digest's fixed tensors, `[hkv, ...]`.

        Returns:
            A tensor `[m, hkv, *shape]` for every field; stored in the field's dtype, whatever dtype it has here.
        """

    @abstractmethod
    def score(self, query: Tensor, summary: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
        """A score per query head and page, on the scale of logits.

        The heads of a group are pooled, so their scores must be comparable: what is added to all pages of one head
        moves that head against the others.

        Args:
            query: `[b, hkv, g, d]` float32, times the attention's scaling: its product with a key is a logit.
            summary: a tensor `[b, pages, hkv, *shape]` for every field, in its dtype.
            state: the digest's fixed tensors, `[hkv, ...]`.

        Returns:
            `[b, hkv, g, pages]` float32.
        """

    def why_unlike(
        self, summary: Sequence[Tensor], expected: Sequence[Tensor], page_size: int, head_dim: int
    ) -> str | None:
        """What is wrong with fields that a kernel has made, beside the same ones of the reference; None: nothing.

        Bit for bit, unless a digest allows for sums in another order. NaN is like NaN.
        """
        for i, (mine, theirs) in enumerate(zip(summary, expected, strict=True)):
            if not torch.equal(mine.nan_to_num(nan=12345.0), theirs.nan_to_num(nan=12345.0)):
                return f"field {i} differs"
        return None


FORMULAS: Registry[Formula] = Registry("digest")


def formula(name: str) -> Formula:
    """The formula of a digest; raises UnknownNameError."""
    return FORMULAS.get(name)()


def kernel_of(name: str) -> DigestKernel | None:
    """How kernels keep and score a digest, or None if none do; raises UnknownNameError."""
    return FORMULAS.get(name).kernel


def with_kernels() -> list[str]:
    """The digests that kernels keep and score."""
    return [name for name in FORMULAS if kernel_of(name) is not None]
