"""ARDiff: a causal transformer over single tokens, and a small network that denoises each (the causal rows of
arXiv 2406.11838; random orders as in arXiv 2412.01827).

The names of the weights are those of the released files. Shapes: B images, L tokens of an image, n of them
in succession, c numbers of a token, D width, W width of the head.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import Modulation, initialise_adaptive
from lit_transdiff.models.layers import (
    MLP,
    KeysValues,
    SelfAttention,
    initialise,
    layer_norm,
    learned,
    modulate,
)
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack
from lit_transdiff.models.token_head import TokenHead
from lit_transdiff.models.tokens import across, patchify, rows_at, unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.ardiff import ARDiffConfig


class CausalBlock(nn.Module):
    """Causal self-attention and MLP, modulated and gated by a condition of each token."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, num_heads, 0.0, 0.0)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, mlp_ratio, 0.0)
        self.adaLN_modulation = Modulation(width, 6)

    def forward(self, x: Tensor, condition: Tensor, past: KeysValues | None = None) -> Tensor:
        """``x`` and ``condition`` [B, n, D], after the tokens of ``past`` -> [B, n, D]."""
        steering = self.adaLN_modulation(condition)
        shift_attention, scale_attention, gate_attention, shift_mlp, scale_mlp, gate_mlp = steering
        one_by_one = (1,) * x.shape[1]
        h = modulate(self.norm1(x), shift_attention, scale_attention)
        x = x + gate_attention * self.attn(h, one_by_one, past)
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class AdaptiveNorm(nn.Module):
    """Normalisation modulated by the class."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(width, affine=False)
        self.adaLN_modulation = Modulation(width, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``x`` [B, n, D] and ``condition`` [B, 1, D] -> [B, n, D]."""
        return modulate(self.norm_final(x), *self.adaLN_modulation(condition))


class ARDiff(Paradigm):
    """Every token is a part. The transformer is told the place that it predicts, so any order is possible."""

    process = "cosine_diffusion"
    prediction = "noise_and_variance"
    stacks: ClassVar = {
        "blocks": Stack("transformer.blocks", "num_blocks"),
        "head": Stack("diffloss.net.res_blocks", "head_blocks"),
    }
    head_prefixes = ("diffloss.",)
    undecayed = ("diffloss.",)
    adaptation = Adaptation(
        classes="class_emb.weight",
        shaped=(
            "pos_embed target_pos_embed timesteps_embeddings x_embedder.weight diffloss.net.input_proj.weight"
            " diffloss.net.final_layer.linear.weight diffloss.net.final_layer.linear.bias"
        ).split(),
    )
    config: ARDiffConfig

    def __init__(self, config: ARDiffConfig) -> None:
        super().__init__()
        self.config, width, number = config, config.width, config.num_tokens
        self.part_sizes, self.token = (1,) * number, (config.token_features,)
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = learned(1, width)  # the null class
        self.bos_token = learned(1, 1, width)
        self.pos_embed = learned(1, number + 1, width)  # positions of the start and of given tokens
        self.target_pos_embed = learned(1, number, width)  # positions of the tokens to predict
        self.timesteps_embeddings = learned(1, number + 1, width)  # embeddings of the number of given tokens
        self.x_embedder = nn.Linear(config.token_features, width)
        self.ln_pre = layer_norm(width)
        blocks = (CausalBlock(width, config.num_heads, config.mlp_ratio) for _ in range(config.num_blocks))
        self.transformer = nn.ModuleDict({"blocks": nn.ModuleList(blocks)})
        self.final_layer = AdaptiveNorm(width)
        shape = config.token_features, width, config.head_width, config.head_blocks
        self.diffloss = nn.ModuleDict({"net": TokenHead(*shape, config.process)})
        self.apply(initialise).apply(initialise_adaptive)

    # --- the transformer

    def context(
        self, classes: Tensor, given: Tensor, order: Tensor, first: int, past: Sequence[KeysValues] = ()
    ) -> Tensor:
        """Context [B, n, D] of the tokens from number ``first`` of the ``order`` [B, L] on, of class vectors
        [B, D] and of the tokens ``given`` [B, n or n - 1, c] before them (where ``first`` is 0, there is none
        before the first).

        Keys and values of earlier tokens are in ``past``, which then holds these, too.
        """
        number = given.shape[1] + (first == 0)
        targets, before = order[:, first : first + number], order[:, max(first - 1, 0) :][:, : given.shape[1]]
        embedded = self.x_embedder(given.to(self.x_embedder.weight.dtype))
        x = embedded + rows_at(self.pos_embed[:, 1:].expand(len(order), -1, -1), before)
        if first == 0:
            start = (self.bos_token + self.pos_embed[:, :1]).expand(len(order), -1, -1)
            x = torch.cat([start, x], dim=1)
        x = self.ln_pre(x + rows_at(self.target_pos_embed.expand(len(order), -1, -1), targets))
        condition = classes[:, None] + self.timesteps_embeddings[:, first : first + number]
        for i, block in enumerate(self.block_lists()["blocks"]):
            x = block(x, condition, past[i] if past else None)
        return self.final_layer(x, classes[:, None])

    def order_of(self, number: int, normal: Normal, device: torch.device) -> Tensor:
        """The order of the tokens of so many images, [B, L]."""
        if self.config.order == "random":
            return normal(self.config.num_tokens).argsort(dim=1)
        return torch.arange(self.config.num_tokens, device=device).expand(number, -1)

    # --- the seam

    @property
    def evaluated(self) -> TokenHead:
        return self.diffloss["net"]  # type: ignore[return-value]

    def parts(self, x: Tensor) -> Tensor:
        return patchify(x[:, 0], self.config.patch_size)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> Tensor:
        """Conditions [B, L, W] of all tokens, each given those before it in the order."""
        classes = self.class_emb(labels)
        classes = torch.where(drop[:, None], self.fake_latent.to(classes.dtype), classes)
        order, tokens = self.order_of(len(labels), normal, x.device), self.parts(x)
        context = self.context(classes, rows_at(tokens, order[:, :-1]), order, 0)
        return self.evaluated.cond_embed(rows_at(context, order.argsort(dim=1)))

    def predict(self, x_t: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        return self.evaluated.predict(x_t, t, memory)

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        config, number, classes, times = self.config, self.config.num_tokens, self.class_emb(labels), 1
        if sampling.guidance_scale > 1:  # all images again with the null class
            classes, times = torch.cat([classes, self.fake_latent.expand_as(classes)]), 2
        order = self.order_of(len(labels), normal, labels.device)
        past = [KeysValues() for _ in range(config.num_blocks)]
        tokens = torch.zeros(len(labels), number, *self.token, device=labels.device)
        given = tokens[:, :0]  # the last token
        for j in range(number):
            context = self.context(classes, given.repeat(times, 1, 1), order.repeat(times, 1), j, past)
            # the first token is not guided where guidance grows
            problem = self.evaluated.problem(self.evaluated.cond_embed(context), len(labels), j / number)
            given = (yield problem).transpose(1, 2)
            tokens = tokens.scatter(1, across(order[:, j : j + 1], tokens), given)
        return unpatchify(tokens, config.patch_size, config.latent_size)[:, None]
