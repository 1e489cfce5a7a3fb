"""The Frechet distance against closed forms and against torchmetrics; means and
covariances against numpy's.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from lit_transdiff.evaluation.moments import Gaussian, Moments, factor, frechet, gaussian_of

pytestmark = pytest.mark.numeric


def rotation(size: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0]


def test_diagonal_gaussians() -> None:
    """|m|^2 + sum (a - b)^2, also where variances differ by twelve orders of magnitude or vanish."""
    a, b = np.array([1e3, 1.0, 1e-3, 0.0, 2.0]), np.array([1.0, 1.0, 1e-2, 0.0, 0.0])
    m = np.array([1.0, -2.0, 0.5, 3.0, 0.0])
    expected = m @ m + ((a - b) ** 2).sum()
    found = frechet(Gaussian(m, np.diag(a**2)), Gaussian(np.zeros(5), np.diag(b**2)))
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("size", [3, 50, 400])
def test_commuting_gaussians(size: int) -> None:
    """The same for any common eigenvectors."""
    q, random = rotation(size), np.random.default_rng(1)
    a, b = random.uniform(0, 2, size), random.uniform(0, 2, size)
    first, second = (
        Gaussian(np.zeros(size), q @ np.diag(a**2) @ q.T),
        Gaussian(np.ones(size), q @ np.diag(b**2) @ q.T),
    )
    assert frechet(first, second) == pytest.approx(size + ((a - b) ** 2).sum(), rel=1e-10)
    assert frechet(first, second) == pytest.approx(frechet(second, first), rel=1e-12)


def test_a_scaled_and_shifted_copy() -> None:
    """sigma and s^2 sigma: |m|^2 + (1 - s)^2 tr sigma."""
    x = np.random.default_rng(0).standard_normal((60, 20)) @ rotation(20)
    sigma, m = np.cov(x, rowvar=False), np.arange(20.0)
    assert frechet(Gaussian(m, 9 * sigma), Gaussian(0 * m, sigma)) == pytest.approx(
        m @ m + 4 * np.trace(sigma), rel=1e-12
    )


@pytest.mark.parametrize("count", [5, 40, 2000])
def test_a_set_and_itself_are_at_no_distance(count: int) -> None:
    """Also from few images, whose covariance has not full rank."""
    x = torch.randn(count, 100) @ torch.diag(torch.logspace(1, -4, 100)) + 30
    gaussian = gaussian_of([x])
    assert abs(frechet(gaussian, gaussian)) < 1e-11 * float(np.trace(gaussian.sigma))


def test_disjoint_subspaces() -> None:
    """Covariances of rank 1 at right angles share nothing: the sum of the traces."""
    q = rotation(30)
    first, second = (
        Gaussian(np.zeros(30), scale * np.outer(v, v)) for scale, v in ((2.0, q[0]), (5.0, q[1]))
    )
    assert frechet(first, second) == pytest.approx(7, abs=1e-12)
    assert factor(first.sigma).shape == (30, 1)


class Given(nn.Module):
    num_features = 32

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


@pytest.mark.parametrize("counts", [(300, 500), (20, 500), (20, 25)])
def test_as_torchmetrics_computes_it_on_the_same_features(counts: tuple[int, int]) -> None:
    """It takes the eigenvalues of the product, which is not symmetric; below full rank that loses half of the
    digits.
    """
    fake, real = (
        torch.randn(n, 32).double() @ torch.randn(32, 32).double() + i for i, n in enumerate(counts)
    )
    metric = FrechetInceptionDistance(feature=Given(), sync_on_compute=False).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    tolerance = 1e-10 if min(counts) > 32 else 1e-6
    assert frechet(gaussian_of([fake]), gaussian_of([real])) == pytest.approx(
        float(metric.compute()), rel=tolerance
    )


def test_moments_do_not_depend_on_the_chunks_and_keep_their_digits() -> None:
    x = torch.randn(1000, 7).double() * 1e-3 + 1e4
    expected = np.cov(x.numpy(), rowvar=False)
    for size in (1, 64, 1000):
        found = gaussian_of(x.split(size))
        np.testing.assert_allclose(found.mu, x.numpy().mean(0), rtol=1000 * 2**-53)  # of a thousand additions
        np.testing.assert_allclose(found.sigma, expected, rtol=1e-8, atol=1e-14)


def test_one_row_has_no_covariance_and_sizes_must_agree() -> None:
    moments = Moments()
    moments.add(torch.randn(1, 3))
    with pytest.raises(ValueError, match="at least 2"):
        moments.gaussian()
    with pytest.raises(ValueError, match="features: got"):
        frechet(Gaussian(np.zeros(2), np.eye(2)), Gaussian(np.zeros(3), np.eye(3)))
