"""Conversion between images in [-1, 1] and the uint8 pixels of a file."""

from __future__ import annotations

import torch
from torch import Tensor

from lit_transdiff.config import require


def to_bytes(images: Tensor) -> Tensor:
    """Convert images in [-1, 1], of any shape, to uint8: round(clip((x + 1) / 2 * 255, 0, 255)).

    Raises ``ValueError`` for values that are not finite.
    """
    broken = int((~torch.isfinite(images)).sum())
    allowed = "numbers in [-1, 1]; the model or its settings diverged"
    require(broken == 0, "images", f"{broken} values that are not finite", allowed)
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def from_bytes(pixels: Tensor) -> Tensor:
    """Convert uint8 pixels, of any shape, to float32 images in [-1, 1]; the inverse of ``to_bytes``."""
    return pixels.float() / 127.5 - 1
