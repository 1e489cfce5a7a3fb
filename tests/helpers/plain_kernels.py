"""The functions of the kernels of ``lit_transdiff.kernels``, written plainly in torch."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lit_transdiff.kernels.adamw import AdamW, Updated
from lit_transdiff.kernels.dropout import COLUMN, FIRST, PAIR, SECOND, threshold_in_pairs, threshold_of
from lit_transdiff.kernels.norm import LayerOutput, Norm

WORD = 0xFFFFFFFF


def hashes(seed: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The hash of every element of ``rows`` [...] x ``columns`` [N]: [..., N]."""
    low, high = seed & WORD, (seed >> 32) & WORD
    x = rows.to(torch.int64) ^ low
    x = ((x ^ (x >> 16)) * FIRST) & WORD
    x = x ^ high
    x = ((x ^ (x >> 15)) * SECOND) & WORD
    x = x ^ (x >> 15)
    z = ((x[..., None] ^ ((columns * COLUMN) & WORD)) * FIRST) & WORD
    return ((z ^ (z >> 15)) * SECOND) & WORD


def keep_mask(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    """The plain form of ``kept`` for every element of ``rows`` [...] x ``columns``: bool [..., columns]."""
    return hashes(seed, rows, torch.arange(columns, device=rows.device)) >= threshold_of(p)


def keep_mask_in_pairs(seed: Tensor, rows: Tensor, columns: int, p: float) -> Tensor:
    """The plain form of ``kept_in_pairs``."""
    column = torch.arange(columns, device=rows.device)
    z = hashes(seed, rows, column & ~PAIR)
    return torch.where((column & PAIR) > 0, z, (z << 16) & WORD) >= threshold_in_pairs(p)


def drop(y: Tensor, seed: Tensor, p: float) -> Tensor:
    """The plain form of dropout for ``y`` [..., D], whose rows are numbered in order."""
    if p == 0:
        return y
    rows = torch.arange(y[..., 0].numel(), device=y.device).view(y.shape[:-1])
    return torch.where(keep_mask(seed, rows, y.shape[-1], p), y / (1 - p), torch.zeros((), dtype=y.dtype))


def plain_self_attention(
    x: Tensor, weight: Tensor, bias: Tensor, heads: int, seed: Tensor, p: float, visible: Tensor | None = None
) -> Tensor:
    """The plain form of ``self_attention``."""
    q, k, v = F.linear(x, weight.to(x.dtype), bias.to(x.dtype)).chunk(3, dim=-1)
    return plain_attention(q, k, v, heads, seed, p, visible)


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, seed: Tensor, p: float, visible: Tensor | None = None
) -> Tensor:
    """Attention of given queries, as in ``cross_attention``, in float32."""
    views = len(q) // len(k)
    k, v = (rearrange(z.repeat(views, 1, 1).float(), "b s (h d) -> b h s d", h=heads) for z in (k, v))
    query = rearrange(q.float(), "b n (h d) -> b h n d", h=heads)
    scores = query @ k.mT / math.sqrt(query.shape[-1])
    if visible is not None:
        keys = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(keys >= visible[:, None, :, None], -math.inf)
    shares = scores.softmax(-1)
    if p > 0:
        rows = torch.arange(shares[..., 0].numel(), device=q.device).view(shares.shape[:-1])
        shares = shares * keep_mask_in_pairs(seed, rows, shares.shape[-1], p) / (1 - p)
    return rearrange(shares @ v, "b h n d -> b n (h d)").to(q.dtype)


def plain_gelu_dropout(h: Tensor, bias: Tensor, seed: Tensor, p: float) -> Tensor:
    """The plain form of ``gelu_dropout``."""
    return drop(F.gelu(h.float() + bias.float()), seed, p).to(h.dtype)


def plain_add_norm(
    x: Tensor, branch: LayerOutput | None, norm: Norm | None, dtype: torch.dtype
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


def plain_adamw(
    groups: Sequence[Sequence[Updated]],
    settings: Sequence[AdamW],
    shares: Sequence[float],
    max_norm: float | None = None,
) -> None:
    """The plain form of ``adamw_step``."""
    norm = torch.stack([one.gradient.square().sum() for group in groups for one in group]).sum().sqrt()
    factor = 1.0 if max_norm is None else (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for group, s in zip(groups, settings, strict=True):
        for one in group:
            gradient, step = one.gradient * factor, float(one.step)
            one.mean.lerp_(gradient, 1 - s.betas[0])
            one.square.mul_(s.betas[1]).addcmul_(gradient, gradient, value=1 - s.betas[1])
            size, spread = (1 - beta**step for beta in s.betas)
            one.weight.mul_(s.shrink).addcdiv_(
                one.mean, one.square.sqrt() / math.sqrt(spread) + s.eps, value=-s.lr / size
            )
            for average, share in zip(one.averages, shares, strict=True):
                average.lerp_(one.weight, share)
