"""FlowAR: a transformer from coarse to fine scales, and a flow network for the tokens of each (arXiv
2412.15205).

The names of the weights are those of the released files. Shapes: B images, R rows of noisy tokens, N tokens
of all scales, K scales, n tokens of some of them, c numbers of a token, D width, W width of the flow network.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import AdaptiveOutput, TimeMLP, whole_time
from lit_transdiff.models.layers import KeysValues, RMSNorm, attend, initialise, learned, modulate
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows
from lit_transdiff.models.rotary import (
    GatedMLP,
    RotaryAttention,
    RotaryBlock,
    grid_places,
    plain_rms_norm,
    rotary_turns,
    rotated,
    through,
)
from lit_transdiff.models.tokens import patchify, unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.flowar import FlowARConfig


@dataclass(eq=False)
class Scales:
    """The memory of noisy tokens of successive scales."""

    context: Tensor  # [B, n, D]: the transformer's output
    embedded: Tensor  # [B, n, W]: of it, for the modulation
    sides: tuple[int, ...]  # tokens of a side of each scale

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(side**2 for side in self.sides)


def places_of(sides: Sequence[int], grid: int, device: torch.device) -> Tensor:
    """Places [n, 2] of the tokens of scales, which all extend over the whole grid."""
    return torch.cat([grid_places(side, grid, device).flatten(0, 1) for side in sides])


def to_tokens(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Repeat ``x`` [R, K, ...] of scales for their tokens: [R, n, ...]."""
    pieces = zip(x.split(1, dim=1), sizes, strict=True)
    return torch.cat([piece.expand(-1, size, -1) for piece, size in pieces], dim=1)


class FlowBlock(nn.Module):
    """Version 1: attention within a scale, and MLP, modulated and gated by time and context of each token."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.norm = plain_rms_norm(width)
        self.attn = RotaryAttention(width, num_heads, bias=False)
        self.mlp = GatedMLP(width, 4.0)
        self.ada_lin = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, times: Tensor, condition: Tensor, scales: Scales, turns: Tensor) -> Tensor:
        """``x`` [R, n, W] with ``times`` [R or 1, K, W] and ``condition`` [R, n, W] -> [R, n, W]."""
        steering = self.ada_lin(F.silu(condition)).chunk(6, dim=-1)
        gate_attention, gate_mlp, scale_attention, scale_mlp, shift_attention, shift_mlp = steering
        h = modulate(self.norm(x), shift_attention, scale_attention)
        x = x + gate_attention * self.attn(h, turns, scales.sizes, isolated=True)
        return x + gate_mlp * self.mlp(modulate(self.norm(x), shift_mlp, scale_mlp))


class RotaryCrossAttention(nn.Module):
    """Attention within a scale from its noisy tokens to its context."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(context_width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, turns: Tensor, sizes: Sequence[int]) -> Tensor:
        """``x`` [R, n, W], ``context`` [B, n, D], of which all draws of an image share a row -> [R, n, W]."""
        q = rearrange(self.q(x), "r n (h d) -> r h n d", h=self.num_heads)
        k, v = rearrange(self.kv(context), "b n (two h d) -> two b h n d", two=2, h=self.num_heads)
        q, k = (rotated(z, turns).to(v.dtype) for z in (q, k))
        k, v = (z.repeat(len(x) // len(context), 1, 1, 1) for z in (k, v))
        y = attend(q, k, v, sizes, isolated=True)
        return self.proj(rearrange(y, "r h n d -> r n (h d)"))


class CrossFlowBlock(nn.Module):
    """Version 2: attention modulated by the time, attention to the context, and MLP modulated by both."""

    def __init__(self, width: int, num_heads: int, context_width: int) -> None:
        super().__init__()
        self.norm = plain_rms_norm(width)
        self.attn = RotaryAttention(width, num_heads, bias=False)
        self.norm2_1, self.norm2_2 = RMSNorm(width), RMSNorm(context_width)
        self.crossattn = RotaryCrossAttention(width, num_heads, context_width)
        self.mlp = GatedMLP(width, 4.0)
        self.ada_lin_attn, self.ada_lin_mlp = (nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, x: Tensor, times: Tensor, condition: Tensor, scales: Scales, turns: Tensor) -> Tensor:
        """See ``FlowBlock.forward``."""
        gate, scale, shift = to_tokens(self.ada_lin_attn(F.silu(times)), scales.sizes).chunk(3, dim=-1)
        h = self.attn(modulate(self.norm(x), shift, scale), turns, scales.sizes, isolated=True)
        x = x + gate * h
        x = x + self.crossattn(self.norm2_1(x), self.norm2_2(scales.context), turns, scales.sizes)
        gate, scale, shift = self.ada_lin_mlp(F.silu(condition)).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.norm(x), shift, scale))


