"""Pages that lie in a dict on the host, as a user would write it: this class."""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.pages.page_pool import PageIds
from sparsekv.pages.residency import Residency


class InDict(Residency):
    """A page is fetched whenever it is read.

    Attributes:
        fetched: the pages that were read, in order.
    """

    def __init__(self, pool: Tensor) -> None:
        super().__init__(pool)
        self.pages: dict[int, Tensor] = {}
        self.fetched: list[int] = []

    def read(self, pages: PageIds) -> Tensor:
        self.fetched += pages.tolist()
        never_written = torch.empty(self.pool.shape[1:], dtype=self.pool.dtype, device="cpu")
        found = [self.pages.get(page, never_written) for page in pages.tolist()]
        return torch.stack(found).to(self.pool.device) if found else self.pool

    def write(self, pages: PageIds, content: Tensor) -> None:
        self.pages.update(zip(pages.tolist(), content.cpu().clone(), strict=True))

    @property
    def nbytes(self) -> int:
        return sum(page.nbytes for page in self.pages.values())
