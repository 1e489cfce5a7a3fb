"""Attention with dropout inside, gradients in place of the projections, and two patterns of visible keys.

Shapes: B rows of keys, V views (rows of queries that attend to one row of keys), N queries, S keys, h heads,
d head dimension (D = h d). Rows of queries are ordered (view, row of keys).

A query sees the first ``visible`` keys: block-causal attention has a number for each query [1, N], contexts
of successive lengths have one for each row of queries [V B, 1].
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from lit_transdiff.kernels.attention_passes import (
    TILE_SIZE,
    attention_forward,
    attention_of_keys,
    attention_of_queries,
)
from lit_transdiff.kernels.counting import is_counting
from lit_transdiff.kernels.dropout import threshold_in_pairs

# The fastest values on an H100 at 256 tokens and 64 dimensions of a head.
WARPS, ATTENTION_STAGES, STAGES_OF_KEYS = 4, 3, 2


def self_attention(
    x: Tensor, weight: Tensor, bias: Tensor, heads: int, seed: Tensor, p: float, visible: Tensor | None = None
) -> Tensor:
    """Attention of tokens ``x`` [B, N, D] to each other -> [B, N, D].

    ``weight`` [3 D, D] and ``bias`` [3 D] project them to [q | k | v].
    """
    return SelfAttend.apply(x, weight.to(x.dtype), bias, heads, seed, p, visible)  # type: ignore[no-any-return]


def cross_attention(
    x: Tensor, weight: Tensor, bias: Tensor, k: Tensor, v: Tensor, heads: int, seed: Tensor, p: float,
    visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention of ``x`` [(V B), N, D] to ``k`` and ``v`` [B, S, D] -> [(V B), N, D].

    ``weight`` [D, D] and ``bias`` [D] project ``x`` to queries.
    """
    return CrossAttend.apply(x, weight.to(x.dtype), bias, k, v, heads, seed, p, visible)  # type: ignore[no-any-return]


class SelfAttend(torch.autograd.Function):
    """``self_attention`` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, heads: int, seed: Tensor, p: float,
        visible: Tensor | None,
    ) -> Tensor:  # fmt: skip
        qkv = F.linear(x, weight, bias.to(x.dtype))
        q, k, v = qkv.chunk(3, dim=-1)
        out, sums = attention(q, k, v, heads, seed, p, visible)
        ctx.save_for_backward(x, weight, qkv, out, sums, seed, visible)
        ctx.settings = heads, p, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, qkv, out, sums, seed, visible = ctx.saved_tensors
        of_qkv, (heads, p, dtype) = torch.empty_like(qkv), ctx.settings
        (q, k, v), (of_q, of_k, of_v) = qkv.chunk(3, dim=-1), of_qkv.chunk(3, dim=-1)
        of_biases = gradients_of(gradient, q, k, v, out, sums, of_q, of_k, of_v, heads, seed, p, visible)
        of_bias = torch.cat([tiles.sum(0) for tiles in of_biases]).to(dtype)
        return *of_product(of_qkv, x, weight), of_bias, None, None, None, None


class CrossAttend(torch.autograd.Function):
    """``cross_attention`` and its gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, k: Tensor, v: Tensor, heads: int, seed: Tensor,
        p: float, visible: Tensor | None,
    ) -> Tensor:  # fmt: skip
        q = F.linear(x, weight, bias.to(x.dtype))
        out, sums = attention(q, k, v, heads, seed, p, visible)
        ctx.save_for_backward(x, weight, q, k, v, out, sums, seed, visible)
        ctx.settings = heads, p, bias.dtype
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, q, k, v, out, sums, seed, visible = ctx.saved_tensors
        of_q, of_k, of_v = (torch.empty(z.shape, dtype=z.dtype, device=z.device) for z in (q, k, v))
        heads, p, dtype = ctx.settings
        of_bias, *_ = gradients_of(gradient, q, k, v, out, sums, of_q, of_k, of_v, heads, seed, p, visible)
        return *of_product(of_q, x, weight), of_bias.sum(0).to(dtype), of_k, of_v, None, None, None, None


