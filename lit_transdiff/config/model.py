"""Model settings of TransDiff."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import (
    OF_A_TOKEN,
    OF_SIZE,
    PatchSettings,
    check_dropout,
    check_patches,
    check_positive,
    check_transformer,
    take_size,
)

# Table of sizes: the paper's three (arXiv 2506.09482, Table 1) and small ones for laptops and tests.
# encoder_blocks is the real number of blocks; the reference code counts pairs of them.
SIZES: dict[str, dict[str, int]] = {
    #              width       heads          encoder               decoder
    "test": dict(width=32, num_heads=2, encoder_blocks=2, decoder_blocks=2),
    "nano": dict(width=128, num_heads=4, encoder_blocks=4, decoder_blocks=4),
    "small": dict(width=384, num_heads=6, encoder_blocks=12, decoder_blocks=6),
    "base": dict(width=768, num_heads=12, encoder_blocks=24, decoder_blocks=12),
    "large": dict(width=1024, num_heads=16, encoder_blocks=32, decoder_blocks=16),
    "huge": dict(width=1280, num_heads=16, encoder_blocks=40, decoder_blocks=20),
}

CLASS_ALONE = "class_alone"  # the encoder without a transformer


@dataclass(frozen=True)
class ModelConfig(PatchSettings):
    """One TransDiff for every number of references: R = 1 is one-step AR, R > 1 is MRAR."""

    of_a_row: ClassVar[tuple[str, ...]] = ("width", "latent_size", "num_context_tokens")
    paradigm: str = (
        "transdiff"  # family of the model, a name in config.paradigms.PARADIGMS; each has its own settings
    )
    size: str = "base"  # a name in config.model.SIZES, which sets the defaults of the next four fields
    width: int = OF_SIZE  # width D of encoder and decoder
    num_heads: int = OF_SIZE  # number of attention heads
    encoder_blocks: int = OF_SIZE  # number of blocks of the autoregressive transformer
    decoder_blocks: int = OF_SIZE  # number of blocks of the diffusion decoder
    encoder: str = "ar_transformer"  # a name in models.encoder.ENCODERS
    decoder: str = "cross_attention"  # a name in models.decoders.DECODERS: how the decoder knows the context
    condition: str = "class"  # a name in models.conditions.CONDITIONS: the condition of an image
    mlp_ratio: float = 4.0  # hidden width of an MLP / width
    num_classes: int = 1000  # labels are 0 to num_classes - 1
    num_class_tokens: int = (
        64  # number of copies of the class embedding at the start of the encoder's sequence
    )
    latent_channels: int = 16  # channels of the autoencoder's latents
    latent_size: int = 16  # height and width of the latent
    patch_size: int = 1  # side length in latent pixels of a decoder token's square
    num_context_tokens: int = 256  # R x L: number of semantic features of all references together
    num_references: int = 1  # R: 1 is one-step AR, more is MRAR
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        take_size(self, SIZES)
        check_positive(self, "width", "num_heads", "decoder_blocks", "num_classes")
        self.check_encoder()
        check_positive(self, "num_context_tokens", "num_references")
        check_transformer(self)
        check_patches(self)
        check_dropout(self)
        require(
            self.num_context_tokens % self.num_references == 0,
            "model.num_references",
            self.num_references,
            f"a divisor of model.num_context_tokens={self.num_context_tokens}",
        )
        if self.num_references > 1:
            side = math.isqrt(self.tokens_per_reference)
            require(
                side * side == self.tokens_per_reference and self.latent_size % side == 0,
                "model.num_references",
                self.num_references,
                f"a value for which {self.num_context_tokens}/num_references tokens form a square grid that "
                "divides "
                f"the {self.latent_size} x {self.latent_size} latent",
            )

    def check_encoder(self) -> None:
        """Refuse an encoder without blocks, and what has no effect in the one that needs none."""
        names = ("encoder_blocks", "num_class_tokens")
        if self.encoder != CLASS_ALONE:
            return check_positive(self, *names)
        allowed = f"%s with model.encoder={CLASS_ALONE}, which gives the decoder the class alone"
        for name in names:
            require(getattr(self, name) == 0, f"model.{name}", getattr(self, name), allowed % 0)
        require(self.num_references == 1, "model.num_references", self.num_references, allowed % 1)

    @property
    def tokens_per_reference(self) -> int:
        return self.num_context_tokens // self.num_references

    @property
    def reference_patch_size(self) -> int:
        """Side of a reference's encoder token in latent pixels (2 in the paper); only for R > 1."""
        return self.latent_size // math.isqrt(self.tokens_per_reference)

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        hidden = int(self.mlp_ratio * self.width)
        blocks = (self.encoder_blocks + self.decoder_blocks) * (4 * self.width**2 + 2 * self.width * hidden)
        tokens = self.num_class_tokens + self.num_context_tokens + self.num_tokens
        tables = self.width * (self.num_classes + tokens)
        return {
            ("width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): blocks,
            (
                "width",
                "num_classes",
                "num_class_tokens",
                "num_context_tokens",
                "latent_size",
                "patch_size",
            ): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in the blocks, each of which stores at least its input."""
        stored = {name: 1 if name in recomputed else OF_A_TOKEN for name in ("encoder", "decoder")}
        encoder = self.encoder_blocks * (self.num_class_tokens + self.num_context_tokens) * stored["encoder"]
        decoder = self.decoder_blocks * self.num_references * draws * self.num_tokens * stored["decoder"]
        return self.width * ((0 if head_alone else encoder) + decoder)

    def least_drawn(self) -> int:
        """The tokens in the decoder, before and after a norm."""
        return 2 * self.num_tokens * self.width
