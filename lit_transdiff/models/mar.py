"""MAR: a transformer over known and unknown tokens, and a small network that denoises each token (arXiv 2406.11838).

The names of the weights are those of the released files. Shapes: B images, L tokens of an image, K known ones, T buffer tokens,
C numbers of a token, D width, R rows of the head, W its width.
"""

from __future__ import annotations

import math

import torch
from einops import repeat
from torch import Tensor, nn

from lit_transdiff.models.adaptive import AdaptiveOutput, Modulation, TimeMLP, initialise_adaptive
from lit_transdiff.models.layers import MLP, SelfAttention, initialise, layer_norm, learned, modulate
from lit_transdiff.models.linear import Linear


class MARBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attn = SelfAttention(width, num_heads, attention_dropout, projection_dropout)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, mlp_ratio, projection_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class HeadBlock(nn.Module):
    """A modulated and gated two-layer network of one row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = layer_norm(width)
        self.mlp = nn.Sequential(Linear(width, width), nn.SiLU(), Linear(width, width))
        self.adaLN_modulation = Modulation(width, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """[R, W] each -> [R, W]."""
        shift, scale, gate = self.adaLN_modulation(condition)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))


class TokenHead(nn.Module):
    """Noise and variance values of single tokens, which do not see each other."""

    def __init__(self, width: int, num_blocks: int, context_width: int, token_features: int) -> None:
        super().__init__()
        self.time_embed = TimeMLP(width)
        self.cond_embed = Linear(context_width, width)
        self.input_proj = Linear(token_features, width)
        self.res_blocks = nn.ModuleList(HeadBlock(width) for _ in range(num_blocks))
        self.final_layer = AdaptiveOutput(width, 2 * token_features)

    def forward(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """``x_t`` [R, C] at the steps ``t`` [R] or [1], ``condition`` [R, W] = ``cond_embed`` of the context -> [R, 2 C]."""
        x = self.input_proj(x_t.to(self.input_proj.weight.dtype))
        condition = self.time_embed(t) + condition
        for block in self.res_blocks:
            x = block(x, condition)
        return self.final_layer(x, condition)


class MaskedTransformer(nn.Module):
    """Encoder of the known tokens, decoder of all, and the head: everything that is learned of MAR."""

    def __init__(
        self,
        *,
        width: int,
        decoder_width: int,
        num_heads: int,
        encoder_blocks: int,
        decoder_blocks: int,
        mlp_ratio: float,
        num_classes: int,
        num_class_tokens: int,
        num_tokens: int,
        token_features: int,
        head_width: int,
        head_blocks: int,
        attention_dropout: float,
        projection_dropout: float,
    ) -> None:
        super().__init__()
        self.num_class_tokens = num_class_tokens
        dropout = (attention_dropout, projection_dropout)
        positions = num_class_tokens + num_tokens
        self.class_emb = nn.Embedding(num_classes, width)
        self.fake_latent = learned(1, width)  # of no class
        self.z_proj = Linear(token_features, width)
        self.encoder_pos_embed_learned = learned(1, positions, width)
        self.z_proj_ln = layer_norm(width)
        self.encoder_blocks = nn.ModuleList(MARBlock(width, num_heads, mlp_ratio, *dropout) for _ in range(encoder_blocks))
        self.encoder_norm = layer_norm(width)
        self.decoder_embed = Linear(width, decoder_width)
        self.mask_token = learned(1, 1, decoder_width)
        self.decoder_pos_embed_learned = learned(1, positions, decoder_width)
        self.decoder_blocks = nn.ModuleList(
            MARBlock(decoder_width, num_heads, mlp_ratio, *dropout) for _ in range(decoder_blocks)
        )
        self.decoder_norm = layer_norm(decoder_width)
        self.diffusion_pos_embed_learned = learned(1, num_tokens, decoder_width)
        self.diffloss = nn.ModuleDict({"net": TokenHead(head_width, head_blocks, decoder_width, token_features)})
        self.apply(initialise).apply(initialise_adaptive)

    def class_vectors(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeddings [B, D] of ``labels`` [B]; rows where ``drop`` [B] is true become those of no class."""
        vectors = self.class_emb(labels)
        return vectors if drop is None else torch.where(drop[:, None], self.fake_latent.to(vectors.dtype), vectors)

    def encode(self, classes: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Features [B, T + K, D] of class vectors [B, D] and of those of ``tokens`` [B, L, C] that are at ``known`` [B, K]."""
        buffer = repeat(classes, "b d -> b t d", t=self.num_class_tokens)
        given = self.z_proj(rows_at(tokens, known).to(self.z_proj.weight.dtype))
        positions = self.encoder_pos_embed_learned.expand(len(known), -1, -1)
        x = self.z_proj_ln(torch.cat([buffer, given], dim=1) + rows_at(positions, self.with_buffer(known)))
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)

    def decode(self, encoded: Tensor, known: Tensor) -> Tensor:
        """Context [B, L, D] of every token, from the features [B, T + K, D] of the buffer and the ``known`` [B, K] tokens."""
        x, places = self.decoder_embed(encoded), self.with_buffer(known)[..., None]
        positions = self.decoder_pos_embed_learned
        unknown = self.mask_token.to(x.dtype).expand(len(x), positions.shape[1], -1)
        x = unknown.scatter(1, places.expand(-1, -1, x.shape[-1]), x) + positions
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, self.num_class_tokens :] + self.diffusion_pos_embed_learned

    def context(self, classes: Tensor, tokens: Tensor, known: Tensor) -> Tensor:
        """Context [B, L, D] of every token, given those of ``tokens`` [B, L, C] that are at ``known`` [B, K]."""
        return self.decode(self.encode(classes, tokens, known), known)

    def with_buffer(self, known: Tensor) -> Tensor:
        """Places [B, T + K] in the sequence of the buffer and of the tokens at ``known`` [B, K]."""
        buffer = torch.arange(self.num_class_tokens, device=known.device).expand(len(known), -1)
        return torch.cat([buffer, known + self.num_class_tokens], dim=1)


def rows_at(table: Tensor, places: Tensor) -> Tensor:
    """Rows [B, K, D] of ``table`` [B, N, D] at ``places`` [B, K]."""
    return table.gather(1, places[..., None].expand(-1, -1, table.shape[-1]))


def known_tokens(order: Tensor, num_unknown: int) -> Tensor:
    """Places [B, L - n], ascending, of the tokens that are known when the first ``num_unknown`` of ``order`` [B, L] are not."""
    return order[:, num_unknown:].sort(dim=1).values


def unknown_tokens(num_tokens: int, num_parts: int) -> list[int]:
    """How many of L tokens are unknown after each of N iterations: L cos(pi/2 i/N), fewer each time, none in the end."""
    left, counts = num_tokens, []
    for i in range(1, num_parts):
        left = max(1, min(left - 1, int(num_tokens * math.cos(math.pi / 2 * (i / num_parts)))))
        counts.append(left)
    return [*counts, 0]
