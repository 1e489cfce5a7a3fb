"""The sliced Wasserstein distance: MIND (arXiv 2605.06797), and ratios of it (arXiv 2607.02375).

Shapes: N rows and M rows of two sets, D numbers per row, U directions, K groups. All sums are in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.evaluation.groups import number_of_groups

DIRECTIONS, SEED = 1000, 2020  # the values of torch-fidelity for sets of one size
PROJECTIONS = 1 << 17  # projections at a time: few enough for a processor's cache
OfSorted = Callable[[np.ndarray], np.ndarray]  # sorted rows [u, n] -> their squared distances [u]


@cache
def directions(size: int, count: int = DIRECTIONS) -> Tensor:
    """Random unit vectors [U, D]. All scores use the same ones, so their error cancels in differences."""
    drawn = torch.randn(count, size, generator=torch.Generator().manual_seed(SEED)).double()
    return drawn / drawn.norm(dim=1, keepdim=True)


def mind_values(x: Tensor, y: Tensor, group: Tensor | None = None, units: Tensor | None = None) -> Tensor:
    """3 D times the mean over directions of the squared Wasserstein distance of the projections.

    The result [1 + K] has the value of all rows of ``x`` [N, D], and those without each ``group`` [N] of
    them. The sets may have different sizes: the integral over quantiles is exact.
    """
    x, y = x.double(), y.double()
    centre = y.mean(dim=0)  # a common shift changes no distance
    x, y = x - centre, y - centre
    units = (directions(x.shape[1]) if units is None else units.double()).to(x.device)
    members = np.zeros(len(x), dtype=np.int16) if group is None else group.cpu().numpy().astype(np.int16)
    count = 0 if group is None or not group.any() else number_of_groups(group)
    found = np.zeros(1 + count)
    for part in units.split(max(1, PROJECTIONS // (len(x) + len(y)))):
        found += sums_of_gaps((part @ x.T).cpu().numpy(), (part @ y.T).cpu().numpy(), members, count)
    return torch.from_numpy(3 * x.shape[1] / len(units) * found)


def sums_of_gaps(x: np.ndarray, y: np.ndarray, group: np.ndarray, count: int) -> np.ndarray:
    """The sums [1 + K] over directions of squared distances of projections [u, N] and [u, M].

    It sorts in numpy, which is several times as fast as torch.
    """
    order = x.argsort(axis=1)
    x, group, gap = np.take_along_axis(x, order, axis=1), group[order], gap_from(np.sort(y, axis=1))
    without = (x[group != g].reshape(len(x), -1) for g in range(count))
    return np.array([gap(rows).sum() for rows in (x, *without)])


def gap_from(y: np.ndarray) -> OfSorted:
    """The function that gives the squared Wasserstein distances [u] of sorted rows [u, n] from ``y`` [u, M].

    It is the integral of the squared difference of two quantile functions. Over the step of a value of x,
    this is the square of its difference from the mean of y there, and the variance of y there, which does not
    depend on x. Both are computed once for each n.
    """
    known: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def gap(x: np.ndarray) -> np.ndarray:
        count = x.shape[1]
        if count not in known:
            known[count] = means_of_steps(y, count)
        means, variance = known[count]
        return np.square(x - means).mean(axis=1) + variance

    return gap


def means_of_steps(y: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The means [u, n] of y's quantile functions on equal steps, and the mean variance [u] in a step."""
    size = y.shape[1]
    if size == count:
        return y, np.zeros(len(y))
    place, rest = np.divmod(np.arange(count + 1) * size, count)  # where a step ends
    before = np.pad(y.cumsum(axis=1), ((0, 0), (1, 0)))[:, place]
    integral = before + rest / count * y[:, place.clip(max=size - 1)]
    means = np.diff(integral, axis=1) * (count / size)
    return means, (np.square(y).mean(axis=1) - np.square(means).mean(axis=1)).clip(min=0)