class FlowNet(nn.Module):
    """Predicts the velocity of the tokens of each scale together."""

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        self.config, width = config, config.head_width
        self.time_embed = TimeMLP(width)
        self.cond_embed = nn.Linear(config.width, width)
        self.input_proj = nn.Linear(config.token_features, width)
        block = {1: FlowBlock, 2: CrossFlowBlock}[config.head_version]
        self.res_blocks = nn.ModuleList(
            block(width, config.heads_of_head, config.width) for _ in range(config.head_blocks)
        )
        self.final_layer = AdaptiveOutput(width, config.token_features, plain_rms_norm(width))

    def forward(self, x_t: Tensor, t: Tensor, scales: Scales) -> Tensor:
        """``x_t`` [R, n, c] at times ``t`` [R, K] or [1, 1] -> [R, n, c].

        ``x_t`` may be more precise than the weights.
        """
        config = self.config
        times = self.time_embed(whole_time(t).flatten()).unflatten(0, t.shape)
        of_context = scales.embedded.repeat(len(x_t) // len(scales.embedded), 1, 1)
        condition = to_tokens(times, scales.sizes) + of_context
        places = places_of(scales.sides, config.grid, x_t.device)
        turns = rotary_turns(places, config.head_width // config.heads_of_head)
        x = self.input_proj(x_t.to(self.input_proj.weight.dtype))
        for block in self.res_blocks:
            x = block(x, times, condition, scales, turns)
        return self.final_layer(x, condition)


class FlowAR(Paradigm):
    """A part is a scale: the latent's mean over squares. A scale is the larger input of the transformer for
    the next one; that of the first is the class.
    """

    stacks: ClassVar = {
        "encoder": Stack("encoder_blocks", "encoder_blocks"),
        "decoder": Stack("decoder_blocks", "decoder_blocks"),
        "head": Stack("flownet.res_blocks", "head_blocks"),
    }
    head_prefixes = ("flownet.",)
    adaptation = Adaptation(
        classes="class_emb.weight",
        shaped=(
            "encoder_pos_embed_learned decoder_pos_embed_learned diffusion_pos_embed_learned z_proj.weight "
            "flownet.input_proj.weight flownet.final_layer.linear.weight flownet.final_layer.linear.bias"
        ).split(),
    )
    config: FlowARConfig

    def __init__(self, config: FlowARConfig) -> None:
        super().__init__()
        self.config, width, features = config, config.width, config.token_features
        self.part_sizes, self.token = tuple(side**2 for side in config.sides), (features,)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # the last: the null class
        self.z_proj = nn.Linear(features, width)
        self.encoder_pos_embed_learned = learned(1, config.num_tokens, width)
        self.z_proj_ln = RMSNorm(width)
        more = config.mlp_ratio, config.attention_dropout, config.projection_dropout
        self.encoder_blocks = nn.ModuleList(
            RotaryBlock(width, config.num_heads, *more) for _ in range(config.encoder_blocks)
        )
        self.encoder_norm = RMSNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pos_embed_learned = learned(1, config.num_tokens, width)
        self.decoder_blocks = nn.ModuleList(
            RotaryBlock(width, config.heads_of_decoder, *more) for _ in range(config.decoder_blocks)
        )
        self.decoder_norm = RMSNorm(width)
        self.diffusion_pos_embed_learned = learned(1, config.num_tokens, width)
        self.flownet = FlowNet(config)
        self.apply(initialise)

    @classmethod
    def check(cls, config: FlowARConfig) -> None:
        config.check_scales()

    def transform(self, x: Tensor, classes: Tensor, scales: slice, past: Sequence[KeysValues] = ()) -> Scales:
        """The memory of ``scales``, of inputs [B, n, D], class vectors [B, D] and ``past``, which grows."""
        config, number, sides = self.config, self.config.encoder_blocks, self.config.sides[scales]
        first, sizes = sum(self.part_sizes[: scales.start]), self.part_sizes[scales]
        at, places = slice(first, first + x.shape[1]), places_of(sides, config.grid, x.device)
        condition = classes[:, None]
        x = self.z_proj_ln(x + self.encoder_pos_embed_learned[:, at])
        x = through(self.encoder_blocks, x, condition, places, sizes, past[:number])
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, at]
        x = through(self.decoder_blocks, x, condition, places, sizes, past[number:])
        context = self.decoder_norm(x) + self.diffusion_pos_embed_learned[:, at]
        return Scales(context, self.flownet.cond_embed(context), sides)

    def smaller(self, x: Tensor, side: int) -> Tensor:
        """Latents [B, C, H, W] as means over squares, with ``side`` tokens of a side."""
        size = side * self.config.patch_size
        return F.interpolate(x, (size, size), mode="area")

    def enlarged(self, x: Tensor, side: int) -> Tensor:
        """The input [B, n, c] of the scale of ``side`` from the scale before, [B, C, h, w]."""
        size, p = self.config.latent_size, self.config.patch_size
        return patchify(self.smaller(F.interpolate(x, (size, size), mode="bicubic"), side), p)

    def first_input(self, classes: Tensor) -> Tensor:
        """The input [B, n, D] of the first scale: class vectors [B, D], for each of its tokens."""
        return classes[:, None].expand(-1, self.part_sizes[0], -1)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.z_proj(tokens.to(self.z_proj.weight.dtype))

    # --- the seam

    @property
    def evaluated(self) -> FlowNet:
        return self.flownet

    def parts(self, x: Tensor) -> Tensor:
        scales = [patchify(self.smaller(x[:, 0], s), self.config.patch_size) for s in self.config.sides]
        return torch.cat(scales, dim=1)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Scales:
        sides, classes = self.config.sides, self.class_emb(labels.masked_fill(drop, self.config.num_classes))
        larger = [self.enlarged(self.smaller(x[:, 0], s), s_next) for s, s_next in pairwise(sides)]
        inputs = [self.first_input(classes), *([self.embed(torch.cat(larger, dim=1))] if larger else ())]
        return self.transform(torch.cat(inputs, dim=1), classes, slice(0, len(sides)))

    def predict(self, x_t: Tensor, t: Tensor, memory: Scales) -> Tensor:
        return self.flownet(x_t, t, memory)

    def weights(self, memory: Scales) -> Tensor:
        """All tokens count the same; made where the context is, without a copy from the host."""
        return torch.cat([torch.full((1,), float(n), device=memory.context.device) for n in memory.sizes])

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        config, number, rows, times = self.config, len(self.part_sizes), labels, 1
        if sampling.guidance_scale > 1:  # all images again with the null class
            rows, times = torch.cat([labels, torch.full_like(labels, config.num_classes)]), 2
        past = [KeysValues() for _ in (*self.encoder_blocks, *self.decoder_blocks)]
        classes = self.class_emb(rows)
        x = self.first_input(classes)
        for k, side in enumerate(config.sides):
            memory = self.transform(x, classes, slice(k, k + 1), past)
            progress = k / (number - 1) if number > 1 else 1.0  # the first scale is not guided
            tokens = yield self.problem(memory, len(labels), progress)
            drawn = unpatchify(tokens, config.patch_size, side * config.patch_size)
            if k + 1 < number:
                x = self.embed(self.enlarged(drawn, config.sides[k + 1])).repeat(times, 1, 1)
        return drawn[:, None]

    def stand_in(self, latest: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scale before, enlarged."""
        patch, side = self.config.patch_size, math.isqrt(latest.shape[1])
        return self.enlarged(unpatchify(latest, patch, side * patch), math.isqrt(shape[0]))

    def problem(self, scales: Scales, num_images: int, progress: float) -> Problem:
        """The problem of a scale; the second half of the rows of ``scales`` is the null class's."""
        alone = Scales(scales.context[:num_images], scales.embedded[:num_images], scales.sides)
        pair = partial(in_one_pass, self.at_one_time, scales)
        return Problem((scales.sizes[0], *self.token), partial(self.at_one_time, alone), pair, progress)

    def at_one_time(self, scales: Scales, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity at a time of all rows, or of each, in the precision of the state."""
        return self.flownet(x_t, times_of_rows(t, x_t)[:, None], scales).to(x_t.dtype)
