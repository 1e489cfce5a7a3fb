"""Conditions: conversion of a row's class label (or another condition) to vectors for the encoder.

Shapes: B rows, D width, K class tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


def class_label(config: ModelConfig) -> nn.Module:
    """An embedding table: labels [B] -> [B, D]."""
    return nn.Embedding(config.num_classes, config.width)


# An entry makes a module that gives vectors [B, D], which stand in all class tokens, or tokens [B, K, D] in
# their place. One that takes no labels has the shape of a row of what it takes as ``condition_shape``.
CONDITIONS: dict[str, Callable[[ModelConfig], nn.Module]] = {"class": class_label}
