"""The residual stream: bias, dropout, gate and addition of a layer's output, then the next layer's
normalisation and modulation, in one pass over memory; their gradients in another.

Shapes: B rows, N tokens, D width. A modulation has B rows, or one for all.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_transdiff.kernels.counting import is_counting
from lit_transdiff.kernels.dropout import threshold_of
from lit_transdiff.kernels.norm_passes import add_norm_backward, add_norm_forward, sums_of_rows

NORM_TOKENS = 1  # tokens of a tile
NORM_TILES = 16  # tiles that one program computes one after the other
NORM_STAGES, NORM_STAGES_BACK = 2, 3  # tiles in flight; the fastest on an H100 at widths of 768 and 1024
NORM_MANY = 8192  # tokens from which programs of so many tiles occupy all processors; below, of one tile
NORM_COLUMNS = 256  # columns that one program adds up over the tiles of a row


@dataclass(frozen=True)
class LayerOutput:
    """A layer's output ``y`` [B, N, D] without its ``bias`` [D], its ``gate`` [B or 1, D] and its dropout."""

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


def add_norm(x: Tensor, branch: LayerOutput | None, norm: Norm | None) -> tuple[Tensor, Tensor]:
    """The stream ``x`` [B, N, D] plus the ``branch``, in x's dtype, and its normalised form.

    The latter is in bfloat16, or float16 under such an autocast; without a ``norm`` it is the stream itself.
    """
    b, n = branch or LayerOutput(None, None), norm or Norm(None, None)  # type: ignore[arg-type]
    dtype = torch.get_autocast_dtype(x.device.type) if b.y is None else b.y.dtype
    out = AddNorm.apply(x, b.y, b.bias, b.gate, n.weight, n.bias, n.shift, n.scale, b.seed, b.p, n.eps, dtype)
    return out if norm is not None else (out, out)  # type: ignore[return-value]


def stride(modulation: Tensor | None) -> int:
    """The step from row to row of a modulation; 0 if it has one row."""
    return 0 if modulation is None or len(modulation) == 1 else modulation.stride(0)


class AddNorm(torch.autograd.Function):
    """``add_norm`` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, y: Tensor | None, bias: Tensor | None, gate: Tensor | None,
        weight: Tensor | None, norm_bias: Tensor | None, shift: Tensor | None, scale: Tensor | None,
        seed: Tensor | None, p: float, eps: float, dtype: torch.dtype,
    ) -> Any:  # fmt: skip
        x = x.contiguous()
        y = None if y is None else y.contiguous()
        (rows, tokens, width), normal = x.shape, weight is not None
        out = x if y is None else torch.empty_like(x)
        z = torch.empty(x.shape, dtype=dtype, device=x.device) if normal else None
        moments = torch.empty(2, rows * tokens, device=x.device) if normal else None
        tiles = NORM_TILES if rows * tokens >= NORM_MANY else 1
        ctx.settings = dict(
            THRESHOLD=threshold_of(p) if seed is not None else 0, SCALE=1 / (1 - p),
            BRANCH=y is not None, GATE=gate is not None, NORM=normal, MODULATION=shift is not None,
            W=triton.next_power_of_2(width), T=NORM_TOKENS, TILES=tiles,
        )  # fmt: skip
        ctx.grid = (triton.cdiv(tokens, NORM_TOKENS * tiles), rows)
        if not is_counting():
            add_norm_forward[ctx.grid](
                x, y, bias, gate, weight, norm_bias, shift, scale, seed, out, z, moments, tokens, width,
                rows * tokens, eps, stride(gate), stride(shift), stride(scale), **ctx.settings,
                STAGES=NORM_STAGES,
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
        of_x = torch.empty(ctx.shape, dtype=ctx.dtype, device=device) if normal else of_out  # unchanged
        of_y = torch.empty(ctx.shape, dtype=ctx.branch[0], device=device) if ctx.branch else None
        sums = torch.empty(rows, ctx.grid[0], 4, width, device=device)
        add_norm_backward[ctx.grid](
            of_out, of_z, out, y, bias, gate, weight, scale, seed, moments, of_x, of_y, sums, tokens, width,
            rows * tokens, stride(gate), stride(scale), **settings, STAGES=NORM_STAGES_BACK,
        )  # fmt: skip
        of_rows = torch.empty(6, rows, width, device=device)
        sums_of_rows[rows, triton.cdiv(width, NORM_COLUMNS)](
            sums, weight, norm_bias, scale, of_rows, ctx.grid[0], rows, width, stride(scale),
            **{name: settings[name] for name in ("BRANCH", "GATE", "NORM", "MODULATION")}, C=NORM_COLUMNS,
            num_warps=2,
        )  # fmt: skip
        of_shift, of_scale, of_gate = of_rows[:3]
        of_norm_bias, of_weight, of_bias = of_rows[3:].sum(1)  # meaningless where there is no norm or branch
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
    summed = gradient if len(gradient) == len(modulation) else gradient.sum(0, keepdim=True)
    return summed.to(modulation.dtype)
