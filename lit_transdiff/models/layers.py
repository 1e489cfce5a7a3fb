"""Layers shared by encoder and decoder.

Shapes: B batch, N query tokens, S context tokens, D width, h heads, d head dimension (D = h d), V views
(decoder rows that belong to one image: its references times its noise draws).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.models.cpu_bf16 import CPUAttention, Dropout, applies

NORM_EPS = 1e-6
TIME_FEATURES = 256


def layer_norm(width: int, affine: bool = True) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=NORM_EPS, elementwise_affine=affine)


class RMSNorm(nn.RMSNorm):
    """RMS normalisation in the precision of its weights, as autocast does for other norms."""

    def __init__(self, width: int) -> None:
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class MLP(nn.Module):
    """Linear, GELU (exact, or its ``tanh`` approximation), dropout, linear, dropout."""

    def __init__(self, width: int, ratio: float, dropout: float, tanh: bool = False) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, int(width * ratio))
        self.gelu: nn.Module = nn.GELU("tanh" if tanh else "none")
        self.fc2 = nn.Linear(int(width * ratio), width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.dropout(self.fc2(self.dropout(self.gelu(self.fc1(x)))))


@dataclass
class KeysValues:
    """Cached keys and values [B, h, S, d] of earlier tokens."""

    keys: Tensor | None = None
    values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, and return all."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def first(self, number: int) -> KeysValues:
        """The keys and values of the first rows."""
        if self.keys is None or self.values is None:
            return KeysValues()
        return KeysValues(self.keys[:number], self.values[:number])

    def take(self, rows: Tensor) -> None:
        """Replace the rows by the ones numbered ``rows`` [B]."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]


def attend_to_all(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """Attention of queries [B, h, N, d] to all keys and values [B, h, S, d], by the fastest kernel."""
    if applies(q):
        return CPUAttention.apply(q, k, v, dropout)  # type: ignore[no-any-return, no-untyped-call]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    groups: Sequence[int] | None = None,
    dropout: float = 0.0,
    isolated: bool = False,
) -> Tensor:
    """Attention of queries [B, h, N, d] to keys and values [B, h, S, d], the last N of which are their own.

    ``groups`` are the sizes of successive groups of the queries (their sum is N): a token sees its own group
    and all before it; with ``isolated``, its own group alone. Each group is one call without a mask, so that
    nothing is computed to be masked and fast kernels apply; groups of one token each are one causal call.
    """
    number, before = q.shape[2], k.shape[2] - q.shape[2]
    if groups is not None and len(groups) == number and not (before or isolated):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    parts = []
    for start, end in pairwise(accumulate(groups or (number,), initial=0)):
        seen = slice(before + start if isolated else 0, before + end)
        parts.append(attend_to_all(q[:, :, start:end], k[:, :, seen], v[:, :, seen], dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


class SelfAttention(nn.Module):
    """Multi-head self-attention with one projection, laid out [q | k | v], each [head][head dimension]."""

    def __init__(
        self, width: int, num_heads: int, attention_dropout: float, projection_dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = Dropout(projection_dropout)

    def forward(
        self, x: Tensor, groups: tuple[int, ...] | None = None, past: KeysValues | None = None
    ) -> Tensor:
        """Attend from the tokens ``x`` [B, N, D] to each other, and to those of ``past``, which then holds
        x's, too; of successive ``groups`` of x a token sees its own and those before it (see ``attend``).
        Returns [B, N, D].
        """
        return self.dropout(self.proj(self.heads(x, groups, past)))

    def heads(
        self, x: Tensor, groups: tuple[int, ...] | None = None, past: KeysValues | None = None
    ) -> Tensor:
        """The outputs [B, N, D] of the heads, before their projection."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        if past is not None:
            k, v = past.extend(k, v)
        y = attend(q, k, v, groups, self.attention_dropout if self.training else 0.0)
        return rearrange(y, "b h n d -> b n (h d)")


class CrossAttention(nn.Module):
    """Attention of decoder tokens over the context; its keys and values can be computed once."""

    def __init__(
        self, width: int, num_heads: int, attention_dropout: float, projection_dropout: float
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)
        self.dropout = Dropout(projection_dropout)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, h, S, d] of ``context`` [B, S, D]."""
        key, value = self.key(context), self.value(context)
        return tuple(rearrange(z, "b s (h d) -> b h s d", h=self.num_heads) for z in (key, value))  # type: ignore[return-value]

    def forward(self, x: Tensor, keys_values: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Attend from ``x`` [(V B), N, D], in equal shares of the rows, to the contexts ``keys_values``.

        A share's rows are ordered (draw, image) over the rows of its keys and values. All draws of an image
        share them: their queries stand in one row. Returns [(V B), N, D].
        """
        return self.dropout(self.proj(self.heads(x, keys_values)))

    def heads(self, x: Tensor, keys_values: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """The outputs [(V B), N, D] of the heads, before their projection."""
        dropout = self.attention_dropout if self.training else 0.0
        shares = []
        for rows, (k, v) in zip(self.query(x).chunk(len(keys_values)), keys_values, strict=True):
            q = rearrange(rows, "(m b) n (h d) -> b h (m n) d", b=len(k), h=self.num_heads)
            y = attend_to_all(q, k, v, dropout)
            shares.append(rearrange(y, "b h (m n) d -> (m b) n (h d)", n=x.shape[1]))
        return shares[0] if len(shares) == 1 else torch.cat(shares)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t and a two-layer network, and a projection to the blocks' six modulations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(TIME_FEATURES, width)
        self.linear_2 = nn.Linear(width, width)
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """``t`` [B] in [0, 1] -> embedding [B, D] and block modulation [B, 6, D]."""
        embedding = self.embedding(t)
        return embedding, self.modulations(embedding)

    def embedding(self, t: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(time_features(t).to(self.linear_1.weight.dtype))))  # type: ignore[no-any-return]

    def modulations(self, embedding: Tensor) -> Tensor:
        return rearrange(self.modulation(F.silu(embedding)), "b (six d) -> b six d", six=6)


def time_features(t: Tensor) -> Tensor:
    """Sinusoids of 1000 t; ``t`` [B] in [0, 1], float32 or 64 -> [B, 256], float32."""
    return sinusoids(1000.0 * t)


def sinusoids(numbers: Tensor) -> Tensor:
    """Cosines then sines of ``numbers`` [B] at 128 frequencies from 1 down to 1/10000: [B, 256], float32.

    The angles reach 1000 rad, so the frequencies keep exactly this float32 formula under every precision.
    """
    half = TIME_FEATURES // 2
    frequencies = torch.exp(
        -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=numbers.device) / half
    )
    angles = numbers.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """``x`` [B, N, D] scaled and shifted by [B, 1, D]."""
    return x * (1 + scale) + shift


def initialise(module: nn.Module) -> None:
    """The paper's initialisation of one layer: Xavier-uniform weights, zero biases, N(0, 0.02) embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def learned(*shape: int) -> nn.Parameter:
    """A learned vector or table, N(0, 0.02)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)
