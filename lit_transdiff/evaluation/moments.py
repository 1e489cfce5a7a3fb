"""Mean, covariance and a sample of features, and the Frechet distance between two Gaussians.

Shapes: N rows, B rows of a chunk, D numbers per row, K groups.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_transdiff.config import require

CHUNK = 4096  # rows converted to float64 at a time
SIGMA_TOLERANCE = 1e-6  # tolerance for asymmetry and negative eigenvalues of sigma, relative to its largest


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


class Reservoir:
    """A uniform sample of at most ``size`` rows of a stream, determined by ``seed`` and their number."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seen = size, 0
        self.random = np.random.default_rng(seed)
        self.rows: list[tuple[int, np.ndarray]] = []  # position in the stream, row

    def add(self, rows: np.ndarray) -> None:
        for row in rows:
            slot = self.seen if self.seen < self.size else int(self.random.integers(self.seen + 1))
            if slot < len(self.rows):
                self.rows[slot] = (self.seen, row.copy())  # a view would keep its whole batch in memory
            elif slot < self.size:
                self.rows.append((self.seen, row.copy()))
            self.seen += 1

    def stacked(self) -> np.ndarray:
        return np.stack([row for _, row in sorted(self.rows, key=lambda item: item[0])]).astype(np.float32)

    def places(self) -> np.ndarray:
        """The positions of the rows in the stream."""
        return np.array(sorted(place for place, _ in self.rows))


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
    allowed = f"{second.mu.shape}, as of the other set"
    require(first.mu.shape == second.mu.shape, "features", first.mu.shape, allowed)
    a, b = factor(first.sigma), factor(second.sigma)
    root_trace = float(torch.linalg.svdvals(a.T @ b).sum())
    shift = first.mu.astype(np.float64) - second.mu.astype(np.float64)
    return (
        float(shift @ shift) + float(np.trace(first.sigma)) + float(np.trace(second.sigma)) - 2 * root_trace
    )


def frechet_by_group(x: Tensor, group: Tensor, real: Gaussian) -> Tensor:
    """The Frechet distances of the rows ``x`` [N, D] without each ``group`` [N] of them: [K].

    The traces are sums of square roots of eigenvalues of A^T sigma A with the factor A of the real
    covariance, which is computed only once. Sums of groups give all covariances.
    """
    count = int(group.max()) + 1
    root = factor(real.sigma).to(x.device)
    wide, group = x.double(), group.to(x.device)
    centre = wide.mean(dim=0)
    parts = [(wide - centre)[group == g] for g in range(count)]
    scatter, total = sum(part.T @ part for part in parts), sum(part.sum(dim=0) for part in parts)
    gap = centre - torch.from_numpy(real.mu).to(x.device)
    found = []
    for part in parts:
        kept = len(x) - len(part)
        mean = (total - part.sum(dim=0)) / kept
        sigma = (scatter - part.T @ part - kept * torch.outer(mean, mean)) / (kept - 1)
        values = torch.linalg.eigvalsh(root.T @ sigma @ root).clip(min=0)
        found.append((gap + mean).square().sum() + sigma.trace() - 2 * values.sqrt().sum())
    return torch.stack(found).cpu() + float(np.trace(real.sigma))


def factor(sigma: np.ndarray) -> Tensor:
    """A [D, rank] with A A^T = ``sigma``; eigenvalues at rounding level, also negative ones, count as 0."""
    values, vectors = torch.linalg.eigh(torch.from_numpy(np.asarray(sigma, dtype=np.float64)))
    kept = values > max(float(values[-1]), 0.0) * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, kept] * values[kept].sqrt()


def check_gaussian(mu: np.ndarray, sigma: np.ndarray, names: tuple[str, str]) -> None:
    """Refuse shapes that do not fit a mean and covariance, and non-finite numbers."""
    size = mu.size
    require(mu.ndim == 1, names[0], mu.shape, "[D]")
    require(sigma.shape == (size, size), names[1], sigma.shape, f"[D, D] with D = {size}")
    finite = bool(np.isfinite(mu).all() and np.isfinite(sigma).all())
    require(finite, " and ".join(names), "NaN or Inf", "finite numbers")


def check_covariance(sigma: np.ndarray, name: str) -> None:
    """Refuse a finite matrix [D, D] that is not symmetric or has eigenvalues well below 0."""
    largest = float(np.abs(sigma).max(initial=0))
    symmetric = np.allclose(sigma, sigma.T, rtol=10 * SIGMA_TOLERANCE, atol=SIGMA_TOLERANCE * largest)
    require(symmetric, name, "a matrix that is not symmetric", "a covariance")
    if sigma.size and not is_positive(sigma, SIGMA_TOLERANCE * float(np.diagonal(sigma).max())):
        values = torch.linalg.eigvalsh(torch.from_numpy(sigma))
        lowest, highest = float(values[0]), float(values[-1])
        fits = lowest >= -SIGMA_TOLERANCE * highest
        require(fits, name, f"eigenvalues from {lowest:.3g} to {highest:.3g}", "none below 0")


def is_positive(sigma: np.ndarray, shift: float) -> bool:
    """Whether ``sigma`` plus ``shift`` on its diagonal has a Cholesky factor; faster than eigenvalues."""
    return int(torch.linalg.cholesky_ex(torch.from_numpy(sigma + shift * np.eye(len(sigma)))).info) == 0
