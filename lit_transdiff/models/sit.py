"""SiT and DiT: one transformer over the patches of a noisy latent (arXiv 2401.08740 and 2212.09748).

The names of the weights are those of the released files. Shapes: B rows, N patches, D width, C H W a latent, p patch size.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from lit_transdiff.models.adaptive import AdaptiveOutput, Modulation, TimeMLP, initialise_adaptive
from lit_transdiff.models.layers import MLP, SelfAttention, initialise, layer_norm, modulate


class SiTBlock(nn.Module):
    """Self-attention and MLP, both modulated and gated by the condition."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width, affine=False)
        self.attn = SelfAttention(width, num_heads, 0.0, 0.0)
        self.norm2 = layer_norm(width, affine=False)
        self.mlp = MLP(width, mlp_ratio, 0.0, tanh=True)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [B, N, D], ``condition`` [B or 1, 1, D] -> [B, N, D]."""
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(condition)
        x = x + gate_attention * self.attn(modulate(self.norm1(x), shift_attention, scale_attention))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class PatchTransformer(nn.Module):
    """The network of SiT and DiT; with ``learn_sigma`` it has twice the outputs, of which the second half are variance values."""

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        num_blocks: int,
        mlp_ratio: float,
        num_classes: int,
        latent_channels: int,
        latent_size: int,
        patch_size: int,
        learn_sigma: bool = False,
    ) -> None:
        super().__init__()
        self.null_class = num_classes
        self.patch_size = patch_size
        out_channels = latent_channels * (2 if learn_sigma else 1)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(latent_channels, width, patch_size, stride=patch_size)})
        self.t_embedder = TimeMLP(width)
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})
        self.pos_embed = nn.Parameter(position_table(width, latent_size // patch_size)[None], requires_grad=False)
        self.blocks = nn.ModuleList(SiTBlock(width, num_heads, mlp_ratio) for _ in range(num_blocks))
        self.final_layer = AdaptiveOutput(width, out_channels * patch_size**2)
        self.apply(initialise).apply(initialise_adaptive)
        patches = self.x_embedder["proj"]
        nn.init.xavier_uniform_(patches.weight.flatten(1))  # type: ignore[operator, arg-type]
        nn.init.zeros_(patches.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Prediction [B, C or 2C, H, W] of ``x`` [B, C, H, W] at ``t`` [B] or [1], embedded as it is; ``labels`` [B] or [1].

        The label ``null_class`` is that of no class. ``x`` may be more precise than the weights.
        """
        patches = self.x_embedder["proj"](x.to(self.pos_embed.dtype))
        h = rearrange(patches, "b d h w -> b (h w) d") + self.pos_embed
        condition = (self.t_embedder(t) + self.y_embedder["embedding_table"](labels))[:, None]
        for block in self.blocks:
            h = block(h, condition)
        p, rows = self.patch_size, x.shape[-2] // self.patch_size
        return rearrange(self.final_layer(h, condition), "b (h w) (p q c) -> b c (h p) (w q)", p=p, q=p, h=rows)


def position_table(width: int, side: int) -> Tensor:
    """Fixed positions [side^2, D] of a square grid: sines and cosines of the column, then those of the row, from float64."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)
    grid = torch.cat([line.expand(side, -1, -1), line[:, None].expand(-1, side, -1)], dim=-1)
    return grid.flatten(0, 1).to(torch.get_default_dtype())
