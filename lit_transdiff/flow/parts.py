"""Tokens of parts: the noise of each, the time of each, and the parts as rows of a loss.

Shapes: B images, M noise draws, K parts, N tokens of all parts; ``sizes`` are the numbers of tokens of the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor


def noise_of_parts(normal: Callable[..., Tensor], sizes: Sequence[int], draws: int, token: Sequence[int]) -> Tensor:
    """Noise [(M B), N, *token], drawn part by part, for each the M draws one after the other."""
    numbers, drawn, end = normal(draws * sum(sizes), *token), [], 0
    for size, count in runs_of(sizes):
        start, end = end, end + draws * size * count
        drawn.append(rearrange(numbers[:, start:end], "b (k m n) ... -> (m b) (k n) ...", m=draws, n=size))
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)


def times_of_tokens(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """Times [B, K] of parts as those of their tokens, [B, N]."""
    runs = runs_of(sizes)
    pieces = t.split([count for _, count in runs], dim=1)
    return torch.cat([piece.repeat_interleave(size, dim=1) for piece, (size, _) in zip(pieces, runs, strict=True)], dim=1)


def rows_of_parts(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Tokens [B, N, ...] as parts: [(K B), size, ...] for each run of equal parts; of one token, [(K B), ...]."""
    runs = runs_of(sizes)
    pieces = x.split([size * count for size, count in runs], dim=1)
    rows = [rearrange(piece, "b (k n) ... -> (k b) n ...", n=size) for piece, (size, _) in zip(pieces, runs, strict=True)]
    return [row.squeeze(1) for row in rows]


def runs_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Successive parts of one size: the size, and how many."""
    return [(size, len(list(run))) for size, run in groupby(sizes)]
