"""Attention and dropout in bfloat16 on CPUs, in training.

torch's fused attention has a slow backward pass in bfloat16 there and none with dropout, and its random
numbers cost more than the products. Here scores are products of bfloat16 (softmax in float32 within), a few
heads at a time, and computed again in the backward pass; of masks only the seeds are kept, which come from
torch's generator.

Shapes: B rows, h heads, N queries, S keys, d head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

SCORES = 2**18  # computed at a time, which stay in the processor's cache


def applies(x: Tensor) -> bool:
    """Whether ``x`` is to be trained on here: bfloat16 with gradients, on a CPU with its instructions."""
    return (
        type(x) is Tensor  # with values
        and x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and x.requires_grad
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and multiplies_bfloat16()
    )


@cache
def multiplies_bfloat16() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices on this processor."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # no such operation
        return False


class CPUAttention(torch.autograd.Function):
    """Attention [B, h, N, d] of queries to keys and values [B, h, S, d], with dropout ``p``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.p, ctx.size = p, max(1, SCORES // (q.shape[2] * k.shape[2]))
        ctx.seeds = draw_mask_seeds(-(-q.shape[0] * q.shape[1] // ctx.size), p)
        out = torch.empty(q.shape, dtype=q.dtype)
        pieces = parts(ctx.size, q * q.shape[-1] ** -0.5, k, v, out)
        for seed, (q, k, v, y) in zip(ctx.seeds, pieces, strict=True):
            torch.bmm(drop(weights_of(q, k), seed, p), v, out=y)
        return out.div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        p, factor = ctx.p, q.shape[-1] ** -0.5
        of_q, of_k, of_v = (torch.empty(z.shape, dtype=z.dtype) for z in (q, k, v))
        pieces = parts(ctx.size, q * factor, k, v, gradient / (1 - p), of_q, of_k, of_v)
        for seed, (q, k, v, g, for_q, for_k, for_v) in zip(ctx.seeds, pieces, strict=True):
            weights = weights_of(q, k)
            torch.bmm(drop(weights.clone() if p else weights, seed, p).mT, g, out=for_v)
            of_weights = drop(torch.bmm(g, v.mT), seed, p)
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            torch.bmm(of_scores, k, out=for_q)
            torch.bmm(of_scores.mT, q, out=for_k)
        return of_q.mul_(factor), of_k, of_v, None


def parts(size: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors [B, h, ...] in parts of ``size`` heads, [size, ...]."""
    return zip(*(z.contiguous().flatten(0, 1).split(size) for z in tensors), strict=True)


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights [h, N, S] of some heads."""
    return torch.softmax(torch.bmm(q, k.mT), -1)


class CPUDropout(torch.autograd.Function):
    """``x`` with a share ``p`` of zeros, the rest divided by 1 - p."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.p, (ctx.seed,) = p, draw_mask_seeds(1, p)
        return drop(x.clone(memory_format=torch.contiguous_format), ctx.seed, p).div_(1 - p)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        return drop(whole, ctx.seed, ctx.p).div_(1 - ctx.p), None


class Dropout(nn.Dropout):
    """torch's dropout, in bfloat16 on CPUs with cheaper random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and 0 < self.p < 1 and applies(x):
            return CPUDropout.apply(x, self.p)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)


def draw_mask_seeds(count: int, p: float) -> list[int]:
    """Seeds of masks, from torch's generator if anything is dropped."""
    return torch.randint(2**62, (count,)).tolist() if p > 0 else [0] * count


def drop(x: Tensor, seed: int, p: float) -> Tensor:
    """Set a share ``p`` (to 2^-16) of the elements of a contiguous bfloat16 tensor to zero, in place."""
    if p > 0:
        numbers = np.random.SFC64(seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
        keep = -(numbers >= round(p * 2**16)).astype(np.int16)  # all bits, or none
        x.view(torch.int16).bitwise_and_(torch.from_numpy(keep).view(x.shape))
    return x
