"""Dropout masks as a function of a seed, a row and a column, cheap enough for use within other kernels.

A row is hashed once with both halves of the seed; its columns then cost two multiplications each, or in pairs
one. The constants are those of Wellons' search for 32-bit mixers (https://github.com/skeeto/hash-prospector).
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

FIRST, SECOND, COLUMN = 0x21F0AAAD, 0xD35A2D97, 0x9E3779B9
_FIRST, _SECOND, _COLUMN = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(COLUMN)
PAIR = 8  # two columns whose numbers differ in this bit alone share a hash (see ``kept_in_pairs``)


def threshold_of(p: float) -> int:
    """Hashes below this number are dropped: a share ``p`` of 2^32."""
    return round(p * 2**32)


def threshold_in_pairs(p: float) -> int:
    """``threshold_of`` for a hash that serves two columns: 16 bits, as the higher half of 32."""
    return round(p * 2**16) << 16


def draw_seeds(count: int, device: torch.device) -> Tensor:
    """Seeds [count] of dropout masks, from the device's generator and without waiting for the device."""
    return torch.empty(count, dtype=torch.int64, device=device).random_()


@triton.jit
def row_keys(seed, row):
    """The hash of each row, uint32."""
    x = row.to(tl.uint32) ^ seed.to(tl.uint32)
    x = (x ^ (x >> 16)) * _FIRST
    x = x ^ (seed >> 32).to(tl.uint32)
    x = (x ^ (x >> 15)) * _SECOND
    return x ^ (x >> 15)


@triton.jit
def column_keys(column):
    """The hash of each column, uint32."""
    return column.to(tl.uint32) * _COLUMN


@triton.jit
def kept(rows, columns, THRESHOLD: tl.constexpr):
    """Whether an element is kept, from the keys of its row and column, which broadcast."""
    x = (rows ^ columns) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    return x >= tl.full([], THRESHOLD, tl.uint32)


@triton.jit
def kept_in_pairs(rows, firsts, is_second, THRESHOLD: tl.constexpr):
    """``kept`` where the two columns of a pair share a hash, each with 16 of its bits.

    The keys of rows and of the pairs' first columns broadcast, and so does ``is_second``, which marks second
    columns. A thread that has both columns computes the hash once, because the compiler merges equal terms.
    """
    x = (rows ^ firsts) * _FIRST
    x = (x ^ (x >> 15)) * _SECOND
    x = tl.where(is_second, x, x << 16)
    return x >= tl.full([], THRESHOLD, tl.uint32)
