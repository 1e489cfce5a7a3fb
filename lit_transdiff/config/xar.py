"""Model settings of xAR."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Optional

from lit_transdiff.config.family import (
    OF_A_TOKEN,
    OF_SIZE,
    CellSettings,
    check_dropout,
    check_positive,
    check_rotary_heads,
)

# The three sizes of the released code (arXiv 2502.20388), and small ones for laptops and tests.
XAR_SIZES: dict[str, dict[str, int]] = {
    "test": dict(width=32, num_heads=2, encoder_blocks=2, decoder_blocks=2),
    "nano": dict(width=128, num_heads=4, encoder_blocks=3, decoder_blocks=3),
    "base": dict(width=768, num_heads=12, encoder_blocks=8, decoder_blocks=8),
    "large": dict(width=1024, num_heads=16, encoder_blocks=16, decoder_blocks=16),
    "huge": dict(width=1280, num_heads=16, encoder_blocks=20, decoder_blocks=20),
}


@dataclass(frozen=True)
class XARConfig(CellSettings):
    """xAR: cells of a latent in order, each by flow matching given noisy ones before (arXiv 2502.20388)."""

    sizes: ClassVar = XAR_SIZES
    paradigm: str = "xar"
    size: str = "base"  # a name in config.xar.XAR_SIZES: defaults of width, heads and blocks
    encoder_blocks: int = OF_SIZE  # number of blocks of the first half
    decoder_blocks: int = OF_SIZE  # number of blocks of the second half, which has positions of its own
    decoder_heads: Optional[int] = None  # number of attention heads of the second half; null: num_heads
    mlp_ratio: float = 4.0  # 1.5 times the hidden width of an MLP, which is gated, / width
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "encoder_blocks", "decoder_blocks")
        check_rotary_heads(self, num_heads=self.num_heads, decoder_heads=self.heads_of_decoder)
        check_dropout(self)

    @property
    def heads_of_decoder(self) -> int:
        return self.num_heads if self.decoder_heads is None else self.decoder_heads

    @property
    def num_blocks(self) -> int:
        return self.encoder_blocks + self.decoder_blocks

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        block = 10 * self.width**2 + 3 * self.width * int(self.width * self.mlp_ratio * 2 / 3)
        tables = self.width * (self.num_classes + 2 * self.num_tokens)
        return {
            ("width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): self.num_blocks * block,
            ("width", "num_classes", "latent_size", "patch_size"): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in the blocks, each of which stores at least its input."""
        stored = sum(
            number * (1 if name in recomputed else OF_A_TOKEN)
            for name, number in (("encoder", self.encoder_blocks), ("decoder", self.decoder_blocks))
        )
        return stored * draws * self.num_tokens * self.width

    def least_drawn(self) -> int:
        return self.least_cached(self.num_blocks)
