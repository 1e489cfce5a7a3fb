"""MAR: a transformer over known and unknown tokens, and a small network that denoises each token (arXiv
2406.11838).

The names of the weights are those of the released files. Shapes: B images, L tokens of an image, K known
ones, T buffer tokens, C numbers of a token, D width, R rows of the head, W its width.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from einops import repeat
from torch import Tensor, nn

from lit_transdiff.base.randomness import Normal
from lit_transdiff.models.adapt import Adaptation
from lit_transdiff.models.adaptive import initialise_adaptive
from lit_transdiff.models.layers import MLP, SelfAttention, initialise, layer_norm, learned
from lit_transdiff.models.paradigm import Paradigm, Problem, Stack
from lit_transdiff.models.token_head import TokenHead
from lit_transdiff.models.tokens import across, patchify, rows_at, unpatchify

if TYPE_CHECKING:
    from lit_transdiff.config import SamplingConfig
    from lit_transdiff.config.mar import MARConfig


class MARBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, config: MARConfig) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(
            width, config.num_heads, config.attention_dropout, config.projection_dropout
        )
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, config.mlp_ratio, config.projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class MAR(Paradigm):
    """An encoder of the known tokens, a decoder of all, and a head that denoises each unknown token
    independently.

    In training every token is a part with its own time, and only unknown ones count. In sampling a part is a
    set of tokens.
    """

    process = "cosine_diffusion"
    prediction = "noise_and_variance"
    stacks: ClassVar = {
        "encoder": Stack("encoder_blocks", "encoder_blocks"),
        "decoder": Stack("decoder_blocks", "decoder_blocks"),
        "head": Stack("diffloss.net.res_blocks", "head_blocks"),
    }
    head_prefixes = ("diffloss.",)
    undecayed = ("diffloss.",)
    parts_are_free = True
    static = ("context",)
    adaptation = Adaptation(
        classes="class_emb.weight",
        shaped=(
            "encoder_pos_embed_learned decoder_pos_embed_learned diffusion_pos_embed_learned z_proj.weight "
            "diffloss.net.input_proj.weight diffloss.net.final_layer.linear.weight "
            "diffloss.net.final_layer.linear.bias"
        ).split(),
    )
    config: MARConfig

    def __init__(self, config: MARConfig) -> None:
        super().__init__()
        self.config = config
        self.part_sizes, self.token = (1,) * config.num_tokens, (config.token_features,)
        width, decoder_width = config.width, config.width_of_decoder
        positions = config.num_class_tokens + config.num_tokens
        self.class_emb = nn.Embedding(config.num_classes, width)
        self.fake_latent = learned(1, width)  # the null class
        self.z_proj = nn.Linear(config.token_features, width)
        self.encoder_pos_embed_learned = learned(1, positions, width)
        self.z_proj_ln = layer_norm(width)
        self.encoder_blocks = nn.ModuleList(MARBlock(width, config) for _ in range(config.encoder_blocks))
        self.encoder_norm = layer_norm(width)
        self.decoder_embed = nn.Linear(width, decoder_width)
        self.mask_token = learned(1, 1, decoder_width)
        self.decoder_pos_embed_learned = learned(1, positions, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            MARBlock(decoder_width, config) for _ in range(config.decoder_blocks)
        )
        self.decoder_norm = layer_norm(decoder_width)
        self.diffusion_pos_embed_learned = learned(1, config.num_tokens, decoder_width)
        shape = config.token_features, decoder_width, config.head_width, config.head_blocks
        self.diffloss = nn.ModuleDict({"net": TokenHead(*shape, config.process)})
        self.apply(initialise).apply(initialise_adaptive)

    # --- the transformer

    def class_vectors(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeddings [B, D] of ``labels`` [B]; the null class where ``drop`` [B]."""
        vectors = self.class_emb(labels)
        if drop is None:
            return vectors
        return torch.where(drop[:, None], self.fake_latent.to(vectors.dtype), vectors)

    def encode_known(self, classes: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Features [B, T + K, D] of class vectors [B, D] and ``tokens`` [B, L, C] at ``known`` [B, K]."""
        buffer = repeat(classes, "b d -> b t d", t=self.config.num_class_tokens)
        embedded = self.z_proj(rows_at(tokens, known).to(self.z_proj.weight.dtype))
        positions = self.encoder_pos_embed_learned.expand(len(known), -1, -1)
        x = self.z_proj_ln(torch.cat([buffer, embedded], dim=1) + rows_at(positions, self.with_buffer(known)))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode_all(self, encoded: Tensor, known: Tensor) -> Tensor:
        """Context [B, L, D] of every token, from the features [B, T + K, D] of the buffer and the ``known``
        [B, K] tokens.
        """
        x, positions = self.decoder_embed(encoded), self.decoder_pos_embed_learned
        unknown = self.mask_token.to(x.dtype).expand(len(x), positions.shape[1], -1)
        x = unknown.scatter(1, across(self.with_buffer(known), x), x) + positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.config.num_class_tokens :] + self.diffusion_pos_embed_learned

    def context(self, classes: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Context [B, L, D] of every token, given the ``tokens`` [B, L, C] at ``known`` [B, K]."""
        return self.decode_all(self.encode_known(classes, tokens, known), known)

    def with_buffer(self, known: Tensor) -> Tensor:
        """The positions [B, T + K] of the buffer and of the tokens at ``known`` [B, K] in the sequence."""
        buffer = torch.arange(self.config.num_class_tokens, device=known.device).expand(len(known), -1)
        return torch.cat([buffer, known + self.config.num_class_tokens], dim=1)

    # --- the seam

    @property
    def evaluated(self) -> TokenHead:
        return self.diffloss["net"]  # type: ignore[return-value]

    def parts(self, x: Tensor) -> Tensor:
        return patchify(x[:, 0], self.config.patch_size)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
        """Conditions [B, L, W] of all tokens given random known ones, and the mask [B, L] of unknown ones."""
        order = normal(self.config.num_tokens).argsort(dim=1)
        known = known_tokens(order, number_unknown(self.config, normal.shared()))
        context = self.context(self.class_vectors(labels, drop), self.parts(x), known)
        unknown = torch.ones_like(order, dtype=torch.float32).scatter(1, known, 0.0)
        return self.evaluated.cond_embed(context), unknown

    def predict(self, x_t: Tensor, t: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
        return self.evaluated.predict(x_t, t, memory[0])

    def weights(self, memory: tuple[Tensor, Tensor]) -> Tensor:
        return memory[1]

    def decode(
        self, labels: Tensor, sampling: SamplingConfig, normal: Normal, kept: Any = None, contexts: Any = None
    ) -> Generator[Problem, Tensor, Tensor]:
        """Sample the tokens of each image in random order, in parts of increasing size."""
        config, number, left = self.config, len(labels), self.config.num_tokens
        order = normal(left).argsort(dim=1)
        tokens = torch.zeros(number, left, *self.token, device=labels.device)
        classes, times = self.class_vectors(labels), 1
        if sampling.guidance_scale > 1:  # all images again with the null class
            classes, times = torch.cat([classes, self.fake_latent.expand_as(classes)]), 2
        order = order.repeat(times, 1)
        for after in unknown_tokens(left, sampling.num_parts or min(config.num_parts, left)):
            places = order[:, after:left].sort(dim=1).values
            context = self.context(classes, tokens.repeat(times, 1, 1), known_tokens(order, left))
            progress = 1 - max(after, 1) / config.num_tokens
            condition = self.evaluated.cond_embed(rows_at(context, places))
            drawn = yield self.evaluated.problem(condition, number, progress)
            tokens = tokens.scatter(1, across(places[:number], tokens), drawn.transpose(1, 2))
            left = after
        return unpatchify(tokens, config.patch_size, config.latent_size)[:, None]


def known_tokens(order: Tensor, num_unknown: int) -> Tensor:
    """The ascending positions [B, L - n] of the known tokens; the first n of ``order`` [B, L] are unknown."""
    return order[:, num_unknown:].sort(dim=1).values


def unknown_tokens(num_tokens: int, num_parts: int) -> list[int]:
    """The numbers of unknown tokens after each of N iterations: L cos(pi/2 i/N), strictly falling to 0."""
    left, counts = num_tokens, []
    for i in range(1, num_parts):
        left = max(1, min(left - 1, int(num_tokens * math.cos(math.pi / 2 * i / num_parts))))
        counts.append(left)
    return [*counts, 0]


def number_unknown(config: MARConfig, normal: float) -> int:
    """The number of unknown tokens in training, from a standard normal number via a truncated normal."""
    standard = NormalDist()
    least, share = standard.cdf((config.mask_rate_min - 1) / config.mask_rate_std), standard.cdf(normal)
    rate = 1 + config.mask_rate_std * standard.inv_cdf(least + share * (0.5 - least))
    return math.ceil(config.num_tokens * min(max(rate, config.mask_rate_min), 1.0))
