"""Parts as tokens: their noise, their times, and their rows in a loss.

Shapes: B images, M noise draws, K parts, N tokens of all parts; ``sizes`` are the numbers of tokens per part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from einops import rearrange
from torch import Tensor


def noise_of_parts(
    normal: Callable[..., Tensor], sizes: Sequence[int], draws: int, token: Sequence[int]
) -> Tensor:
    """Noise [(M B), N, *token], generated part by part, for each part M draws in succession."""
    numbers, drawn, end = normal(draws * sum(sizes), *token), [], 0
    for size, count in runs_of(sizes):
        start, end = end, end + draws * size * count
        drawn.append(rearrange(numbers[:, start:end], "b (k m n) ... -> (m b) (k n) ...", m=draws, n=size))
    return drawn[0] if len(drawn) == 1 else torch.cat(drawn, dim=1)


def times_of_tokens(t: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat the times [B, K] of parts for their tokens: [B, N]."""
    runs = runs_of(sizes)
    pieces = t.split([count for _, count in runs], dim=1)
    tokens = [piece.repeat_interleave(size, dim=1) for piece, (size, _) in zip(pieces, runs, strict=True)]
    return torch.cat(tokens, dim=1)


def rows_of_parts(x: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Tokens [B, N, ...] as parts: [(K B), size, ...] per run of equal sizes, [(K B), ...] for size 1."""
    runs = runs_of(sizes)
    pieces = x.split([size * count for size, count in runs], dim=1)
    rows = []
    for piece, (size, _) in zip(pieces, runs, strict=True):
        rows.append(rearrange(piece, "b (k n) ... -> (k b) n ...", n=size).squeeze(1))
    return rows


def runs_of(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of successive parts of equal size: (size, count)."""
    return [(size, len(list(run))) for size, run in groupby(sizes)]
