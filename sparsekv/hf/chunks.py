"""How many tokens of a prompt go through a model at once. Whoever reads a prompt in chunks asks here."""

from __future__ import annotations

CHUNK = 16_384  # tokens of a prompt, over the batch, that go through the model at once
WHOLE = 2 * CHUNK  # up to here a prompt goes in one piece
MIN_CHUNK = 1024  # tokens of each sequence, however many there are


def chunk_size(batch_size: int, num_new: int, expands: bool = False) -> int | None:
    """Tokens of each sequence to prefill at once; None: all.

    Args:
        expands: whether every chunk expands anew all that comes before it, as latents want it: then chunks are fewer.
    """
    size = max((WHOLE if expands else CHUNK) // batch_size, MIN_CHUNK)
    if batch_size * num_new <= WHOLE or num_new <= size:
        return None
    return without_single(size, num_new)


def without_single(size: int, num_new: int) -> int:
    """The size of chunks, or a little more: the last one is never a single token, which would look like a decode
    step."""
    while 1 < size < num_new and num_new % size == 1:
        size += 16
    return size
