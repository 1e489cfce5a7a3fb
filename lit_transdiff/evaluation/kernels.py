"""Kernel distances: the squared maximum mean discrepancy (MMD) of KID and CMMD.

Shapes: N rows and M rows of two sets, D numbers per row, B rows of a chunk, K groups. All sums are in
float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_transdiff.evaluation.groups import number_of_groups

CMMD_WIDTH = 10.0  # sigma of the Gaussian kernel, for features of length 1
KERNEL_VALUES = 1 << 25  # values of a kernel in memory at a time
Kernel = Callable[[Tensor], Tensor]  # inner products -> values


def cubic(products: Tensor, size: int) -> Tensor:
    """KID's kernel (x y / D + 1)^3 (arXiv 1801.01401)."""
    base = products / size + 1
    return base * base * base  # several times as fast as a power


def gaussian_of_units(products: Tensor) -> Tensor:
    """CMMD's kernel exp(-|x - y|^2 / (2 sigma^2)) of rows of length 1, less 1, which cancels in the MMD."""
    return torch.expm1((products - 1) / CMMD_WIDTH**2)


def kid_values(x: Tensor, y: Tensor, group: Tensor | None = None) -> Tensor:
    """The unbiased squared MMD of all rows with KID's kernel, and without each group: [1 + K]."""
    return squared_mmd(x, y, lambda products: cubic(products, x.shape[1]), biased=False, group=group)


def cmmd_values(x: Tensor, y: Tensor, group: Tensor | None = None, *, biased: bool = True) -> Tensor:
    """1000 times the squared MMD of rows scaled to length 1 (arXiv 2401.09603), and without each group.

    Published numbers are of the biased estimator, which depends on the number of images.
    """
    x, y = F.normalize(x.double(), dim=1), F.normalize(y.double(), dim=1)
    return 1000 * squared_mmd(x, y, gaussian_of_units, biased=biased, group=group)


def squared_mmd(x: Tensor, y: Tensor, kernel: Kernel, *, biased: bool, group: Tensor | None) -> Tensor:
    """The squared MMD of ``x`` [N, D] and ``y`` [M, D], and its values without each ``group`` [N] of x.

    One pass over the kernel's values gives their sums over pairs of groups, from which all values [1 + K]
    follow.
    """
    x, y = x.double(), y.double()
    group = torch.zeros(len(x), dtype=torch.long) if group is None else group
    count = number_of_groups(group)
    member = F.one_hot(group, count).double().to(x.device)  # [N, K]
    within, own = sums_within(x, member, kernel)
    theirs, their_own = sums_within(y, torch.ones(len(y), 1, dtype=torch.float64, device=y.device), kernel)
    cross = torch.zeros(count, dtype=torch.float64, device=x.device)
    for rows, of in zip(*(each.split(chunk_of(len(y))) for each in (x, member)), strict=True):
        cross += kernel(rows @ y.T).sum(dim=1) @ of
    kept = torch.cat([torch.ones(1, count), 1 - torch.eye(count)] if count > 1 else [torch.ones(1, 1)])
    kept = kept.double().to(x.device)  # [1 + K, K]: all groups, and all but each
    n, m = kept @ member.sum(dim=0), len(y)
    of_x, of_y = ((kept @ within) * kept).sum(dim=1), theirs.sum()
    if not biased:
        of_x, of_y = of_x - kept @ own, of_y - their_own.sum()
    pairs_x, pairs_y = (n * n, m * m) if biased else (n * (n - 1), m * (m - 1))
    return (of_x / pairs_x + of_y / pairs_y - 2 * (kept @ cross) / (n * m)).cpu()


def sums_within(x: Tensor, member: Tensor, kernel: Kernel) -> tuple[Tensor, Tensor]:
    """The sums [K, K] of the kernel over pairs of groups, and [K] over the pairs of a row with itself."""
    total = torch.zeros(member.shape[1], member.shape[1], dtype=torch.float64, device=x.device)
    for rows, of in zip(*(each.split(chunk_of(len(x))) for each in (x, member)), strict=True):
        total += of.T @ (kernel(rows @ x.T) @ member)
    return total, kernel(x.square().sum(dim=1)) @ member


def chunk_of(columns: int) -> int:
    """The rows of a chunk of a kernel's matrix with so many columns."""
    return max(1, KERNEL_VALUES // columns)
