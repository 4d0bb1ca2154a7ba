"""Waiting for a device, where something is timed."""

from __future__ import annotations

import torch


def synchronize(device: torch.device) -> None:
    """Waits until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
