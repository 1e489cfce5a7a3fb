"""ACDiT: autoregression over squares of an image, each sampled by diffusion given the clean earlier ones
(arXiv 2412.07720).

The names of the weights are those of the released files. Shapes: B images, C rows of clean tokens, R of
noised ones, N tokens of a row, K parts of a row, n tokens of a part, c numbers of a token, D width, h heads,
d numbers of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import (
    AdaptiveOutput,
    Modulation,
    TimeMLP,
    initialise_adaptive,
    scale_of_time,
)
from lit_transdiff.models.layers import MLP, KeysValues, RMSNorm, attend_to_all, initialise, modulate
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows
from lit_transdiff.models.tokens import join_squares, split_squares

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.acdit import ACDiTConfig


class SkipCausalAttention(nn.Module):
    """Clean tokens see the clean parts up to their own; noised ones see earlier clean parts and their own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = (RMSNorm(width // num_heads) for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, clean: int, parts: int, angles: Tensor, past: KeysValues | None) -> Tensor:
        """``x`` [(C + R), N, D], the first ``clean`` = C rows clean, all of as many ``parts`` -> the same.

        ``past`` contains keys and values of the clean parts before ``x``; those of its clean rows are
        appended.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = (turned(z, angles).to(v.dtype) for z in (self.q_norm(q), self.k_norm(k)))
        past = KeysValues() if past is None else past
        before = 0 if past.keys is None else past.keys.shape[2]
        of_clean: list[Tensor] = []
        of_noised: list[Tensor] = []
        if clean:
            keys, values = past.extend(k[:clean], v[:clean])
        for i, j in pairwise(range(0, x.shape[1] + 1, x.shape[1] // parts)):
            if clean:
                known = keys[:, :, : before + j], values[:, :, : before + j]
                of_clean.append(attend_to_all(q[:clean, :, i:j], *known))
            if clean < len(x):
                own = k[clean:, :, i:j], v[clean:, :, i:j]
                seen = with_own(past.keys, own[0], before + i), with_own(past.values, own[1], before + i)
                of_noised.append(attend_to_all(q[clean:, :, i:j], *seen))
        y = torch.cat([torch.cat(pieces, dim=2) for pieces in (of_clean, of_noised) if pieces])
        return self.proj(rearrange(y, "b h n d -> b n (h d)"))


def with_own(past: Tensor | None, own: Tensor, number: int) -> Tensor:
    """The first ``number`` clean keys or values [C, h, S, d], then those of a noised part [R, h, n, d]."""
    if past is None or not number:
        return own
    return torch.cat([past[:, :, :number].repeat(len(own) // len(past), 1, 1, 1), own], dim=2)


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """``x`` [..., N, d] by ``angles`` [N, d] as in the released code, whose angle pairs are no rotation."""
    first, second = x.chunk(2, dim=-1)
    return x * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()


def angles_of(grid: int, numbers: int, device: torch.device) -> Tensor:
    """Angles of a square grid of tokens, [grid, grid, d]: of the row, twice, then of the column, twice."""
    base = (int(8 * grid / math.pi) // 100 + 1) * 100
    line = torch.arange(grid, device=device)[:, None] * base ** -torch.linspace(
        0, 1, numbers // 4, device=device
    )
    rows, columns = line[:, None].expand(-1, grid, -1), line.expand(grid, -1, -1)
    return torch.cat([rows, rows, columns, columns], dim=-1)


class ACDiTBlock(nn.Module):
    """Self-attention and MLP, the same for all tokens; only noised ones are modulated and gated."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = RMSNorm(width)
        self.attn = SkipCausalAttention(width, num_heads)
        self.norm2 = RMSNorm(width)
        self.mlp = MLP(width, mlp_ratio, 0.0, tanh=True)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, angles: Tensor, past: KeysValues | None = None) -> Tensor:
        """``x`` [(C + R), N, D], ``condition`` [R, K, D] of noised rows, ``angles`` [N, d] -> like ``x``."""
        clean, parts = len(x) - len(condition), condition.shape[1]

        def steered(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
            noised = change(rearrange(x[clean:], "r (k n) d -> r k n d", k=parts))
            return torch.cat([x[:clean], rearrange(noised, "r k n d -> r (k n) d")])

        steering = (z[:, :, None] for z in self.adaLN_modulation(condition))
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = steering
        h = steered(self.norm1(x), lambda z: modulate(z, shift_attention, scale_attention))
        x = x + steered(self.attn(h, clean, parts, angles, past), lambda z: gate_attention * z)
        h = steered(self.norm2(x), lambda z: modulate(z, shift_mlp, scale_mlp))
        return x + steered(self.mlp(h), lambda z: gate_mlp * z)


@dataclass(eq=False)
class Known:
    """The memory of noised tokens."""

    labels: Tensor  # [B], ``num_classes`` is the null class
    # [B, N, c]: the image, of which a noised part sees the parts before; of no rows where ``past`` has them
    clean: Tensor
    first: int = 0  # position of the first noised token in the image
    past: Sequence[KeysValues | None] = ()  # keys and values of the earlier clean parts, for each block


class ACDiT(Paradigm):
    """ACDiT: in training all parts, each at its own time, pass the network together with the clean image.
    Clean tokens see neither class nor time, so that in sampling their keys and values serve both passes of
    the guidance.
    """

    process = "linear_diffusion"
    prediction = "noise"
    static = ("extend",)
    stacks: ClassVar = {"blocks": Stack("blocks", "num_blocks")}
    adaptation = Adaptation(
        classes="y_embedder.embedding_table.weight",
        shaped=("x_embedder.weight", "final_layer.linear.weight", "final_layer.linear.bias"),
    )
    config: ACDiTConfig

    def __init__(self, config: ACDiTConfig) -> None:
        super().__init__()
        self.config, width, features = config, config.width, config.token_features
        self.part_sizes, self.token = (config.tokens_of_part,) * config.parts_per_side**2, (features,)
        self.x_embedder = nn.Linear(features, width, bias=False)
        self.t_embedder = TimeMLP(width, scale_of_time(config.process))
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(config.num_classes + 1, width)}
        )  # the last: the null class
        self.blocks = nn.ModuleList(
            ACDiTBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.num_blocks)
        )
        self.final_layer = AdaptiveOutput(width, features, RMSNorm(width))
        self.apply(initialise).apply(initialise_adaptive)

    def forward(self, x_t: Tensor, t: Tensor, known: Known) -> Tensor:
        """The noise, or velocity, of parts ``x_t`` [R, N, c] at ``t`` [R, K] or [1, 1]; the clean image
        passes beside them.

        ``x_t`` may be more precise than the weights.
        """
        times = self.t_embedder(t.flatten()).unflatten(0, t.shape)
        classes = self.y_embedder["embedding_table"](known.labels.repeat(len(x_t) // len(known.labels)))
        condition = times + classes[:, None]
        x = self.transform(torch.cat([known.clean, x_t]), condition, known.first, known.past)
        noised = rearrange(x[len(known.clean) :], "r (k n) d -> r k n d", k=condition.shape[1])
        return rearrange(self.final_layer(noised, condition[:, :, None]), "r k n c -> r (k n) c")

    def transform(
        self, x: Tensor, condition: Tensor, first: int, past: Sequence[KeysValues | None]
    ) -> Tensor:
        """Tokens [(C + R), N, c] from the place ``first`` on, through all blocks: [(C + R), N, D]."""
        config = self.config
        angles = angles_of(config.grid, config.width // config.num_heads, x.device).movedim(-1, 0)
        angles = split_squares(angles, config.parts_per_side, 1)
        h = self.x_embedder(x.to(self.x_embedder.weight.dtype))
        for i, block in enumerate(self.blocks):
            h = block(h, condition, angles[first : first + x.shape[1]], past[i] if past else None)
        return h

    # --- the seam

    def parts(self, x: Tensor) -> Tensor:
        return split_squares(x[:, 0], self.config.parts_per_side, self.config.patch_size)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Known:
        return Known(labels.masked_fill(drop, self.config.num_classes), self.parts(x))

    def predict(self, x_t: Tensor, t: Tensor, memory: Known) -> Tensor:
        return self(x_t, t, memory)

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        config, size, number = self.config, self.part_sizes[0], len(self.part_sizes)
        past, drawn = [KeysValues() for _ in self.blocks], list[Tensor]()
        both = torch.cat([labels, torch.full_like(labels, config.num_classes)])
        for k in range(number):
            if drawn:
                past = self.extend(past, drawn[-1], (k - 1) * size)
            problem = self.problem(labels, both, k * size, past, (k + 1) / number)
            drawn.append((yield problem))
        latents = join_squares(
            torch.cat(drawn, dim=1), config.parts_per_side, config.patch_size, config.latent_size
        )
        return latents[:, None]

    def extend(self, past: list[KeysValues], drawn: Tensor, first: int) -> list[KeysValues]:
        """``past`` and the keys and values of a ``drawn`` part [B, n, c], whose first token is ``first``."""
        longer = [replace(block) for block in past]
        self.transform(drawn, drawn.new_zeros(0, 1, self.config.width), first, longer)
        return longer

    def problem(
        self, labels: Tensor, both: Tensor, first: int, past: list[KeysValues], progress: float
    ) -> Problem:
        """The problem of the part whose first token is ``first``."""
        shape = (self.part_sizes[0], *self.token)
        none = torch.zeros(0, *shape, device=labels.device)
        alone, guided = (Known(rows, none, first, past) for rows in (labels, both))

        pair = partial(in_one_pass, self.at_one_time, guided)
        return Problem(shape, partial(self.at_one_time, alone), pair, progress)

    def at_one_time(self, known: Known, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The noise at a step of all rows, or of each, in the precision of the state."""
        return self(x_t, times_of_rows(t, x_t)[:, None], known).to(x_t.dtype)