def of_product(gradient: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of ``x`` and ``weight`` in x W^T."""
    return gradient @ weight, gradient.flatten(0, 1).mT @ x.flatten(0, 1)


def row_and_token_steps(*tensors: Tensor) -> tuple[int, ...]:
    """The steps from row to row and from token to token of tensors [B, N, D] with adjacent channels."""
    for tensor in tensors:
        assert tensor.stride(-1) == 1
    return tuple(step for tensor in tensors for step in tensor.stride()[:2])


def settings_of(q: Tensor, keys: int, heads: int, p: float, visible: Tensor | None) -> dict[str, Any]:
    """The constants of the kernels."""
    d = q.shape[-1] // heads
    return dict(
        D=d,
        FACTOR=1 / math.sqrt(d),
        THRESHOLD=threshold_in_pairs(p),
        SCALE=1 / (1 - p),
        MASKED=visible is not None,
        WHOLE=visible is None and q.shape[1] % TILE_SIZE == 0 and keys % TILE_SIZE == 0,
        num_warps=WARPS,
    )


def steps_of(visible: Tensor | None) -> tuple[int, int]:
    """The steps of ``visible`` from row to row and from query to query; 0 where it has only one."""
    return (0, 0) if visible is None else (int(visible.shape[0] > 1), int(visible.shape[1] > 1))


def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, seed: Tensor, p: float, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output [(V B), N, D] and the logarithm (base 2) of each query's sum of exponentials."""
    rows, queries, width = q.shape
    out = torch.empty(rows, queries, width, dtype=q.dtype, device=q.device)
    sums = torch.empty(rows, heads, queries, device=q.device)
    if is_counting():
        return out, sums
    attention_forward[(triton.cdiv(queries, TILE_SIZE), heads, rows)](
        q, k, v, out, sums, seed, visible, 0.0, len(k), queries, k.shape[1], *row_and_token_steps(q, k, v),
        *steps_of(visible),
        **settings_of(q, k.shape[1], heads, p, visible), num_stages=ATTENTION_STAGES,
    )  # fmt: skip
    return out, sums


def gradients_of(
    gradient: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, of_q: Tensor, of_k: Tensor,
    of_v: Tensor, heads: int, seed: Tensor, p: float, visible: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Write the gradients of ``q``, ``k`` and ``v``; return their sums over each tile's tokens [tiles, D]."""
    gradient = gradient.contiguous()
    (rows, queries, width), keys = q.shape, k.shape[1]
    inner = torch.empty_like(sums)  # the product of output and gradient of each query
    row_keys = torch.empty_like(sums, dtype=torch.int32) if p > 0 else None  # each query's key for dropout
    settings, sizes = settings_of(q, keys, heads, p, visible), (len(k), queries, keys)
    tiles, tiles_of_keys = triton.cdiv(queries, TILE_SIZE), triton.cdiv(keys, TILE_SIZE)
    of_q_bias = torch.empty(rows * tiles, width, device=q.device)
    of_k_bias, of_v_bias = torch.empty(2, len(k) * tiles_of_keys, width, device=q.device)
    attention_of_queries[tiles, heads, rows](
        q, k, v, out, gradient, sums, inner, row_keys, of_q, of_q_bias, seed, visible, *sizes,
        *row_and_token_steps(q, k, v, of_q),
        *steps_of(visible), **settings, num_stages=ATTENTION_STAGES,
    )  # fmt: skip
    attention_of_keys[tiles_of_keys, heads, len(k)](
        q, k, v, gradient, sums, inner, row_keys, of_k, of_v, of_k_bias, of_v_bias, visible, 0.0,
        rows // len(k), *sizes,
        *row_and_token_steps(q, k, v, of_k, of_v), *steps_of(visible), **settings, num_stages=STAGES_OF_KEYS,
    )  # fmt: skip
    return of_q_bias, of_k_bias, of_v_bias
