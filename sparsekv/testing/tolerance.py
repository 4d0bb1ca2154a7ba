"""How wrong a result may be: measured against float64, in units of the error plain torch makes in the same dtype.

An absolute tolerance has to be guessed anew for every shape and dtype, and it grows until the tests pass. This bound
cannot: what it allows is what the straightforward implementation costs on the same inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekv.testing.naive import listed_positions
from sparsekv.testing.pages import Pages


def assert_as_good_as(actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 2.0) -> None:
    """The largest error of `actual` against `exact` is at most `factor` times that of `plain`, plus one rounding.

    Args:
        actual: the result; its dtype says what one rounding is.
        plain: the same in plain torch, in the same dtype.
        exact: the same in float64. Where it is infinite, `actual` must be the same infinity.
    """
    finite = exact.isfinite()
    actual, plain = actual.cpu(), plain.cpu()
    assert torch.equal(actual[~finite].double(), exact[~finite]), "infinities differ"
    assert bool(actual[finite].isfinite().all()), "not finite where the exact result is"
    if not bool(finite.any()):
        return
    target = exact[finite]
    error = float((actual[finite].double() - target).abs().max())
    plain_error = float((plain[finite].double() - target).abs().max())
    rounding = torch.finfo(actual.dtype).eps * float(target.abs().max())
    assert error <= factor * plain_error + rounding, (
        f"error {error:.3g} against float64; plain torch in {plain.dtype} makes {plain_error:.3g}, "
        f"one rounding is {rounding:.3g}"
    )


def plain_attention(
    query: Tensor,
    pages: Pages,
    slots: Tensor | None,
    scaling: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    first: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the listed pages in a few lines of torch, in the query's dtype: output and log-sum-exp."""
    b, hq, _ = query.shape
    group = hq // pages.kv_pool.shape[2]
    out, lse = torch.zeros_like(query), query.new_full((b, hq), float("-inf"))
    for row in range(b):
        keys, values = pages.tokens(row)
        for head in range(hq):
            positions = listed_positions(pages, None if slots is None else slots[row, head // group], row)
            positions = [i for i in positions if first is None or i >= int(first[row])]
            logits = keys[positions, head // group] @ query[row, head] * scaling
            logits = softcap * torch.tanh(logits / softcap) if softcap else logits
            full = logits if sinks is None else torch.cat([logits, sinks[head, None].to(logits.dtype)])
            if len(full):
                lse[row, head] = full.logsumexp(0)
                out[row, head] = full.softmax(0)[: len(logits)] @ values[positions, head // group]
    return out, lse
