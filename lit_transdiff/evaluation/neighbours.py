"""Scores of nearest neighbours: precision, recall, density, coverage, and memorised images.

Shapes: N points, M rows of a manifold, D features. A row's ball reaches to its k-th nearest other row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from lit_transdiff.config import require

DISTANCES = 1 << 26  # the most distances in memory at a time
EXACT = 1 << 29  # up to so many differences of numbers, distances are exact; else by inner products


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


class Manifold:
    """Points [M, D] with balls around them, whose radii are computed once for each number of neighbours."""

    def __init__(self, points: Tensor) -> None:
        self.points = points
        self.known: dict[int, Tensor] = {}

    def radii(self, neighbours: int, chunk: int | None = None) -> Tensor:
        """The distance [M] of each point to its ``neighbours``-th nearest other one."""
        allowed = f"fewer than the {len(self.points)} images of a set"
        require(len(self.points) > neighbours, "evaluation.num_neighbours", neighbours, allowed)
        if neighbours not in self.known:
            parts = distances(self.points, self.points, chunk)
            nearest_ones = [part.topk(neighbours + 1, largest=False).values[:, -1] for part in parts]
            self.known[neighbours] = torch.cat(nearest_ones)
        return self.known[neighbours]


def covered(points: Tensor, manifold: Manifold, neighbours: int, chunk: int | None = None) -> float:
    """The fraction of ``points`` [N, D] inside or on a ball around any point of ``manifold``."""
    reach = manifold.radii(neighbours, chunk)
    inside = [(part <= reach).any(dim=1) for part in distances(points, manifold.points, chunk)]
    return float(torch.cat(inside).double().mean())


def density_of(points: Tensor, manifold: Manifold, neighbours: int) -> float:
    """The mean number of balls around a point, relative to k (arXiv 2002.09797)."""
    reach = manifold.radii(neighbours)
    counts = [(part < reach).sum(dim=1) for part in distances(points, manifold.points)]
    return float(torch.cat(counts).double().mean()) / neighbours


def is_reached(points: Tensor, manifold: Manifold, neighbours: int) -> Tensor:
    """Whether each ball [M] of ``manifold`` has one of ``points`` inside (coverage, arXiv 2002.09797)."""
    return nearest(manifold.points, points)[0] < manifold.radii(neighbours)


def nearest(points: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """The distance [N] of each point to the nearest of ``others``, and its place there."""
    found = [part.min(dim=1) for part in distances(points, others)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def is_authentic(points: Tensor, training: Manifold) -> Tensor:
    """Whether each point [N] is further from its nearest training image than that is from its own nearest.

    Their fraction is AuthPct (arXiv 2102.08921); copies of training images are not authentic.
    """
    away, place = nearest(points, training.points)
    return away > training.radii(1)[place]
