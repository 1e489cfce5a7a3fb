"""Transformer blocks with rotary positions, RMS norms and gated MLPs, used by xAR and FlowAR.

The names of their weights are those of the released files. Shapes: B rows, N tokens, K parts of a row, D
width, h heads, d numbers of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.models.adaptive import Modulation
from lit_transdiff.models.layers import NORM_EPS, KeysValues, attend, modulate


def plain_rms_norm(width: int) -> nn.RMSNorm:
    """RMS normalisation without weights."""
    return nn.RMSNorm(width, eps=NORM_EPS, elementwise_affine=False)


def grid_places(side: int, extent: int, device: torch.device) -> Tensor:
    """Row and column of the tokens of a square grid, stretched to ``extent``: [side, side, 2]."""
    line = torch.arange(side, dtype=torch.float32, device=device) * (extent / side)
    return torch.stack(torch.meshgrid(line, line, indexing="ij"), dim=-1)


def rotary_turns(places: Tensor, numbers: int) -> Tensor:
    """Cosines and sines of the angles of tokens at ``places`` [N, 2], for heads of d = ``numbers``: [2, N, d
    / 2].

    The first half of a head turns with the row, the other one with the column.
    """
    exponents = torch.arange(numbers // 4, dtype=torch.float32, device=places.device) / (numbers // 4)
    angles = (places[..., None] * 10_000.0**-exponents).flatten(1)
    return torch.stack([angles.cos(), angles.sin()])


def rotated(x: Tensor, turns: Tensor) -> Tensor:
    """Pairs of successive numbers of ``x`` [..., N, d] turned by ``turns`` [2, N, d / 2], in float32."""
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = turns
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)


class RotaryAttention(nn.Module):
    """Multi-head self-attention whose queries and keys are turned by the places of their tokens."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        attention_dropout: float = 0.0,
        projection_dropout: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_dropout = attention_dropout
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(projection_dropout)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        groups: Sequence[int] | None = None,
        past: KeysValues | None = None,
        isolated: bool = False,
    ) -> Tensor:
        """``x`` [B, N, D] with ``turns`` [2, N, d / 2] -> [B, N, D]; groups as in ``attend``.

        Those of ``past`` are seen, too, and it then holds x's.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = (rotated(z, turns).to(v.dtype) for z in (q, k))
        if past is not None:
            k, v = past.extend(k, v)
        y = attend(q, k, v, groups, self.attention_dropout if self.training else 0.0, isolated)
        return self.dropout(self.proj(rearrange(y, "b h n d -> b n (h d)")))


class GatedMLP(nn.Module):
    """fc2(GELU(fc1_g x) fc1_x x), with 2/3 of the hidden width of an ``MLP`` of that ratio."""

    def __init__(self, width: int, ratio: float, dropout: float = 0.0) -> None:
        super().__init__()
        hidden = int(width * ratio * 2 / 3)
        self.fc1_g = nn.Linear(width, hidden)
        self.fc1_x = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.dropout(self.fc2(self.dropout(F.gelu(self.fc1_g(x)) * self.fc1_x(x))))


class RotaryBlock(nn.Module):
    """Self-attention and gated MLP, modulated and gated by a condition of each part."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attention_dropout: float,
        projection_dropout: float,
    ) -> None:
        super().__init__()
        self.norm = plain_rms_norm(width)
        self.attn = RotaryAttention(width, num_heads, attention_dropout, projection_dropout)
        self.mlp = GatedMLP(width, mlp_ratio, projection_dropout)
        self.ada_lin = Modulation(width, 6)

    def forward(
        self,
        x: Tensor,
        condition: Tensor,
        turns: Tensor,
        groups: Sequence[int] | None = None,
        past: KeysValues | None = None,
    ) -> Tensor:
        """``x`` [B, N, D] of K parts, ``condition`` [B, K, D], ``turns`` [2, N, d / 2] -> [B, N, D]."""
        steering = (z[:, :, None] for z in self.ada_lin(condition))
        gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp = steering
        x = rearrange(x, "b (k n) d -> b k n d", k=condition.shape[1])
        h = modulate(self.norm(x), shift_attention, scale_attention).flatten(1, 2)
        x = x + gate_attention * self.attn(h, turns, groups, past).view_as(x)
        x = x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))
        return x.flatten(1, 2)


def through(
    blocks: nn.ModuleList,
    x: Tensor,
    condition: Tensor,
    places: Tensor,
    groups: Sequence[int],
    past: Sequence[KeysValues],
) -> Tensor:
    """``x`` [B, N, D], with tokens at ``places`` [N, 2], after all ``blocks``; ``past`` of each, or ()."""
    turns = rotary_turns(places, x.shape[-1] // blocks[0].attn.num_heads)  # type: ignore[union-attr, operator, arg-type]
    for i, block in enumerate(blocks):
        x = block(x, condition, turns, groups, past[i] if past else None)
    return x
