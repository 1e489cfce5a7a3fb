"""TransDiff: one model for every number of references. It knows no loss and no solver.

Shapes: B images, R references of an image, L tokens per reference, V views (references times draws), C H W a latent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from lit_transdiff.models.decoder import DiffusionDecoder, Memory
from lit_transdiff.models.encoder import ARTransformer

if TYPE_CHECKING:
    from lit_transdiff.config import ModelConfig


class TransDiff(nn.Module):
    """Encoder and decoder of arXiv 2506.09482; R = 1 is one-step AR, R > 1 is MRAR."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        common = dict(
            width=config.width,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            latent_channels=config.latent_channels,
            attention_dropout=config.attention_dropout,
            projection_dropout=config.projection_dropout,
        )
        self.encoder = ARTransformer(
            num_blocks=config.encoder_blocks,
            num_classes=config.num_classes,
            num_class_tokens=config.num_class_tokens,
            num_references=config.num_references,
            tokens_per_reference=config.tokens_per_reference,
            reference_patch_size=config.reference_patch_size if config.num_references > 1 else 1,
            **common,  # type: ignore[arg-type]
        )
        self.decoder = DiffusionDecoder(
            num_blocks=config.decoder_blocks,
            latent_size=config.latent_size,
            patch_size=config.patch_size,
            **common,  # type: ignore[arg-type]
        )

    def encode(self, labels: Tensor, references: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        """Context [B, (n + 1) L, D] of ``labels`` [B] and the first n < R latents [B, n, C, H, W] of each image's row.

        Where ``drop`` [B] is true the label is replaced by the null class: the unconditional context.
        """
        return self.encoder(self.encoder.class_vectors(labels, drop), references)

    def memory(self, context: Tensor, every_reference: bool = False) -> Memory:
        """What the decoder keeps of ``context`` [B, n L, D].

        By default all rows see the whole context (sampling the next image). With ``every_reference``, rows of reference
        r = 0 .. n-1 see its prefix of (r + 1) L tokens (training all images of a row at once).
        """
        size, length = context.shape[1], self.config.tokens_per_reference
        return self.decoder.memory(context, tuple(range(length, size + 1, length)) if every_reference else (size,))

    def velocity(self, x_t: Tensor, t: Tensor, memory: Memory) -> Tensor:
        """Velocity of ``x_t`` [(V B), C, H, W], rows ordered (reference, draw, image), at ``t`` [(V B)] or [1]."""
        return self.decoder(x_t, t, memory)
