"""The sliced Wasserstein distance: MIND (arXiv 2605.06797), and ratios of it (arXiv 2607.02375).

Shapes: N rows and M rows of two sets, D numbers per row, U directions, K groups. All sums are in float64.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from lit_transdiff.evaluation.groups import number_of_groups

DIRECTIONS, SEED = 1000, 2020  # those of torch-fidelity for sets of one size
PROJECTIONS = 1 << 24  # projections in memory at a time


@cache
def directions(size: int, count: int = DIRECTIONS, seed: int = SEED) -> Tensor:
    """Random unit vectors [U, D]. All scores use the same ones, so their error cancels in differences."""
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(seed)).double()
    return drawn / drawn.norm(dim=1, keepdim=True)


def mind_values(x: Tensor, y: Tensor, group: Tensor | None = None, units: Tensor | None = None) -> Tensor:
    """3 D times the mean over directions of the squared Wasserstein distance of the projections.

    The result [1 + K] has the value of all rows of ``x`` [N, D], and those without each ``group`` [N] of
    them. The sets may have different sizes: the integral over quantiles is exact.
    """
    x, y = x.double(), y.double()
    group = torch.zeros(len(x), dtype=torch.long) if group is None else group
    units = (directions(x.shape[1]) if units is None else units.double()).to(x.device)
    count = number_of_groups(group) if group.any() else 0
    found = torch.zeros(1 + count, dtype=torch.float64, device=x.device)
    for part in units.split(max(1, PROJECTIONS // (len(x) + len(y)))):
        found += sums_of_gaps(part @ x.T, part @ y.T, group.to(x.device), count)
    return (3 * x.shape[1] / len(units) * found).cpu()


def sums_of_gaps(x: Tensor, y: Tensor, group: Tensor, count: int) -> Tensor:
    """The sums [1 + K] over directions of squared distances of projections [u, N] and [u, M]."""
    y = y.sort(dim=1).values
    x, order = x.sort(dim=1)
    found = [squared_gap(x, y).sum()]
    group = group[order]
    for g in range(count):
        found.append(squared_gap(x[group != g].view(len(x), -1), y).sum())
    return torch.stack(found)


def squared_gap(x: Tensor, y: Tensor) -> Tensor:
    """The squared Wasserstein distance [u] of sorted rows [u, n] and [u, m]: the integral of the squared
    difference of their quantiles.
    """
    if x.shape[1] == y.shape[1]:
        return (x - y).square().mean(dim=1)
    i, j, share = quantile_steps(x.shape[1], y.shape[1])
    return (x[:, i.to(x.device)] - y[:, j.to(x.device)]).square() @ share.to(x.device)


@cache
def quantile_steps(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """The steps of two quantile functions of n and m values: the value of each, and the step's length."""
    ends = torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n]).unique()
    lengths = torch.diff(ends, prepend=torch.zeros(1, dtype=ends.dtype))
    return (ends - 1) // m, (ends - 1) // n, lengths.double() / (n * m)
