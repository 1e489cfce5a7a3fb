"""The autoregressive transformer: class tokens and reference images -> semantic features (the context).

Shapes: B batch, K class tokens, R references, L tokens per reference, D width, C H W a latent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from lit_transdiff.models.conditions import CONDITIONS
from lit_transdiff.models.layers import MLP, KeysValues, SelfAttention, initialise, layer_norm, learned
from lit_transdiff.models.tokens import patchify

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        mlp_ratio: float,
        attention_dropout: float,
        projection_dropout: float,
    ) -> None:
        super().__init__()
        self.norm1 = layer_norm(width)
        self.attention = SelfAttention(width, num_heads, attention_dropout, projection_dropout)
        self.norm2 = layer_norm(width)
        self.mlp = MLP(width, mlp_ratio, projection_dropout)

    def forward(
        self, x: Tensor, groups: tuple[int, ...] | None = None, past: KeysValues | None = None
    ) -> Tensor:
        """[B, N, D] -> [B, N, D]; ``groups`` and ``past`` as in ``SelfAttention``."""
        x = x + self.attention(self.norm1(x), groups, past)
        return x + self.mlp(self.norm2(x))


class ARTransformer(nn.Module):
    """Encoder of TransDiff (arXiv 2506.09482, section 3).

    The sequence is [K class tokens | group 0 | ... | group R-1] of L tokens each. Group 0 is learned mask
    tokens; group r is reference image r-1. One-step AR (R = 1) attends fully and broadcasts one mask token;
    MRAR (R > 1) is block-causal, with class tokens that see only themselves.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, dropout = config.width, (config.attention_dropout, config.projection_dropout)
        self.num_class_tokens = config.num_class_tokens
        self.num_references = config.num_references
        self.tokens_per_reference = config.tokens_per_reference
        several = config.num_references > 1
        self.reference_patch_size = config.reference_patch_size if several else 1
        features = config.latent_channels * self.reference_patch_size**2
        self.has_dropout = any(dropout)

        self.class_embedding = CONDITIONS[config.condition](config)
        self.null_class = learned(1, width)
        self.mask_tokens = learned(1, config.tokens_per_reference if several else 1, width)
        self.reference_projection = nn.Linear(features, width) if several else None
        self.position = learned(1, config.num_class_tokens + config.num_context_tokens, width)
        self.input_norm = layer_norm(width)
        self.blocks = nn.ModuleList(
            EncoderBlock(width, config.num_heads, config.mlp_ratio, *dropout)
            for _ in range(config.encoder_blocks)
        )
        self.norm = layer_norm(width)
        self.context_position = learned(1, config.num_context_tokens, width)
        self.apply(initialise)

    @property
    def has_one_context_a_class(self) -> bool:
        """Whether rows of one class have one context: labels as conditions, no references, no dropout."""
        labels_alone = isinstance(self.class_embedding, nn.Embedding) and self.num_references == 1
        return labels_alone and not (self.training and self.has_dropout)

    def class_vectors(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Embeddings [B, D] of ``labels`` [B] or other ``CONDITIONS``; the null class where ``drop`` [B]."""
        vectors = self.class_embedding(labels)
        if drop is None:
            return vectors  # type: ignore[no-any-return]
        dropped = drop.reshape(-1, *[1] * (vectors.ndim - 1))
        return torch.where(dropped, self.null_class.to(vectors.dtype), vectors)

    def features(self, classes: Tensor, references: Tensor | None = None) -> Tensor:
        """Semantic features [B, (n + 1) L, D] of class vectors [B, D] and n < R clean references [B, n, C, H,
        W].

        The features of group r depend on the class and on references before r only, so a prefix of the
        references gives the same features as the whole sequence.
        """
        return self._transform(self._first(classes, references))[:, self.num_class_tokens :]

    def begin(self, classes: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """Features of the first group, [B, L, D], and the keys and values that ``extend`` needs."""
        past = [KeysValues() for _ in self.blocks]
        return self._transform(self._first(classes, None), past)[:, self.num_class_tokens :], past

    def extend(self, past: list[KeysValues], reference: Tensor) -> tuple[Tensor, list[KeysValues]]:
        """Features [B, L, D] of the group after ``past``, given its ``reference``, and the next ``past``."""
        longer = [replace(block) for block in past]
        return self._transform(self._project(reference[:, None]), longer), longer

    def forward(self, classes: Tensor, references: Tensor | None = None) -> Tensor:
        """Features with their positions: the context [B, (n + 1) L, D] that the decoder attends to."""
        features = self.features(classes, references)
        return features + self.context_position[:, : features.shape[1]]

    def _first(self, classes: Tensor, references: Tensor | None) -> Tensor:
        """Input tokens: class tokens, mask tokens, one group per reference; [B, K + (n + 1) L, D]."""
        class_tokens = (
            classes if classes.ndim == 3 else repeat(classes, "b d -> b k d", k=self.num_class_tokens)
        )
        groups = [class_tokens, self.mask_tokens.expand(len(classes), self.tokens_per_reference, -1)]
        if references is not None and references.shape[1] > 0:
            groups.append(self._project(references))
        return torch.cat(groups, dim=1)

    def _project(self, references: Tensor) -> Tensor:
        """Project references [B, n, C, H, W] to input tokens [B, n L, D]."""
        if self.reference_projection is None or references.shape[1] >= self.num_references:
            raise ValueError(
                f"references: got {references.shape[1]}; allowed: at most {self.num_references - 1}."
            )
        tokens = rearrange(patchify(references, self.reference_patch_size), "b r l c -> b (r l) c")
        return self.reference_projection(tokens.to(self.reference_projection.weight.dtype))

    def _transform(self, tokens: Tensor, past: list[KeysValues] | None = None) -> Tensor:
        """Apply the blocks to input ``tokens`` [B, N, D] (whole groups), which follow those of ``past``."""
        done = 0 if not past or past[0].keys is None else past[0].keys.shape[2]
        n = tokens.shape[1]
        x = self.input_norm(tokens + self.position[:, done : done + n])
        groups = None
        if self.num_references > 1 and done == 0:
            groups = (
                self.num_class_tokens,
                *[self.tokens_per_reference] * ((n - self.num_class_tokens) // self.tokens_per_reference),
            )
        for i, block in enumerate(self.blocks):
            x = block(x, groups, None if past is None else past[i])
        return self.norm(x)


class ClassAlone(ARTransformer):
    """No transformer: the context is the class vector at L learned positions. The decoder works alone."""

    def _first(self, classes: Tensor, references: Tensor | None) -> Tensor:
        return classes[:, None] + self.mask_tokens.expand(len(classes), self.tokens_per_reference, -1)


# An entry creates a subclass of ``ARTransformer``, or a module with the same interface.
ENCODERS: dict[str, Callable[[ModelConfig], ARTransformer]] = {
    "ar_transformer": ARTransformer,
    "class_alone": ClassAlone,
}
