"""A decode step of `generate` as one launch: captured, compared with an eager one, replayed."""

from sparsekv.hf.capture.decoder import CapturedDecoder, Run

__all__ = ["CapturedDecoder", "Run"]
