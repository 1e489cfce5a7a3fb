"""Images as token sequences.

Shapes: B batch, C channels, H W the latent grid, p patch size, N tokens.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor


def patchify(x: Tensor, patch_size: int) -> Tensor:
    """[..., C, H, W] -> [..., N, C p p]: row by row, each token by channel, patch row, patch column."""
    return rearrange(x, "... c (h p) (w q) -> ... (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, height: int) -> Tensor:
    """The inverse of ``patchify`` for a latent of ``height`` rows: [..., N, C p p] -> [..., C, H, W]."""
    return rearrange(
        tokens, "... (h w) (c p q) -> ... c (h p) (w q)", p=patch_size, q=patch_size, h=height // patch_size
    )


def split_squares(x: Tensor, side: int, patch_size: int) -> Tensor:
    """Tokens as of ``patchify``, but by squares: ``side`` x ``side`` squares row by row, and within each its
    tokens row by row: [..., C, H, W] -> [..., N, C p p].
    """
    return rearrange(
        x, "... c (i h p) (j w q) -> ... (i j h w) (c p q)", i=side, j=side, p=patch_size, q=patch_size
    )


def join_squares(tokens: Tensor, side: int, patch_size: int, height: int) -> Tensor:
    """The inverse of ``split_squares`` for a latent of ``height`` rows."""
    shape = dict(i=side, j=side, p=patch_size, q=patch_size, h=height // (side * patch_size))
    return rearrange(tokens, "... (i j h w) (c p q) -> ... c (i h p) (j w q)", **shape)


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Rows [B, K, D] of ``table`` [B, N, D] at ``places`` [B, K]."""
    return table.gather(1, across(places, table))


def across(places: Tensor, table: Tensor) -> Tensor:
    """``places`` [B, K] for all columns of ``table`` [B, N, D]: [B, K, D]."""
    return places[..., None].expand(-1, -1, table.shape[-1])


def token_similarity(features: Tensor) -> Tensor:
    """Mean cosine similarity over all pairs of an image's tokens, the diagonal included: [B, N, D] -> [B].

    The paper's feature diversity: lower means more diverse semantic features. Equal to the squared length of
    the mean unit vector, so no N x N matrix is made.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return unit.mean(dim=1).square().sum(dim=-1)
