"""A small network that denoises single tokens, given the context of each (arXiv 2406.11838, section 3), used
by MAR and ARDiff.

The names of the weights are those of the released files. Shapes: B images, L tokens of an image, n tokens of
a part, c numbers of a token, D width of the context, R rows of the network, W its width.
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.models.adaptive import AdaptiveOutput, Modulation, TimeMLP, scale_of_time
from lit_transdiff.models.layers import layer_norm, modulate
from lit_transdiff.models.paradigm import Problem, in_one_pass, times_of_rows


class HeadBlock(nn.Module):
    """A modulated and gated two-layer network of one row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[R, W] each -> [R, W]."""
        shift, scale, gate = self.adaLN_modulation(condition)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class TokenHead(nn.Module):
    """Predicts noise and variance values of single tokens independently, or for a flow their velocities."""

    def __init__(self, features: int, context_width: int, width: int, num_blocks: int, process: str) -> None:
        super().__init__()
        self.features = features
        self.time_embed = TimeMLP(width, scale_of_time(process))
        self.cond_embed = nn.Linear(context_width, width)
        self.input_proj = nn.Linear(features, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(num_blocks))
        self.final_layer = AdaptiveOutput(width, features if process == "flow" else 2 * features)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``x_t`` [R, c], ``t`` [R] or [1], ``condition`` [R, W] by ``cond_embed`` -> [R, 2 c] or [R, c]."""
        x = self.input_proj(x_t.to(self.input_proj.weight.dtype))
        condition = self.time_embed(t) + condition
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``forward`` of ``x_t`` [(M B), L, c] at ``t`` [(M B), L]; M draws share ``condition`` [B, L, W]."""
        rows = condition.repeat(len(x_t) // len(condition), 1, 1).flatten(0, 1)
        return self(x_t.flatten(0, 1), t.flatten(), rows).unflatten(0, t.shape)

    def problem(self, condition: Tensor, num_images: int, progress: float) -> Problem:
        """The problem of n tokens, [B, c, n]; in ``condition`` [(2 B), n, W] the null class's follow."""
        of_images, of_all = condition[:num_images].flatten(0, 1), condition.flatten(0, 1)
        predict, pair = partial(self.at_one_time, of_images), partial(self.guided, of_all)
        return Problem((self.features, condition.shape[1]), predict, pair, progress)

    def at_one_time(self, condition: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The prediction for ``x_t`` [B, c, n] at a time of all rows, or each, in the state's precision."""
        rows, times = rearrange(x_t, "b c n -> (b n) c"), times_of_rows(t, x_t)
        if len(times) > 1:
            times = times.repeat_interleave(x_t.shape[-1])
        output = self(rows, times, condition)
        return rearrange(output, "(b n) c -> b c n", n=x_t.shape[-1]).to(x_t.dtype)

    def guided(self, of_all: Tensor, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The predictions with and without the classes; variances are not guided."""
        c, u = in_one_pass(self.at_one_time, of_all, x_t, t)
        return c, torch.cat([u[:, : self.features], c[:, self.features :]], dim=1)
