"""Model settings of TransDiff."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import OF_A_TOKEN, OF_SIZE, PatchSettings, check_dropout, check_positive

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
    sizes: ClassVar = SIZES
    paradigm: str = "transdiff"
    size: str = "base"  # a name in config.model.SIZES: defaults of width, heads and blocks
    encoder_blocks: int = OF_SIZE  # number of blocks of the autoregressive transformer
    decoder_blocks: int = OF_SIZE  # number of blocks of the diffusion decoder
    encoder: str = "ar_transformer"  # a name in models.encoder.ENCODERS
    decoder: str = "cross_attention"  # a name in models.decoders.DECODERS: how the decoder knows the context
    condition: str = "class"  # a name in models.conditions.CONDITIONS: the condition of an image
    num_class_tokens: int = (
        64  # number of copies of the class embedding at the start of the encoder's sequence
    )
    num_context_tokens: int = 256  # R x L: number of semantic features of all references together
    num_references: int = 1  # R: 1 is one-step AR, more is MRAR
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "decoder_blocks", "num_context_tokens", "num_references")
        self.check_encoder()
        check_dropout(self)
        tokens, number, size = self.num_context_tokens, self.num_references, self.latent_size
        allowed = f"a divisor of model.num_context_tokens={tokens}"
        require(tokens % number == 0, "model.num_references", number, allowed)
        side = math.isqrt(self.tokens_per_reference)
        fits = side * side == self.tokens_per_reference and size % side == 0
        square = f"a value for which {tokens}/num_references tokens form a square grid"
        allowed = f"{square} that divides the {size} x {size} latent"
        require(number == 1 or fits, "model.num_references", number, allowed)

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
        of_tokens = "num_class_tokens", "num_context_tokens", "latent_size", "patch_size"
        return {
            ("width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): blocks,
            ("width", "num_classes", *of_tokens): tables,
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
