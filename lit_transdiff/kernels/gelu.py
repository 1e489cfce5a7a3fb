"""Bias, exact GELU and dropout in one pass over memory, and their gradients in another.

Shapes: M rows, N columns.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_transdiff.kernels.counting import is_counting
from lit_transdiff.kernels.dropout import column_keys, kept, row_keys, threshold_of

GELU_ROWS, GELU_COLUMNS = 4, 1024  # elements of a tile
GELU_STAGES = 3  # tiles in flight; with the sizes above and below the fastest on an H100
GELU_TILES = 16  # tiles of rows that one program of the backward pass adds up


def gelu_dropout(h: Tensor, bias: Tensor, seed: Tensor, p: float) -> Tensor:
    """``dropout(gelu(h + bias))`` of ``h`` [..., N] and ``bias`` [N], in float32 within and in h's dtype."""
    return GeluDropout.apply(h, bias, seed, p)  # type: ignore[no-any-return]


class GeluDropout(torch.autograd.Function):
    """``gelu_dropout`` and its gradients."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor, seed: Tensor, p: float) -> Tensor:
        h = h.contiguous()
        y = torch.empty_like(h)
        rows, columns = h.numel() // h.shape[-1], h.shape[-1]
        grid = (triton.cdiv(columns, GELU_COLUMNS), triton.cdiv(rows, GELU_ROWS))
        dropout = dict(THRESHOLD=threshold_of(p), SCALE=1 / (1 - p))
        if not is_counting():
            gelu_forward[grid](h, bias, seed, y, rows, columns, **dropout, R=GELU_ROWS, C=GELU_COLUMNS)
        ctx.save_for_backward(h, bias, seed)
        ctx.dropout = dropout
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        h, bias, seed = ctx.saved_tensors
        rows, columns = h.numel() // h.shape[-1], h.shape[-1]
        strips = triton.cdiv(rows, GELU_ROWS * GELU_TILES)
        of_h = torch.empty_like(h)
        sums = torch.empty(strips, columns, dtype=torch.float32, device=h.device)
        grid = (triton.cdiv(columns, GELU_COLUMNS), strips)
        gelu_backward[grid](
            gradient.contiguous(), h, bias, seed, of_h, sums, rows, columns, **ctx.dropout, R=GELU_ROWS,
            C=GELU_COLUMNS, TILES=GELU_TILES, STAGES=GELU_STAGES,
        )  # fmt: skip
        return of_h, sums.sum(0).to(bias.dtype), None, None


@triton.jit
def cumulative(x, bell):
    """The normal distribution function of ``x``, from ``bell`` = exp(-x^2 / 2), to 3e-7.

    Abramowitz and Stegun, Handbook of Mathematical Functions (1964), 7.1.26: half as many operations as erf.
    The square of a reciprocal root takes two instructions, a quotient nine.
    """
    root = tl.math.rsqrt(1 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    t = root * root
    p = 1.061405429 * t - 1.453152027
    p = p * t + 1.421413741
    p = p * t - 0.284496736
    p = (p * t + 0.254829592) * t
    tail = 0.5 * p * bell
    return tl.where(x < 0, tail, 1 - tail)


@triton.jit
def bell_of(x):
    """exp(-x^2 / 2), by the processor's power of 2."""
    return tl.math.exp2(x * x * (-0.5 * 1.4426950408889634))


@triton.jit
def gelu_forward(
    h_ptr, bias_ptr, seed_ptr, y_ptr, rows, columns,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) * R + tl.arange(0, R)
    column = tl.program_id(0) * C + tl.arange(0, C)
    inside = (row[:, None] < rows) & (column[None, :] < columns)
    at = row[:, None].to(tl.int64) * columns + column[None, :]
    x = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x += tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    y = x * cumulative(x, bell_of(x))
    if THRESHOLD > 0:
        keep = kept(row_keys(tl.load(seed_ptr), row)[:, None], column_keys(column)[None, :], THRESHOLD)
        y = tl.where(keep, y * SCALE, 0.0)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gelu_backward(
    gradient_ptr, h_ptr, bias_ptr, seed_ptr, of_h_ptr, sums_ptr, rows, columns,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TILES: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    strip = tl.program_id(1)
    column = tl.program_id(0) * C + tl.arange(0, C)
    bias = tl.load(bias_ptr + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    columns_keys = column_keys(column)[None, :]
    seed = tl.load(seed_ptr)
    total = tl.zeros([R, C], dtype=tl.float32)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        row = (strip * TILES + tile) * R + tl.arange(0, R)
        inside = (row[:, None] < rows) & (column[None, :] < columns)
        at = row[:, None].to(tl.int64) * columns + column[None, :]
        x = tl.load(h_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
        g = tl.load(gradient_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if THRESHOLD > 0:
            g = tl.where(kept(row_keys(seed, row)[:, None], columns_keys, THRESHOLD), g * SCALE, 0.0)
        bell = bell_of(x)
        g = g * (cumulative(x, bell) + x * bell * 0.3989422804014327)
        tl.store(of_h_ptr + at, g.to(of_h_ptr.dtype.element_ty), mask=inside)
        total += g
    tl.store(sums_ptr + strip * columns + column, tl.sum(total, axis=0), mask=column < columns)
