"""The loss of a batch for every family of models: parts of images at times of their process.

Shapes: B images (rows), R references per row, M noise draws, K parts, N tokens of all parts, C H W a latent.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor

from lit_transdiff.base.randomness import Normal
from lit_transdiff.flow.parts import noise_of_parts, rows_of_parts, times_of_tokens
from lit_transdiff.flow.process import Process
from lit_transdiff.models.paradigm import Paradigm


def losses_of(
    model: Paradigm, process: Process, conditions: Tensor, drop: Tensor, x: Tensor, normal: Normal, draws: int
) -> tuple[Tensor, Tensor]:
    """The loss of every part and its noise level, both [K M B]; the mean is the loss of the batch.

    Images ``x`` [B, R, C, H, W] have labels [B] or other ``conditions``, replaced by the null class where
    ``drop`` [B]. The memory of an image is computed once; all its ``draws`` of noise and time pass the
    network together.
    """
    sizes = model.part_sizes
    t = rearrange(process.times(normal(len(sizes), draws)), "b k m -> (m b) k")
    noise = noise_of_parts(normal, sizes, draws, model.token)
    memory = model.condition(conditions, drop, x, normal)
    tokens = repeat(model.parts(x), "b n ... -> (m b) n ...", m=draws)
    each = times_of_tokens(t, sizes)
    x_t = process.noised(tokens.flatten(0, 1), noise.flatten(0, 1), each.flatten()).view_as(noise)
    output = model.predict(x_t, t, memory)
    pieces = zip(*(rows_of_parts(z, sizes) for z in (output, tokens, noise, x_t, each)), strict=True)
    losses = torch.cat(
        [process.losses(o, x, e, at.reshape(len(at), -1)[:, 0], x_t) for o, x, e, x_t, at in pieces]
    )
    weights = model.weights(memory)
    if weights is not None:
        losses = losses * balanced(weights, draws * len(x), len(sizes))
    return losses, process.share(rearrange(t, "b k -> (k b)"))


def balanced(weights: Tensor, rows: int, parts: int) -> Tensor:
    """Expand weights [K], [B, K] or [(M B), K] to those of losses, [K M B], with mean 1."""
    shares = weights.float() if weights.ndim == 2 else weights.float()[None]
    whole = rearrange(shares.repeat(rows // len(shares), 1), "b k -> (k b)", k=parts)
    return whole / whole.mean()
