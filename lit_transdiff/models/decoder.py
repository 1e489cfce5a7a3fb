"""The diffusion decoder: (x_t, t, context) -> velocity.

Shapes: B images, V views of an image (references times noise draws), N tokens, S context tokens, D width, C
channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lit_transdiff.models.layers import (
    MLP,
    CrossAttention,
    SelfAttention,
    TimeEmbedding,
    initialise,
    layer_norm,
    learned,
    modulate,
)
from lit_transdiff.models.tokens import patchify, unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig
    from lit_transdiff.config.transdiff_parts import TransDiffPartsConfig

KeysValuesPair = tuple[Tensor, Tensor]  # [B, h, S, d] each


@dataclass(frozen=True)
class Memory:
    """Keys and values of the decoder's contexts, computed once for all draws and solver steps.

    For every block the keys and values of each context; the rows of the decoder fall into as many equal
    shares, in order, and those of a share attend to one context. A context of one row serves for all rows of
    its share.
    """

    blocks: tuple[tuple[KeysValuesPair, ...], ...]

    def join(self, later: Memory) -> Memory:
        """The memory of this context's tokens, then a ``later`` one's; a single row is broadcast."""
        blocks = []
        for old, new in zip(self.blocks, later.blocks, strict=True):
            pairs = zip(old, new, strict=True)
            blocks.append(tuple((append(k, k_new), append(v, v_new)) for (k, v), (k_new, v_new) in pairs))
        return Memory(tuple(blocks))

    def beside(self, other: Memory) -> Memory:
        """The memory for the rows of this one followed by as many rows of the ``other``."""
        return Memory(tuple(mine + its for mine, its in zip(self.blocks, other.blocks, strict=True)))

    def stacked(self, other: Memory) -> Memory:
        """Memories of one context each as that of one context, with a row for each row of the decoder."""
        pairs = zip(self.blocks, other.blocks, strict=True)
        return Memory(
            tuple(((torch.cat([k, its_k]), torch.cat([v, its_v])),) for ((k, v),), ((its_k, its_v),) in pairs)
        )

    def rows(self, index: Tensor) -> Memory:
        """The memory whose row b is row ``index`` [B] of this one."""
        return Memory(tuple(tuple((k[index], v[index]) for k, v in block) for block in self.blocks))

    @property
    def num_rows(self) -> int:
        """Rows of the first context."""
        return len(self.blocks[0][0][0])


def append(old: Tensor, new: Tensor) -> Tensor:
    """Concatenate ``old`` and ``new`` [B or 1, h, S, d]."""
    rows = max(len(old), len(new))
    return torch.cat([old.expand(rows, -1, -1, -1), new.expand(rows, -1, -1, -1)], dim=2)


class DecoderBlock(nn.Module):
    """Modulated and gated self-attention and MLP, with plain cross-attention to the context between them."""

    crosses: ClassVar[bool] = True  # False: without the cross-attention

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attention_dropout: float,
        projection_dropout: float,
    ) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))
        self.norm1 = layer_norm(width)
        self.self_attention = SelfAttention(width, num_heads, attention_dropout, projection_dropout)
        if self.crosses:
            self.norm2 = layer_norm(width)
            self.cross_attention = CrossAttention(width, num_heads, attention_dropout, projection_dropout)
        self.norm3 = layer_norm(width)
        self.mlp = MLP(width, mlp_ratio, projection_dropout)

    def forward(self, x: Tensor, modulation: Tensor, keys_values: tuple[KeysValuesPair, ...] = ()) -> Tensor:
        """``x`` [(V B), N, D], ``modulation`` [(V B) or 1, 6, D] -> [(V B), N, D]."""
        rows = (self.scale_shift_table + modulation).chunk(6, dim=1)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = rows
        x = x + gate_attention * self.self_attention(
            modulate(self.norm1(x), shift_attention, scale_attention)
        )
        if self.crosses:
            x = x + self.cross_attention(self.norm2(x), keys_values)
        return x + gate_mlp * self.mlp(modulate(self.norm3(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated normalisation and the projection to velocities, initialised to zero."""

    def __init__(self, width: int, out_features: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, width) / math.sqrt(width))
        self.norm = layer_norm(width, affine=False)
        self.linear = nn.Linear(width, out_features)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """``x`` [B, N, D], time ``embedding`` [B or 1, D] -> [B, N, C p p]."""
        shift, scale = (self.scale_shift_table + embedding[:, None]).chunk(2, dim=1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiffusionDecoder(nn.Module):
    """Flow-matching decoder of TransDiff (arXiv 2506.09482, section 3)."""

    block: ClassVar[Callable[..., nn.Module]] = DecoderBlock

    def __init__(self, config: ModelConfig | TransDiffPartsConfig) -> None:
        super().__init__()
        width, dropout = config.width, (config.attention_dropout, config.projection_dropout)
        self.patch_size = config.patch_size
        self.position = learned(1, config.num_tokens, width)
        self.time_embedding = TimeEmbedding(width)
        self.context_projection = nn.Linear(width, width)
        self.input_projection = nn.Linear(config.token_features, width)
        self.blocks = nn.ModuleList(
            self.block(width, config.num_heads, config.mlp_ratio, *dropout)
            for _ in range(config.decoder_blocks)
        )
        self.final = FinalLayer(width, config.token_features)
        self.apply(initialise)
        nn.init.zeros_(self.final.linear.weight)

    def memory_layers(self) -> list[nn.Module]:
        """The layers used by ``memory``."""
        attentions: list[CrossAttention] = [block.cross_attention for block in self.blocks]  # type: ignore[misc]
        return [self.context_projection, *(layer for a in attentions for layer in (a.key, a.value))]

    def memory(self, context: Tensor, visible: tuple[int, ...]) -> Memory:
        """Keys and values of the first ``visible[i]`` tokens of ``context`` [B, S, D], for rows' share i."""
        projected = self.context_projection(context)
        blocks = []
        for block in self.blocks:
            k, v = block.cross_attention.keys_values(projected)  # type: ignore[union-attr, operator]
            blocks.append(tuple((k[:, :, :s], v[:, :, :s]) for s in visible))
        return Memory(tuple(blocks))

    def tokens_of(self, x_t: Tensor) -> Tensor:
        """The embedded patches [(V B), N, D] of ``x_t`` [(V B), C, H, W]."""
        tokens = patchify(x_t, self.patch_size).to(self.input_projection.weight.dtype)
        return self.input_projection(tokens) + self.position

    def forward(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Velocity of ``x_t`` [(V B), C, H, W], ordered (reference, draw, image), at ``t`` [(V B)] or [1].

        ``x_t`` may be more precise than the weights.
        """
        x = self.tokens_of(x_t)
        embedding, modulation = self.time_embedding(t)
        for block, keys_values in zip(self.blocks, memory.blocks, strict=True):
            x = block(x, modulation, keys_values)
        return unpatchify(self.final(x, embedding), self.patch_size, x_t.shape[-2])
