"""What each decode step reads, what it would have read with other budgets, and where dense attention looks.

It reads every key to know, as the evaluation's probes do.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count

import torch
from torch import Tensor

from sparsekv.config import SparseConfig
from sparsekv.errors import ConfigError
from sparsekv.ops.reference import listed
from sparsekv.policies import POLICIES, DecodeStep
from sparsekv.policies.oracle import exact_logits

READ = 128  # is added to the level of a page that was read
NO_LEVEL = 127  # of a page that no budget reads
OCTAVES = 24  # a mass below 2**-24 counts as none


@dataclass(frozen=True)
class Reading:
    """What one layer read at one step, on the CPU; n pages, and L budgets.

    Attributes:
        pages: `[hkv, 2, n]` uint8. First the level: the least of the budgets that reads the page, as its place among
            them (NO_LEVEL if none does), plus READ if the page was read. Then the share m of dense attention that is
            in the page, as `255 * (1 + log2(m) / OCTAVES)`; 0 for pages that no budget would have room for if it
            went by these shares.
        shares: `[hkv, L + 1, 2]` float32: the share of dense attention in the pages that each budget reads, and last
            in those that were read; and the share that as many pages could hold at most.
    """

    pages: Tensor
    shares: Tensor


class Recorder:
    """An observer of a cache of one sequence.

    Args:
        budgets: the other budgets, ascending: at most 127, in tokens.
        layers: those to record.

    Attributes:
        steps: by the tokens in the cache, what each layer read.
    """

    def __init__(self, budgets: Sequence[int], layers: frozenset[int]) -> None:
        self.budgets, self._layers = budgets, layers
        self.steps: dict[int, dict[int, Reading]] = {}

    def __call__(self, step: DecodeStep, slots: Tensor | None) -> None:
        seen = self.steps.setdefault(int(step.seq_lens[0]), {})
        if step.layer_idx in self._layers and step.layer_idx not in seen:  # its keys may serve other layers, too
            seen[step.layer_idx] = self._reading(step, slots)

    def _reading(self, step: DecodeStep, slots: Tensor | None) -> Reading:
        num_pages = step.config.pages_for(int(step.seq_lens[0]))
        mass = _mass(step)[:, :num_pages]
        others = [_would_read(step, budget) for budget in self.budgets]
        read = torch.stack([*others, _mask(step, slots)])[..., :num_pages]  # [L + 1, hkv, n]
        level = torch.arange(len(others), device=mass.device)[:, None, None].expand(-1, *mass.shape)
        least = level.masked_fill(~read[:-1], NO_LEVEL).amin(0)
        best = mass.sort(descending=True).values  # [hkv, n]
        most = best.cumsum(-1).expand(len(read), -1, -1).gather(2, read.sum(-1, keepdim=True) - 1)[..., 0]
        least_mass = best[:, min(self.budgets[-1] // step.config.page_size, num_pages) - 1, None]
        coded = (255 * (1 + mass.log2() / OCTAVES)).clamp_min(0).round().masked_fill(mass < least_mass, 0)
        pages = torch.stack([least + READ * read[-1], coded], 1).to(torch.uint8)
        shares = torch.stack([(read * mass).sum(-1), most], -1).transpose(0, 1)
        return Reading(pages.cpu(), shares.cpu())


def budgets_up_to(config: SparseConfig, num_tokens: int) -> list[int]:
    """Budgets in tokens that settings allow, two for each doubling, up to a context and four times what is set: more
    would make a page too large. There is at least one."""
    most = min(num_tokens, 4 * config.page_size * max(own.budget_pages(num_tokens) for own in config.each))
    found: list[int] = []
    for num_pages in (start << octave for octave in count() for start in (2, 3)):
        tokens = num_pages * config.page_size
        if found and tokens > most:
            break
        with contextlib.suppress(ConfigError):  # less than what is always read
            config.with_(budget=tokens)
            found.append(tokens)
    return found


def _mass(step: DecodeStep) -> Tensor:
    """The share of dense attention that each page has, `[hkv, max_pages]` float32: the mean over query heads."""
    logits = exact_logits(step)[0]  # [hkv, g, pages, p]
    return logits.flatten(2).softmax(-1).view_as(logits).sum(-1).mean(1)


def _would_read(step: DecodeStep, budget: int) -> Tensor:
    """What the policy chooses with another budget, asked once more; what it remembers stays."""
    config = step.config.with_(budget=budget)
    asked = replace(
        step,
        config=config,
        k=config.selection_width(step.block_table.shape[1]),
        is_covered=False,
        key=None,
        value=None,
        memory=[remembered.clone() for remembered in step.memory],
    )
    return _mask(step, None if asked.fits else POLICIES.get(config.policy)().select(asked))


def _mask(step: DecodeStep, slots: Tensor | None) -> Tensor:
    """Which pages are listed, `[hkv, max_pages]` bool; None lists all."""
    num_heads, num_pages = step.kv_pool.shape[2], step.block_table.shape[1]
    if slots is None:
        return torch.ones(num_heads, num_pages, dtype=torch.bool, device=step.query.device)
    return listed(slots, num_pages)[0]
