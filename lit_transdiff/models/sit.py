"""SiT and DiT: one transformer over the patches of a noisy latent (arXiv 2401.08740 and 2212.09748).

The names of the weights are those of the released files. Shapes: B rows, N patches, D width, C H W a latent,
p patch size.
"""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import AdaptiveOutput, Modulation, TimeMLP, initialise_adaptive
from lit_transdiff.models.layers import MLP, SelfAttention, initialise, layer_norm, modulate
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack, in_one_pass, times_of_rows

if TYPE_CHECKING:
    from lit_transdiff.config import ModelSettings, SamplingConfig
    from lit_transdiff.config.sit import SiTConfig


class SiTBlock(nn.Module):
    """Self-attention and MLP, modulated and gated by the condition."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width, affine=False)
        self.attn = SelfAttention(width, num_heads, 0.0, 0.0)
        self.norm2 = layer_norm(width, affine=False)
        self.mlp = MLP(width, mlp_ratio, 0.0, tanh=True)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [B, N, D], ``condition`` [B or 1, 1, D] -> [B, N, D]."""
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = (
            self.adaLN_modulation(condition)
        )
        x = x + gate_attention * self.attn(modulate(self.norm1(x), shift_attention, scale_attention))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def position_table(width: int, side: int) -> Tensor:
    """Fixed positions [side^2, D] of a square grid: sines and cosines of the column, then of the row."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    grid = torch.cat([line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1)
    return grid.flatten(0, 1).to(torch.get_default_dtype())


def position_of(old: Tensor, new: Tensor, config: ModelSettings) -> Tensor:
    """The fixed table of the new model."""
    return new


class SiT(Paradigm):
    """SiT predicts the velocity of the image as one part. In released files t = 1 is data and t = 0 noise."""

    stacks: ClassVar = {"blocks": Stack("blocks", "num_blocks")}
    adaptation = Adaptation(
        classes="y_embedder.embedding_table.weight",
        rules={"pos_embed": (position_of, "it is a formula")},
        shaped=("x_embedder.proj.weight", "final_layer.linear.weight", "final_layer.linear.bias"),
    )
    config: SiTConfig

    def __init__(self, config: SiTConfig) -> None:
        super().__init__()
        self.config = config
        self.part_sizes, self.token = (1,), (config.latent_channels, config.latent_size, config.latent_size)
        width, p = config.width, config.patch_size
        out_features = config.latent_channels * p**2 * (2 if config.learn_sigma else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(config.latent_channels, width, p, stride=p)})
        self.t_embedder = TimeMLP(width)
        self.y_embedder = nn.ModuleDict(
            {"embedding_table": nn.Embedding(config.num_classes + 1, width)}
        )  # the last: the null class
        self.pos_embed = nn.Parameter(
            position_table(width, config.latent_size // p)[None], requires_grad=False
        )
        self.blocks = nn.ModuleList(
            SiTBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.num_blocks)
        )
        self.final_layer = AdaptiveOutput(width, out_features)
        self.apply(initialise).apply(initialise_adaptive)
        patches = self.x_embedder["proj"]
        nn.init.xavier_uniform_(patches.weight.flatten(1))  # type: ignore[operator, arg-type]
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The released network's output [B, C or 2C, H, W] for ``x`` [B, C, H, W], its own ``t`` and
        ``labels`` [B].

        The label ``num_classes`` is the null class. ``x`` may be more precise than the weights.
        """
        patches = self.x_embedder["proj"](x.to(self.pos_embed.dtype))
        h = rearrange(patches, "b d h w -> b (h w) d") + self.pos_embed
        condition = (self.t_embedder(t) + self.y_embedder["embedding_table"](labels))[:, None]
        for block in self.blocks:
            h = block(h, condition)
        p, rows = self.config.patch_size, x.shape[-2] // self.config.patch_size
        return rearrange(
            self.final_layer(h, condition), "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=rows
        )

    def prediction_of(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The velocity towards noise of ``x_t`` [B, C, H, W] at ``t`` [B] or [1]."""
        return -self(x_t, 1 - t, labels)[:, : self.config.latent_channels]

    # --- the seam

    def parts(self, x: Tensor) -> Tensor:
        return x

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Tensor:
        return labels.masked_fill(drop, self.config.num_classes)

    def predict(self, x_t: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        return self.prediction_of(x_t[:, 0], t[:, 0], memory.repeat(len(x_t) // len(memory)))[:, None]

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        both = torch.cat([labels, torch.full_like(labels, self.config.num_classes)])
        image = yield Problem(self.token, partial(self.at_one_time, labels), partial(self.guided, both))
        return image[:, None]

    def at_one_time(self, labels: Tensor, x_t: Tensor, t: float | Tensor) -> Tensor:
        """The prediction at a time of all rows, or of each, in the precision of the state."""
        return self.prediction_of(x_t, times_of_rows(t, x_t), labels).to(x_t.dtype)

    def guided(self, both: Tensor, x_t: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """The predictions for the classes of ``both`` and for the null class, which stands after them."""
        c, u = in_one_pass(self.at_one_time, both, x_t, t)
        return c, torch.cat([u[:, : self.num_guided], c[:, self.num_guided :]], dim=1)

    @property
    def num_guided(self) -> int:
        """The number of first channels with guidance."""
        return self.config.guided_channels or self.config.latent_channels


class DiT(SiT):
    """SiT's network predicts noise and variance of a discrete step; variances are not guided."""

    process = "linear_diffusion"
    prediction = "noise_and_variance"

    def prediction_of(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Noise and variance values [B, 2 C, H, W]."""
        return self(x_t, t, labels)
