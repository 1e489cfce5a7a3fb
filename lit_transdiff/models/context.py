"""The context of images to be drawn, made group by group; earlier groups are not computed again.

Shapes: B images, U distinct classes among them, L tokens per reference, D width, C H W a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from lit_transdiff.models.decoder import Memory
from lit_transdiff.models.layers import KeysValues

if TYPE_CHECKING:
    from lit_transdiff.models.transdiff import TransDiff

Beginning = tuple[Tensor, list[KeysValues]]  # see ARTransformer.begin


class Contexts(Protocol):
    """A source of the context of images to be drawn, piece by piece (see ``ContextStream``)."""

    def advance(self, images: Tensor) -> Tensor: ...


# model, labels [B], or other conditions -> their contexts
ContextFn = Callable[["TransDiff", Tensor], Contexts]


class ContextStream:
    """Successive groups of context for ``labels`` [B] (None: the null class), each seeing earlier images.

    The first group depends on the class alone, so it is made once a class; a single one is given as one row
    that stands for all.
    """

    def __init__(
        self, model: TransDiff, labels: Tensor | None, begin: Callable[[], Beginning] | None = None
    ) -> None:
        """``begin`` gives the beginning when it is known."""
        self.model = model
        self.groups = 0
        self.row_of: Tensor | None = None  # [B], which of the classes
        self.classes: Tensor = model.encoder.null_class  # U D
        if labels is not None:
            distinct, self.row_of = labels.unique(return_inverse=True, dim=0)
            self.classes = model.encoder.class_vectors(distinct)
        self.begin = begin or partial(model.encoder.begin, self.classes)

    def advance(self, images: Tensor) -> Tensor:
        """The new context tokens [B or 1, n L, D], given all ``images`` [B, r, C, H, W] so far.

        Calls follow each other with r = 0, 1, 2, ... or with steps between left out.
        """
        encoder, parts = self.model.encoder, []
        while self.groups <= images.shape[1]:
            if self.groups == 0:
                features, past = self.begin()
                features, self.past = self.spread(features), [replace(block) for block in past]
            else:
                if self.groups == 1:
                    self.spread_past(len(images))
                features, self.past = encoder.extend(self.past, images[:, self.groups - 1])
            start = self.groups * encoder.tokens_per_reference
            parts.append(features + encoder.context_position[:, start : start + features.shape[1]])
            self.groups += 1
        rows = max(len(part) for part in parts)
        return torch.cat([part.expand(rows, -1, -1) for part in parts], dim=1)

    def spread(self, features: Tensor) -> Tensor:
        """Rows [U, L, D] of classes -> of images, unless one stands for all."""
        return features if len(features) == 1 or self.row_of is None else features[self.row_of]

    def spread_past(self, rows: int) -> None:
        """``spread`` the keys and values: from now on every image has its own."""
        row_of = self.row_of
        if row_of is None:
            row_of = torch.zeros(rows, dtype=torch.long, device=self.classes.device)
        for block in self.past:
            block.take(row_of)


def null_contexts(model: TransDiff) -> Callable[[], ContextStream]:
    """Streams of the null class, whose beginning, the same for all images, is computed once."""
    begin = cache(partial(model.encoder.begin, model.encoder.null_class))
    return lambda: ContextStream(model, None, begin)


class Remembered:
    """The decoder's memory of a context that grows: keys and values of its earlier tokens are kept."""

    def __init__(self, model: TransDiff, contexts: Contexts) -> None:
        self.model, self.contexts = model, contexts
        self.memory: Memory | None = None

    def after(self, images: Tensor) -> Memory:
        """The memory of the image after ``images`` [B, r, C, H, W]; to be asked for with a growing r."""
        new = self.contexts.advance(images)
        self.memory = self.model.memory(new) if self.memory is None else self.model.longer(self.memory, new)
        return self.memory
