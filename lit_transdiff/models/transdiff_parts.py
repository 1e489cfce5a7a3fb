"""TransDiff over the parts of one image, an ablation of its groups: cells in an order, or scales.

Shapes: B images, M noise draws, R rows of noisy tokens, N tokens of all parts, K parts, n tokens of some of
them, c numbers of a token, D width, T class tokens, C H W a latent.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.decoder import DiffusionDecoder, Memory
from lit_transdiff.models.encoder import EncoderBlock
from lit_transdiff.models.layers import KeysValues, initialise, layer_norm, learned
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows
from lit_transdiff.models.tokens import join_squares, patchify, split_squares, unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.transdiff_parts import TransDiffPartsConfig


@dataclass(eq=False)
class AllParts:
    """The memory of all parts, in training."""

    contexts: Memory  # a context for each part
    order: Tensor  # [B, K]: the parts as they follow each other


@dataclass(eq=False)
class SomeParts:
    """The memory of rows of tokens: each place serves a row, or R / rows of them in succession."""

    contexts: Memory
    places: Tensor  # [rows, n, D], embedded


def reordered(tokens: Tensor, parts: Tensor, number: int) -> Tensor:
    """The tokens [B, k n, D] of ``parts`` [B, k] among a ``number`` of equal ones, [B or 1, N, D]."""
    table = tokens.unflatten(1, (number, -1))
    rows = torch.arange(len(table), device=parts.device)[:, None]
    return table[rows, parts].flatten(1, 2)


class PartEncoder(nn.Module):
    """TransDiff's encoder, block-causal over parts: each is given the part before it, the first a mask token.

    Cells are told the places of what is given, besides those of what is drawn.
    """

    def __init__(self, config: TransDiffPartsConfig) -> None:
        super().__init__()
        self.config, width, sizes = config, config.width, config.part_sizes
        several, number = len(sizes) > 1, sum(sizes)
        dropout = config.attention_dropout, config.projection_dropout
        self.class_embedding = nn.Embedding(config.num_classes, width)
        self.null_class = learned(1, width)
        self.mask_token = learned(1, 1, width)
        self.projection = nn.Linear(config.token_features, width) if several else None
        self.class_position = learned(1, config.num_class_tokens, width)
        self.given_position = learned(1, number, width) if several and config.parts == "cells" else None
        self.position = learned(1, number, width)
        self.input_norm = layer_norm(width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, config.num_heads, config.mlp_ratio, *dropout)
            for _ in range(config.encoder_blocks)
        )
        self.norm = layer_norm(width)
        self.context_position = learned(1, number, width)
        self.apply(initialise)

    def class_vectors(self, labels: Tensor, drop: Tensor) -> Tensor:
        """Embeddings [B, D] of ``labels`` [B]; the null class where ``drop`` [B]."""
        vectors = self.class_embedding(labels)
        return torch.where(drop[:, None], self.null_class.to(vectors.dtype), vectors)

    def at(self, table: Tensor, order: Tensor, first: int, number: int) -> Tensor:
        """The rows [B or 1, n, D] of a ``table`` [1, N, D] for a ``number`` of parts from ``first`` on."""
        sizes = self.config.part_sizes
        if self.config.order == "random":
            return reordered(table, order[:, first : first + number], len(sizes))
        return table[:, sum(sizes[:first]) : sum(sizes[: first + number])]

    def given(self, tokens: Tensor, order: Tensor, first: int, number: int) -> Tensor:
        """The inputs [B, n, D] of later parts, made of ``tokens`` [B, n, c] of those from ``first`` on."""
        assert self.projection is not None
        x = self.projection(tokens.to(self.projection.weight.dtype))
        return x if self.given_position is None else x + self.at(self.given_position, order, first, number)

    def forward(
        self,
        classes: Tensor,
        given: Tensor | None,
        order: Tensor,
        first: int,
        number: int,
        past: list[KeysValues] | None = None,
    ) -> Tensor:
        """The context [B, n, D] of a ``number`` of parts from ``first`` on, of class vectors [B, D].

        ``given`` is the input of all but the first part of an image. ``past`` holds keys and values of
        earlier parts, and then also those of these.
        """
        config, sizes = self.config, self.config.part_sizes
        x = [] if given is None else [given]
        if first == 0:
            x = [self.mask_token.expand(len(classes), sizes[0], -1), *x]
        tokens = torch.cat(x, dim=1) + self.at(self.position, order, first, number)
        groups = None
        if first == 0:
            tokens = torch.cat([classes[:, None] + self.class_position, tokens], dim=1)
            groups = (config.num_class_tokens, *sizes[:number]) if len(sizes) > 1 else None
        h = self.input_norm(tokens)
        for i, block in enumerate(self.blocks):
            h = block(h, groups, None if past is None else past[i])
        h = self.norm(h)[:, config.num_class_tokens if first == 0 else 0 :]
        return h + self.at(self.context_position, order, first, number)


class PartDecoder(DiffusionDecoder):
    """TransDiff's decoder for the tokens of single parts."""

    def forward(self, x_t: Tensor, t: Tensor, memory: SomeParts) -> Tensor:  # type: ignore[override]
        """The velocity of ``x_t`` [R, n, c], maybe more precise than the weights, at ``t`` [R] or [1]."""
        x = self.input_projection(x_t.to(self.input_projection.weight.dtype))
        x = x + memory.places.repeat(len(x) // len(memory.places), 1, 1)
        embedding, modulation = self.time_embedding(t)
        for block, keys_values in zip(self.blocks, memory.contexts.blocks, strict=True):
            x = block(x, modulation, keys_values)
        return self.final(x, embedding)  # type: ignore[no-any-return]


class TransDiffParts(Paradigm):
    """One part is one-step AR. The decoder attends to the contexts of a part and of those before it."""

    stacks: ClassVar = {
        "encoder": Stack("encoder.blocks", "encoder_blocks"),
        "decoder": Stack("decoder.blocks", "decoder_blocks"),
    }
    head_prefixes = ("decoder.",)
    undecayed = ("decoder.",)
    adaptation = Adaptation(
        classes="encoder.class_embedding.weight",
        shaped=(
            "encoder.class_position encoder.given_position encoder.position encoder.context_position "
            "encoder.projection.weight decoder.position decoder.input_projection.weight "
            "decoder.final.linear.weight decoder.final.linear.bias"
        ).split(),
    )
    config: TransDiffPartsConfig

    def __init__(self, config: TransDiffPartsConfig) -> None:
        super().__init__()
        self.config, self.part_sizes, self.token = config, config.part_sizes, (config.token_features,)
        self.encoder, self.decoder = PartEncoder(config), PartDecoder(config)
        self.decoder.position = learned(1, sum(config.part_sizes), config.width)

    def order_of(self, number: int, normal: Normal, device: torch.device) -> Tensor:
        """The order of the parts of so many images, [B, K]."""
        if self.config.order == "random":
            return normal(len(self.part_sizes)).argsort(dim=1)
        return torch.arange(len(self.part_sizes), device=device).expand(number, -1)

    def smaller(self, x: Tensor, side: int) -> Tensor:
        """Latents [B, C, H, W] as tokens [B, n, c], means over squares, ``side`` of a side."""
        size = side * self.config.patch_size
        return patchify(F.interpolate(x, (size, size), mode="area"), self.config.patch_size)

    def enlarged(self, tokens: Tensor) -> Tensor:
        """The tokens [B, 4 n, c] that the scale after these, [B, n, c], is given."""
        p, side, size = self.config.patch_size, math.isqrt(tokens.shape[1]), self.config.latent_size
        latents = F.interpolate(unpatchify(tokens, p, side * p), (size, size), mode="bicubic")
        return self.smaller(latents, 2 * side)

    def given(self, tokens: Tensor, order: Tensor, first: int, number: int) -> Tensor:
        """The inputs of the parts after a ``number`` of them from ``first`` on, made of clean ``tokens``."""
        if self.config.parts == "scales":
            pieces = tokens.split(list(self.part_sizes[first : first + number]), dim=1)
            tokens = torch.cat([self.enlarged(piece) for piece in pieces], dim=1)
        return self.encoder.given(tokens, order, first, number)

    # --- the seam

    @property
    def evaluated(self) -> PartDecoder:
        return self.decoder  # type: ignore[return-value]

    def parts(self, x: Tensor) -> Tensor:
        if self.config.parts == "scales":
            return torch.cat([self.smaller(x[:, 0], side) for side in self.config.sides], dim=1)
        return split_squares(x[:, 0], self.config.parts_per_side, self.config.patch_size)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> AllParts:
        number, tokens = len(self.part_sizes), self.parts(x)
        order = self.order_of(len(labels), normal, x.device)
        if self.config.order == "random":
            tokens = reordered(tokens, order, number)
        before = tokens[:, : tokens.shape[1] - self.part_sizes[-1]]
        given = self.given(before, order, 0, number - 1) if number > 1 else None
        context = self.encoder(self.encoder.class_vectors(labels, drop), given, order, 0, number)
        return AllParts(self.decoder.memory(context, tuple(accumulate(self.part_sizes))), order)

    def predict(self, x_t: Tensor, t: Tensor, memory: AllParts) -> Tensor:
        """Cells pass the decoder together, scales one after the other."""
        number, draws = len(self.part_sizes), len(x_t) // len(memory.order)
        order = memory.order.repeat(draws, 1)
        if random := self.config.order == "random":
            x_t, t = reordered(x_t, order, number), t.gather(1, order)
        places = self.encoder.at(self.decoder.position, memory.order, 0, number)
        places = places.expand(len(memory.order), -1, -1)
        together, found = number if self.config.parts == "cells" else 1, []
        ends = [0, *accumulate(self.part_sizes)]
        for first in range(0, number, together):
            at, last = slice(ends[first], ends[first + together]), first + together
            rows = rearrange(x_t[:, at], "r (k n) c -> (k r) n c", k=together)
            each = repeat(places[:, at], "b (k n) d -> (k m b) n d", k=together, m=draws)
            contexts = Memory(tuple(block[first:last] for block in memory.contexts.blocks))
            times = rearrange(t[:, first:last], "r k -> (k r)")
            velocity = self.decoder(rows, times, SomeParts(contexts, each))
            found.append(rearrange(velocity, "(k r) n c -> r (k n) c", k=together))
        velocities = torch.cat(found, dim=1)
        return reordered(velocities, order.argsort(dim=1), number) if random else velocities

    def weights(self, memory: AllParts) -> Tensor:
        """All tokens count the same."""
        sizes = (torch.full((1,), float(n), device=memory.order.device) for n in self.part_sizes)
        return torch.cat([*sizes])

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        number, images = len(self.part_sizes), len(labels)
        order = self.order_of(images, normal, labels.device)
        past, drawn = [KeysValues() for _ in self.encoder.blocks], list[Tensor]()
        times = 2 if sampling.guidance_scale > 1 else 1  # all images again with the null class
        null = torch.arange(times * images, device=labels.device) >= images
        classes = self.encoder.class_vectors(labels.repeat(times), null)
        all_orders, memory = order.repeat(times, 1), None
        for j in range(number):
            given = self.given(drawn[-1], order, j - 1, 1).repeat(times, 1, 1) if drawn else None
            context = self.encoder(classes, given, all_orders, j, 1, past)
            new = self.decoder.memory(context, (context.shape[1],))
            memory = new if memory is None else memory.join(new)
            places = self.encoder.at(self.decoder.position, order, j, 1)
            drawn.append((yield self.problem(memory, places, images, (j + 1) / number)))
        return self.joined(drawn, order)[:, None]

    def joined(self, drawn: list[Tensor], order: Tensor) -> Tensor:
        """Latents [B, C, H, W] of all parts, in their ``order``."""
        config = self.config
        if config.parts == "scales":
            return unpatchify(drawn[-1], config.patch_size, config.latent_size)
        tokens = reordered(torch.cat(drawn, dim=1), order.argsort(dim=1), len(drawn))
        return join_squares(tokens, config.parts_per_side, config.patch_size, config.latent_size)

    def problem(self, memory: Memory, places: Tensor, images: int, progress: float) -> Problem:
        """The problem of a part; the second half of the rows of ``memory`` is the null class's."""
        alone = SomeParts(memory.rows(torch.arange(images, device=places.device)), places)
        pair = partial(in_one_pass, self.at_one_time, SomeParts(memory, places))
        shape = (places.shape[1], *self.token)
        return Problem(shape, partial(self.at_one_time, alone), pair, progress)

    def at_one_time(self, memory: SomeParts, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity at a time of all rows, or of each, in the precision of the state."""
        return self.decoder(x_t, times_of_rows(t, x_t), memory).to(x_t.dtype)  # type: ignore[no-any-return]

    def stand_in(self, latest: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The scale before, enlarged; for a cell, zeros."""
        return self.enlarged(latest) if self.config.parts == "scales" else super().stand_in(latest, shape)

    def units(self) -> Iterator[nn.Module | list[nn.Module]]:
        """The layers for the decoder's keys and values together, then block by block, as in TransDiff."""
        yield self.decoder.memory_layers()
        yield from super().units()
