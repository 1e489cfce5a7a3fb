"""Mean and covariance of features in float64, and the Frechet distance between two Gaussians.

Shapes: N rows, B rows of a chunk, D numbers per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.config import require

CHUNK = 4096  # rows converted to float64 at a time


class Gaussian(NamedTuple):
    """The mean and covariance of a Gaussian."""

    mu: np.ndarray  # [D] float64
    sigma: np.ndarray  # [D, D] float64, over N - 1


class Moments:
    """Streaming mean and covariance of rows in chunks, with [D, D] numbers in memory.

    The mean and scatter of each chunk are merged with those so far (Chan, Golub and LeVeque 1979), which
    avoids cancellation if the mean is large compared with the spread.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.scatter = torch.zeros(0)

    def add(self, rows: Tensor) -> None:
        """Add ``rows`` [B, D]; the sums stay on the device of the first rows."""
        for part in rows.split(CHUNK):
            wide = part.double()
            mean = wide.mean(dim=0)
            centred = wide - mean
            scatter = centred.T @ centred
            if self.count == 0:
                self.count, self.mean, self.scatter = len(part), mean, scatter
                continue
            total = self.count + len(part)
            shift = mean - self.mean
            self.mean = self.mean + shift * (len(part) / total)
            self.scatter += scatter + torch.outer(shift, shift) * (self.count * len(part) / total)
            self.count = total

    def gaussian(self) -> Gaussian:
        """The result so far. Raises ``ValueError`` for fewer than two rows, which have no covariance."""
        require(self.count >= 2, "images", self.count, "at least 2")
        return Gaussian(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())


def gaussian_of(chunks: Iterable[Tensor]) -> Gaussian:
    """The mean and covariance of all rows of ``chunks``, each [B, D]."""
    moments = Moments()
    for rows in chunks:
        moments.add(rows)
    return moments.gaussian()


def frechet(first: Gaussian, second: Gaussian) -> float:
    """|mu_1 - mu_2|^2 + tr(sigma_1 + sigma_2 - 2 (sigma_1^(1/2) sigma_2 sigma_1^(1/2))^(1/2)) (arXiv
    1706.08500).

    With sigma_1 = A A^T and sigma_2 = B B^T, the last trace is the sum of the singular values of A^T B. This
    avoids the square root of a product and keeps the rounding error at float64 precision, even for singular
    covariances.
    """
    require(
        first.mu.shape == second.mu.shape,
        "features",
        first.mu.shape,
        f"{second.mu.shape}, as of the other set",
    )
    a, b = factor(first.sigma), factor(second.sigma)
    root_trace = float(torch.linalg.svdvals(a.T @ b).sum())
    shift = first.mu.astype(np.float64) - second.mu.astype(np.float64)
    return (
        float(shift @ shift) + float(np.trace(first.sigma)) + float(np.trace(second.sigma)) - 2 * root_trace
    )


def factor(sigma: np.ndarray) -> Tensor:
    """A [D, rank] with A A^T = ``sigma``; eigenvalues at rounding level, also negative ones, count as 0."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(sigma, dtype=np.float64)))
    kept = values > max(float(values[-1]), 0.0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()
