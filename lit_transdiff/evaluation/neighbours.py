"""Scores of nearest neighbours: precision, recall, density, coverage, and memorised images.

Shapes: N points, M rows of a manifold, D features. A row's ball reaches to its k-th nearest other row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_transdiff.config import require

DISTANCES = 1 << 26  # the most distances in memory at a time
EXACT = 1 << 31  # up to so many differences of numbers, distances are exact; else by inner products


def distances(points: Tensor, others: Tensor, chunk: int | None = None) -> Iterator[Tensor]:
    """The distances [B, M] of chunks of ``points`` [N, D] to ``others`` [M, D], in float64.

    Those of small sets are sums of squared differences, so that copies have a distance of 0 and ties are
    ties. Those of large sets, a hundred times as fast, have errors of 1e-8 of the largest feature.
    """
    small = len(points) * len(others) * others.shape[1] <= EXACT
    mode = "donot_use_mm_for_euclid_dist" if small else "use_mm_for_euclid_dist"
    others, centre = others.double(), others.double().mean(dim=0)
    if not small:  # centring preserves distances and reduces cancellation
        others = others - centre
    for rows in points.split(chunk or max(1, DISTANCES // len(others))):
        rows = rows.double() if small else rows.double() - centre
        yield torch.cdist(rows, others, compute_mode=mode)


def radii(manifold: Tensor, neighbours: int, chunk: int | None = None) -> Tensor:
    """The distance [M] of each row to its ``neighbours``-th nearest other row."""
    require(
        len(manifold) > neighbours,
        "evaluation.num_neighbours",
        neighbours,
        f"fewer than the {len(manifold)} images of a set",
    )
    found = [part.kthvalue(neighbours + 1).values for part in distances(manifold, manifold, chunk)]
    return torch.cat(found)


def covered(points: Tensor, manifold: Tensor, neighbours: int, chunk: int | None = None) -> float:
    """The fraction of ``points`` [N, D] inside or on a ball around any row of ``manifold`` [M, D]."""
    reach = radii(manifold, neighbours, chunk)
    inside = [(part <= reach).any(dim=1) for part in distances(points, manifold, chunk)]
    return float(torch.cat(inside).double().mean())


def density_of(points: Tensor, manifold: Tensor, neighbours: int) -> float:
    """The mean number of balls around a point, relative to k (arXiv 2002.09797)."""
    reach = radii(manifold, neighbours)
    counts = [(part < reach).sum(dim=1) for part in distances(points, manifold)]
    return float(torch.cat(counts).double().mean()) / neighbours


def is_reached(points: Tensor, manifold: Tensor, neighbours: int) -> Tensor:
    """Whether each ball [M] around a row of ``manifold`` has a point inside (coverage, arXiv 2002.09797)."""
    return nearest(manifold, points)[0] < radii(manifold, neighbours)


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The distance [N] of each point to the nearest of ``others``, and its place there."""
    found = [part.min(dim=1) for part in distances(points, others)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def is_authentic(points: Tensor, training: Tensor) -> Tensor:
    """Whether each point [N] is further from its nearest training image than that is from its own nearest.

    Their fraction is AuthPct (arXiv 2102.08921); copies of training images are not authentic.
    """
    away, place = nearest(points, training)
    return away > radii(training, 1)[place]
