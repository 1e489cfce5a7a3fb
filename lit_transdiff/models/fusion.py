"""Semantic fusion: context spliced from the features of two classes (arXiv 2506.09482, section 4.4).

Shapes: B images, S context tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import unknown
from lit_transdiff.models.context import ContextFn, ContextStream


def fused(second: Tensor, pattern: Tensor) -> ContextFn:
    """Contexts that take the tokens where ``pattern`` [S] is true from the labels ``second`` [B]."""
    return lambda model, labels: FusedContexts(
        ContextStream(model, labels), ContextStream(model, second), pattern
    )


@dataclass
class FusedContexts:
    """Two streams of context tokens, and a pattern that selects one for each token."""

    first: ContextStream
    second: ContextStream
    pattern: Tensor  # [S] boolean; true: from the second
    done: int = 0  # tokens

    def advance(self, images: Tensor) -> Tensor:
        """Advance both streams as ``ContextStream.advance`` does, and mix their contexts."""
        first, second = self.first.advance(images), self.second.advance(images)
        start, self.done = self.done, self.done + first.shape[1]
        return torch.where(self.pattern[start : self.done, None].to(first.device), second, first)


def fusion_pattern(num_tokens: int, kind: str, seed: int = 0) -> Tensor:
    """Mask [S] of the context tokens from the second class: a random half, or the second half."""
    if kind == "random":
        generator = torch.Generator().manual_seed(mix("fusion", seed))
        return torch.rand(num_tokens, generator=generator).argsort() < num_tokens // 2
    if kind == "halves":
        return torch.arange(num_tokens) >= num_tokens // 2
    raise unknown("fusion", kind, ("random", "halves"))
