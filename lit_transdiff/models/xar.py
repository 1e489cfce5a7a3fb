"""xAR: autoregression over cells of an image, each by flow matching given those before it (arXiv
2502.20388).

The names of the weights are those of the released files. Shapes: B images, R rows of noisy tokens, N tokens
of an image in the order of the cells, K cells, n tokens of some of them, c numbers of a token, D width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import TimeMLP, whole_time
from lit_transdiff.models.layers import KeysValues, RMSNorm, initialise, learned
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows
from lit_transdiff.models.rotary import RotaryBlock, grid_places, through
from lit_transdiff.models.tokens import join_squares, split_squares

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.xar import XARConfig


@dataclass(eq=False)
class NoisyCells:
    """The memory of noisy cells."""

    labels: Tensor  # [B], ``num_classes`` is the null class
    first: int = 0  # place of the first noisy token in the sequence
    past: Sequence[KeysValues] = ()  # keys and values of the clean cells before, for each block


class XAR(Paradigm):
    """xAR: in training all cells are noisy, each at its own time, and a cell sees itself and those before it.

    In sampling the cells before are clean: they pass the network once, at the time 0.
    """

    stacks: ClassVar = {
        "encoder": Stack("encoder_blocks", "encoder_blocks"),
        "decoder": Stack("decoder_blocks", "decoder_blocks"),
    }
    adaptation = Adaptation(
        classes="class_emb.weight",
        shaped=(
            "encoder_pos_embed_learned decoder_pos_embed_learned z_proj.weight pred.weight pred.bias"
        ).split(),
    )
    config: XARConfig

    def __init__(self, config: XARConfig) -> None:
        super().__init__()
        self.config, width, features = config, config.width, config.token_features
        self.part_sizes, self.token = (config.tokens_of_part,) * config.parts_per_side**2, (features,)
        self.class_emb = nn.Embedding(config.num_classes + 1, width)  # the last: the null class
        self.time_embed = TimeMLP(width)
        self.z_proj = nn.Linear(features, width)
        self.encoder_pos_embed_learned = learned(1, config.grid**2, width)
        self.z_proj_ln = RMSNorm(width)
        more = config.mlp_ratio, config.attention_dropout, config.projection_dropout
        self.encoder_blocks = nn.ModuleList(
            RotaryBlock(width, config.num_heads, *more) for _ in range(config.encoder_blocks)
        )
        self.encoder_norm = RMSNorm(width)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_pos_embed_learned = learned(1, config.grid**2, width)
        self.decoder_blocks = nn.ModuleList(
            RotaryBlock(width, config.heads_of_decoder, *more) for _ in range(config.decoder_blocks)
        )
        self.decoder_norm = RMSNorm(width)
        self.pred = nn.Linear(width, features)
        self.apply(initialise)

    def forward(self, x_t: Tensor, t: Tensor, cells: NoisyCells) -> Tensor:
        """The velocity of cells ``x_t`` [R, n, c] at times ``t`` [R, K] or [1, 1].

        ``x_t`` may be more precise than the weights.
        """
        labels = cells.labels.repeat(len(x_t) // len(cells.labels))
        return self.pred(self.transform(x_t, t, labels, cells.first, [*map(copy, cells.past)]))

    def transform(
        self, x: Tensor, t: Tensor, labels: Tensor, first: int, past: Sequence[KeysValues]
    ) -> Tensor:
        """Cells [R, n, c] from the place ``first`` on -> [R, n, D]; ``past`` then holds them, too."""
        config, number = self.config, self.config.encoder_blocks
        times = self.time_embed(whole_time(t).flatten()).unflatten(0, t.shape)
        condition = self.class_emb(labels)[:, None] + times
        groups, at = (config.tokens_of_part,) * t.shape[1], slice(first, first + x.shape[1])
        places = grid_places(config.grid, config.grid, x.device).movedim(-1, 0)
        places = split_squares(places[:, None], config.parts_per_side, 1)[:, at, 0].T
        x = self.z_proj(x.to(self.z_proj.weight.dtype)) + self.encoder_pos_embed_learned[:, at]
        x = through(self.encoder_blocks, self.z_proj_ln(x), condition, places, groups, past[:number])
        x = self.decoder_embed(self.encoder_norm(x)) + self.decoder_pos_embed_learned[:, at]
        x = through(self.decoder_blocks, x, condition, places, groups, past[number:])
        return self.decoder_norm(x)

    # --- the seam

    def parts(self, x: Tensor) -> Tensor:
        return split_squares(x[:, 0], self.config.parts_per_side, self.config.patch_size)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> NoisyCells:
        return NoisyCells(labels.masked_fill(drop, self.config.num_classes))

    def predict(self, x_t: Tensor, t: Tensor, memory: NoisyCells) -> Tensor:
        return self(x_t, t, memory)

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        config, size, number = self.config, self.part_sizes[0], len(self.part_sizes)
        past, drawn = [KeysValues() for _ in (*self.encoder_blocks, *self.decoder_blocks)], list[Tensor]()
        rows, times = labels, 1
        if sampling.guidance_scale > 1:  # all images again with the null class
            rows, times = torch.cat([labels, torch.full_like(labels, config.num_classes)]), 2
        for k in range(number):
            if drawn:
                clean = drawn[-1].repeat(times, 1, 1)
                self.transform(clean, clean.new_zeros(1, 1), rows, (k - 1) * size, past)
            progress = k / (number - 1) if number > 1 else 1.0  # the first cell is not guided
            drawn.append((yield self.problem(NoisyCells(rows, k * size, past), len(labels), progress)))
        tokens = torch.cat(drawn, dim=1)
        return join_squares(tokens, config.parts_per_side, config.patch_size, config.latent_size)[:, None]

    def problem(self, cells: NoisyCells, num_images: int, progress: float) -> Problem:
        """The problem of a cell; the second half of the rows of ``cells`` is the null class's."""
        alone = NoisyCells(
            cells.labels[:num_images], cells.first, [past.first(num_images) for past in cells.past]
        )
        pair = partial(in_one_pass, self.at_one_time, cells)
        return Problem((self.part_sizes[0], *self.token), partial(self.at_one_time, alone), pair, progress)

    def at_one_time(self, cells: NoisyCells, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The velocity at a time of all rows, or of each, in the precision of the state."""
        return self(x_t, times_of_rows(t, x_t)[:, None], cells).to(x_t.dtype)
