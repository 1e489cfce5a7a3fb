"""The residual stream: bias, dropout, gate and addition of a layer's output, then the next layer's
normalisation and modulation, in one pass over memory; their gradients in another.

Shapes: B rows, N tokens, D width. A modulation has B rows, or one for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_transdiff.kernels.dropout import column_keys, drop, kept, row_keys, threshold_of

TOKENS = 1  # tokens of a tile
TILES = 16  # tiles that one program computes one after the other
STAGES, STAGES_BACK = 2, 3  # tiles in flight; the fastest on an H100 at widths of 768 and 1024
COLUMNS = 256  # columns that one program adds up over the tiles of a row


@dataclass(frozen=True)
class Branch:
    """A layer's output ``y`` [B, N, D] without its ``bias`` [D], its ``gate`` [B or 1, D], and its dropout."""

    y: Tensor
    bias: Tensor
    gate: Tensor | None = None
    p: float = 0.0
    seed: Tensor | None = None


@dataclass(frozen=True)
class Norm:
    """A layer normalisation with ``weight`` and ``bias`` [D], then ``shift`` and ``scale`` [B or 1, D]."""

    weight: Tensor
    bias: Tensor
    shift: Tensor | None = None
    scale: Tensor | None = None
    eps: float = 1e-6


def add_norm(x: Tensor, branch: Branch | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The stream ``x`` [B, N, D] plus the ``branch``, in x's dtype, and its normalised form in bfloat16, or
    float16 under such an autocast; without a ``norm`` the second is the first.
    """
    b, n = branch or Branch(None, None), norm or Norm(None, None)  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(x.device.type) if b.y is None else b.y.dtype
    out = AddNorm.apply(  # type: ignore[no-untyped-call]
        x, b.y, b.bias, b.gate, n.weight, n.bias, n.shift, n.scale, b.seed, b.p, n.eps, dtype
    )
    return out if norm is not None else (out, out)  # type: ignore[return-value]


def plain_add_norm(
    x: Tensor, branch: Branch | None, norm: Norm | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The plain form of ``add_norm``."""
    if branch is not None:
        y = branch.y.float() + branch.bias.float()
        if branch.seed is not None:
            y = drop(y, branch.seed, branch.p)
        x = (x.float() + (y if branch.gate is None else branch.gate[:, None] * y)).to(x.dtype)
    if norm is None:
        return x, x
    z = F.layer_norm(x.float(), x.shape[-1:], norm.weight.float(), norm.bias.float(), norm.eps)
    if norm.shift is not None and norm.scale is not None:
        z = z * (1 + norm.scale[:, None]) + norm.shift[:, None]
    return x, z.to(dtype)


def stride(modulation: Tensor | None) -> int:
    """The step from row to row of a modulation; 0 if it has one row."""
    return 0 if modulation is None or len(modulation) == 1 else modulation.stride(0)


class AddNorm(torch.autograd.Function):
    """``add_norm`` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, bias: Tensor | None, gate: Tensor | None, weight: Tensor | None,
        norm_bias: Tensor | None, shift: Tensor | None, scale: Tensor | None, seed: Tensor | None, p: float,
        eps: float, dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        x = x.contiguous()
        y = None if y is None else y.contiguous()
        (rows, tokens, width), normal = x.shape, weight is not None
        out = x if y is None else torch.empty_like(x)
        z = torch.empty(x.shape, dtype=dtype, device=x.device) if normal else None
        moments = torch.empty(2, rows * tokens, device=x.device) if normal else None
        ctx.settings = dict(
            THRESHOLD=threshold_of(p) if seed is not None else 0, SCALE=1 / (1 - p),
            BRANCH=y is not None, GATE=gate is not None, NORM=normal, MODULATION=shift is not None,
            W=triton.next_power_of_2(width), T=TOKENS, TILES=TILES,
        )  # fmt: skip
        ctx.grid = (triton.cdiv(tokens, TOKENS * TILES), rows)
        add_norm_forward[ctx.grid](
            x, y, bias, gate, weight, norm_bias, shift, scale, seed, out, z, moments, tokens, width,
            rows * tokens, eps, stride(gate), stride(shift), stride(scale), **ctx.settings, STAGES=STAGES,
        )  # fmt: skip
        needed = (y, bias) if gate is not None else (None, None)
        ctx.save_for_backward(
            out if normal else None, *needed, gate, weight, norm_bias, shift, scale, seed, moments
        )
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.branch = None if y is None else (y.dtype, bias.dtype)  # type: ignore[union-attr]
        return (out, z) if normal else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_out: Tensor | None, of_z: Tensor | None = None) -> tuple[Tensor | None, ...]:
        out, y, bias, gate, weight, norm_bias, shift, scale, seed, moments = ctx.saved_tensors
        rows, tokens, width = ctx.shape
        normal, device = of_z is not None, (of_z if of_out is None else of_out).device  # type: ignore[union-attr]
        settings = {**ctx.settings, "NORM": normal, "PASSED": of_out is not None}
        of_out, of_z = (None if g is None else g.contiguous() for g in (of_out, of_z))
        of_x = torch.empty(ctx.shape, dtype=ctx.dtype, device=device)
        of_y = torch.empty(ctx.shape, dtype=ctx.branch[0], device=device) if ctx.branch else None
        sums = torch.empty(rows, ctx.grid[0], 4, width, device=device)
        add_norm_backward[ctx.grid](
            of_out, of_z, out, y, bias, gate, weight, scale, seed, moments, of_x, of_y, sums, tokens, width,
            rows * tokens, stride(gate), stride(scale), **settings, STAGES=STAGES_BACK,
        )  # fmt: skip
        of_rows = torch.empty(6, rows, width, device=device)
        sums_of_rows[rows, triton.cdiv(width, COLUMNS)](
            sums, weight, norm_bias, scale, of_rows, ctx.grid[0], rows, width, stride(scale),
            **{name: settings[name] for name in ("BRANCH", "GATE", "NORM", "MODULATION")}, C=COLUMNS, num_warps=2,
        )  # fmt: skip
        of_shift, of_scale, of_gate = of_rows[:3]
        of_norm_bias, of_weight, of_bias = of_rows[3:].sum(1)  # of what is not there, numbers without meaning
        modulated = normal and scale is not None
        return (
            of_x,
            of_y,
            of_bias.to(ctx.branch[1]) if ctx.branch else None,
            None if gate is None else like(of_gate, gate),
            of_weight.to(weight.dtype) if normal else None,
            of_norm_bias.to(norm_bias.dtype) if normal else None,
            like(of_shift, shift) if modulated else None,
            like(of_scale, scale) if modulated else None,
            *[None] * 4,
        )


def like(gradient: Tensor, modulation: Tensor) -> Tensor:
    """The gradient [B, D] of a modulation with as many rows as it has."""
    return (gradient if len(gradient) == len(modulation) else gradient.sum(0, keepdim=True)).to(
        modulation.dtype
    )


@triton.jit
def row_of(pointer, row, step, column, inside):  # type: ignore[no-untyped-def]
    """A row [1, W] of a matrix in float32."""
    return tl.load(pointer + row * step + column, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_norm_forward(  # type: ignore[no-untyped-def]
    x_ptr, y_ptr, bias_ptr, gate_ptr, weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, seed_ptr, out_ptr, z_ptr,
    moments_ptr, tokens, width, all_tokens, eps, gate_step, shift_step, scale_step,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    MODULATION: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.arange(0, W)
    valid = column < width
    if BRANCH:
        bias = row_of(bias_ptr, 0, 0, column, valid)
        if GATE:
            gate = row_of(gate_ptr, row, gate_step, column, valid)
    if NORM:
        weight = row_of(weight_ptr, 0, 0, column, valid)
        norm_bias = row_of(norm_bias_ptr, 0, 0, column, valid)
        if MODULATION:  # (n w + b) (1 + s) + h = n (w (1 + s)) + (b (1 + s) + h)
            grown = 1 + row_of(scale_ptr, row, scale_step, column, valid)
            weight = weight * grown
            norm_bias = norm_bias * grown + row_of(shift_ptr, row, shift_step, column, valid)
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        token = (tl.program_id(0) * TILES + tile) * T + tl.arange(0, T)
        place = row * tokens + token
        inside = (token < tokens)[:, None] & valid[None, :]
        at = place[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
            if THRESHOLD > 0:
                keep = kept(row_keys(seed, place)[:, None], column_keys(column)[None, :], THRESHOLD)
                y = tl.where(keep, y * SCALE, 0.0)
            if GATE:
                y *= gate
            rounded = (x + y).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            mean = tl.sum(tl.where(inside, x, 0.0), axis=1) / width
            centred = tl.where(inside, x - mean[:, None], 0.0)
            scale = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
            tl.store(moments_ptr + place, mean, mask=token < tokens)
            tl.store(moments_ptr + all_tokens + place, scale, mask=token < tokens)
            z = centred * scale[:, None] * weight + norm_bias
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def add_norm_backward(  # type: ignore[no-untyped-def]
    of_out_ptr, of_z_ptr, out_ptr, y_ptr, bias_ptr, gate_ptr, weight_ptr, scale_ptr, seed_ptr, moments_ptr, of_x_ptr,
    of_y_ptr, sums_ptr, tokens, width, all_tokens, gate_step, scale_step,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr,
    MODULATION: tl.constexpr, PASSED: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.arange(0, W)
    valid = column < width
    if GATE:
        bias = row_of(bias_ptr, 0, 0, column, valid)
        gate = row_of(gate_ptr, row, gate_step, column, valid)
    if NORM:
        weight = row_of(weight_ptr, 0, 0, column, valid)
        if MODULATION:
            weight = weight * (1 + row_of(scale_ptr, row, scale_step, column, valid))
    of_m = tl.zeros([T, W], dtype=tl.float32)
    of_m_normal = tl.zeros([T, W], dtype=tl.float32)
    of_gate = tl.zeros([T, W], dtype=tl.float32)
    of_branch = tl.zeros([T, W], dtype=tl.float32)
    if THRESHOLD > 0:
        seed = tl.load(seed_ptr)
    for tile in tl.range(0, TILES, num_stages=STAGES):
        token = (tl.program_id(0) * TILES + tile) * T + tl.arange(0, T)
        place = row * tokens + token
        inside = (token < tokens)[:, None] & valid[None, :]
        at = place[:, None].to(tl.int64) * width + column[None, :]
        g = tl.zeros([T, W], dtype=tl.float32)
        if PASSED:
            g = tl.load(of_out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            mean = tl.load(moments_ptr + place, mask=token < tokens, other=0.0)[:, None]
            scale = tl.load(moments_ptr + all_tokens + place, mask=token < tokens, other=0.0)[:, None]
            x = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
            normal = tl.where(inside, (x - mean) * scale, 0.0)
            m = tl.load(of_z_ptr + at, mask=inside, other=0.0).to(tl.float32)
            of_m += m
            of_m_normal += m * normal
            m = m * weight
            first = tl.sum(m, axis=1)[:, None] / width
            second = tl.sum(m * normal, axis=1)[:, None] / width
            g += scale * (m - first - normal * second)
        tl.store(of_x_ptr + at, g.to(of_x_ptr.dtype.element_ty), mask=inside)
        if BRANCH:
            if THRESHOLD > 0:
                keep = kept(row_keys(seed, place)[:, None], column_keys(column)[None, :], THRESHOLD)
                g = tl.where(keep, g * SCALE, 0.0)
            if GATE:
                y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
                of_gate += tl.where(inside, g * y, 0.0)
                g *= gate
            g = tl.where(inside, g, 0.0)
            of_branch += g
            tl.store(of_y_ptr + at, g.to(of_y_ptr.dtype.element_ty), mask=inside)
    sums = sums_ptr + (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 4 * width + column
    if NORM:
        tl.store(sums, tl.sum(of_m, axis=0), mask=valid)
        tl.store(sums + width, tl.sum(of_m_normal, axis=0), mask=valid)
    if BRANCH:
        if GATE:
            tl.store(sums + 2 * width, tl.sum(of_gate, axis=0), mask=valid)
        tl.store(sums + 3 * width, tl.sum(of_branch, axis=0), mask=valid)


@triton.jit
def sums_of_rows(  # type: ignore[no-untyped-def]
    sums_ptr, weight_ptr, norm_bias_ptr, scale_ptr, of_rows_ptr, programs, rows, width, scale_step,
    BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Per row, the gradients of shift, scale and gate, and what the norm's bias, its weight and the branch's
    bias have of it.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    valid = column < width
    of_m = tl.zeros([C], dtype=tl.float32)
    of_m_normal = tl.zeros([C], dtype=tl.float32)
    of_gate = tl.zeros([C], dtype=tl.float32)
    of_branch = tl.zeros([C], dtype=tl.float32)
    for program in range(programs):
        at = sums_ptr + (row * programs + program).to(tl.int64) * 4 * width + column
        if NORM:
            of_m += tl.load(at, mask=valid, other=0.0)
            of_m_normal += tl.load(at + width, mask=valid, other=0.0)
        if GATE:
            of_gate += tl.load(at + 2 * width, mask=valid, other=0.0)
        if BRANCH:
            of_branch += tl.load(at + 3 * width, mask=valid, other=0.0)
    at, step = of_rows_ptr + row * width + column, rows * width
    if NORM:
        if MODULATION:
            weight = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
            tl.store(at, of_m, mask=valid)
            tl.store(at + step, of_m * norm_bias + of_m_normal * weight, mask=valid)
            grown = 1 + tl.load(scale_ptr + row * scale_step + column, mask=valid, other=0.0).to(tl.float32)
            of_m *= grown
            of_m_normal *= grown
        tl.store(at + 3 * step, of_m, mask=valid)
        tl.store(at + 4 * step, of_m_normal, mask=valid)
    if GATE:
        tl.store(at + 2 * step, of_gate, mask=valid)
    if BRANCH:
        tl.store(at + 5 * step, of_branch, mask=valid)
