"""The autoregressive transformer: class tokens and reference images -> semantic features (the context).

Shapes: B batch, K class tokens, R references, L tokens per reference, D width, C H W a latent.
"""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from lit_transdiff.models.layers import SelfAttention, initialise, layer_norm, learned, mlp
from lit_transdiff.models.tokens import block_causal_mask, patchify


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int, mlp_ratio: float, attention_dropout: float, projection_dropout: float) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attention = SelfAttention(width, num_heads, attention_dropout, projection_dropout)
        self.norm2 = layer_norm(width)
        self.mlp = mlp(width, mlp_ratio, projection_dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """Encoder of TransDiff (arXiv 2506.09482, section 3).

    The sequence is [K class tokens | group 0 | ... | group R-1] of L tokens each. Group 0 is learned mask tokens; group r
    is reference image r-1. One-step AR (R = 1) attends fully and broadcasts one mask token; MRAR (R > 1) is block-causal,
    with class tokens that see only themselves.
    """

    def __init__(
        self,
        *,
        width: int,
        num_heads: int,
        num_blocks: int,
        mlp_ratio: float,
        num_classes: int,
        num_class_tokens: int,
        num_references: int,
        tokens_per_reference: int,
        reference_patch_size: int,
        latent_channels: int,
        attention_dropout: float,
        projection_dropout: float,
    ) -> None:
        super().__init__()
        self.num_class_tokens = num_class_tokens
        self.num_references = num_references
        self.tokens_per_reference = tokens_per_reference
        self.reference_patch_size = reference_patch_size
        multi = num_references > 1
        num_tokens = num_references * tokens_per_reference

        self.class_embedding = nn.Embedding(num_classes, width)
        self.null_class = learned(1, width)
        self.mask_tokens = learned(1, tokens_per_reference if multi else 1, width)
        self.reference_projection = nn.Linear(latent_channels * reference_patch_size**2, width) if multi else None
        self.position = learned(1, num_class_tokens + num_tokens, width)
        self.input_norm = layer_norm(width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, num_heads, mlp_ratio, attention_dropout, projection_dropout) for _ in range(num_blocks)
        )
        self.norm = layer_norm(width)
        self.context_position = learned(1, num_tokens, width)
        mask = block_causal_mask([num_class_tokens] + [tokens_per_reference] * num_references) if multi else None
        self.mask: Tensor | None
        self.register_buffer("mask", mask, persistent=False)
        self.apply(initialise)

    def class_vectors(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeddings [B, D] of ``labels`` [B]; rows where ``drop`` [B] is true become the null class."""
        vectors = self.class_embedding(labels)
        return vectors if drop is None else torch.where(drop[:, None], self.null_class.to(vectors.dtype), vectors)

    def features(self, classes: Tensor, references: Tensor | None = None) -> Tensor:
        """Semantic features [B, (n + 1) L, D] of class vectors [B, D] and n < R clean references [B, n, C, H, W].

        The features of group r depend on the class and on references before r only, so a prefix of the references
        gives the same features as the whole sequence.
        """
        x = torch.cat([repeat(classes, "b d -> b k d", k=self.num_class_tokens), self._groups(classes, references)], dim=1)
        n = x.shape[1]
        x = self.input_norm(x + self.position[:, :n])
        mask = None if self.mask is None else self.mask[:n, :n]
        for block in self.blocks:
            x = block(x, mask)
        return self.norm(x)[:, self.num_class_tokens :]

    def forward(self, classes: Tensor, references: Tensor | None = None) -> Tensor:
        """Features plus their position embedding: the context [B, (n + 1) L, D] that the decoder attends to."""
        features = self.features(classes, references)
        return features + self.context_position[:, : features.shape[1]]

    def _groups(self, classes: Tensor, references: Tensor | None) -> Tensor:
        """Input tokens of the groups: the mask tokens, then one group for each reference; [B, (n + 1) L, D]."""
        mask_tokens = self.mask_tokens.expand(len(classes), self.tokens_per_reference, -1)
        if references is None or references.shape[1] == 0:
            return mask_tokens
        if self.reference_projection is None or references.shape[1] >= self.num_references:
            raise ValueError(f"references: got {references.shape[1]}; allowed: at most {self.num_references - 1}.")
        tokens = rearrange(patchify(references, self.reference_patch_size), "b r l c -> b (r l) c")
        projected = self.reference_projection(tokens.to(self.reference_projection.weight.dtype))
        return torch.cat([mask_tokens, projected], dim=1)
