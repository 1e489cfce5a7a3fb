"""What an image is drawn of: how the condition of a row, a class label today, becomes vectors of the encoder.

Shapes: B rows, D width, K class tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


def class_label(config: ModelConfig) -> nn.Module:
    """Labels [B] -> [B, D], a row of a table each."""
    return nn.Embedding(config.num_classes, config.width)


# An entry makes a module that gives vectors [B, D], which stand in all class tokens, or tokens [B, K, D] in their place. One that
# takes no labels has the shape of a row of what it takes as ``condition_shape``.
CONDITIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {"class": class_label}
