"""Two bits per channel of every key: the sketch of `sign_sketch` with half of its error.

Let x be what is left of a rotated key after its page's mean m. A channel of it is kept as one of the whole numbers
-3, -1, 1 and 3, its code c, and q.k is estimated as by signs: <Rq, m> + f <Rq, c> with f = |x|^2 / <c, x>. Source:
Gao et al., "Practical and Asymptotically Optimal Quantization of High-Dimensional Vectors in Euclidean Space for
Approximate Nearest Neighbor Search" (SIGMOD 2025). They search for the code that is nearest to x in direction. Here a
channel is large, 3 and not 1, above the token's root mean square; the best threshold of equal steps for normal
numbers is .996 of it: Max, "Quantizing for Minimum Distortion" (IRE Trans. Inf. Theory 1960). On the keys of SmolLM2
and Gemma 3 a search found no better pages.
"""

from __future__ import annotations

from sparsekv.digests.base import register
from sparsekv.digests.sign_sketch import SignSketch, sketch_kernel


@register("sketch2")
class Sketch2(SignSketch):
    """Per token d / 4 bytes of bits and a half-precision factor; the rest as `SignSketch` keeps it: 40 bytes."""

    bits = 2
    revision = 2  # 1 had another order of bits, and queries up to 40
    kernel = sketch_kernel(bits)
