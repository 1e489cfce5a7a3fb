"""Model settings of MAR."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Optional

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import (
    OF_A_TOKEN,
    OF_SIZE,
    PatchSettings,
    check_dropout,
    check_positive,
    check_transformer,
)
from lit_transdiff.config.sampling import SamplingConfig

# The paper's three sizes (arXiv 2406.11838, section 5), and small ones for laptops and tests.
MAR_SIZES: dict[str, dict[str, int]] = {
    "test": dict(width=32, num_heads=2, encoder_blocks=2, decoder_blocks=2, head_width=32, head_blocks=2),
    "nano": dict(width=128, num_heads=4, encoder_blocks=3, decoder_blocks=3, head_width=192, head_blocks=3),
    "base": dict(
        width=768, num_heads=12, encoder_blocks=12, decoder_blocks=12, head_width=1024, head_blocks=6
    ),
    "large": dict(
        width=1024, num_heads=16, encoder_blocks=16, decoder_blocks=16, head_width=1280, head_blocks=8
    ),
    "huge": dict(
        width=1280, num_heads=16, encoder_blocks=20, decoder_blocks=20, head_width=1536, head_blocks=12
    ),
}


@dataclass(frozen=True)
class MARConfig(PatchSettings):
    """MAR: random sets of tokens by a masked transformer and a small diffusion network (arXiv 2406.11838)."""

    of_a_row: ClassVar[tuple[str, ...]] = ("width", "latent_size", "patch_size", "num_class_tokens")
    sizes: ClassVar = MAR_SIZES
    paradigm: str = "mar"
    size: str = "base"  # a name in config.mar.MAR_SIZES: defaults of width, heads, blocks and the head
    encoder_blocks: int = OF_SIZE  # number of blocks over the known tokens
    decoder_blocks: int = OF_SIZE  # number of blocks over all tokens
    head_width: int = OF_SIZE  # width of the network that denoises a token
    head_blocks: int = OF_SIZE  # number of blocks of that network
    decoder_width: Optional[int] = None  # width of the decoder; null: width
    process: Literal["cosine_diffusion", "flow"] = (
        "cosine_diffusion"  # the family's own diffusion in discrete steps, or TransDiff's flow matching
    )
    num_class_tokens: int = 64  # number of copies of the class embedding at the start of the sequence
    mask_rate_min: float = (
        0.7  # fraction of unknown tokens in training: normal with mean 1, truncated to [mask_rate_min, 1]
    )
    mask_rate_std: float = 0.25  # standard deviation of that normal distribution
    num_parts: int = (
        64  # iterations per image, at most its number of tokens; sampling.num_parts takes precedence
    )
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "encoder_blocks", "decoder_blocks", "head_width", "head_blocks")
        check_positive(self, "num_class_tokens", "num_parts")
        require(self.width_of_decoder >= 1, "model.decoder_width", self.decoder_width, "1 or more")
        if self.decoder_width is not None:
            check_transformer(self, width="decoder_width")
        require(0 < self.mask_rate_min <= 1, "model.mask_rate_min", self.mask_rate_min, "above 0, at most 1")
        require(self.mask_rate_std > 0, "model.mask_rate_std", self.mask_rate_std, "above 0")
        check_dropout(self)

    def check_sampling(self, sampling: SamplingConfig) -> None:
        allowed = f"null, or 1 to {self.num_tokens}, the tokens of an image"
        parts = sampling.num_parts
        require((parts or 1) <= self.num_tokens, "sampling.num_parts", parts, allowed)

    @property
    def width_of_decoder(self) -> int:
        return self.width if self.decoder_width is None else self.decoder_width

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        stacks = (self.encoder_blocks, self.width), (self.decoder_blocks, self.width_of_decoder)
        blocks = sum(n * (4 * width**2 + 2 * width * int(self.mlp_ratio * width)) for n, width in stacks)
        tables = self.width * (self.num_classes + self.num_class_tokens + self.num_tokens)
        return {
            ("width", "decoder_width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): blocks,
            ("head_width", "head_blocks"): self.head_blocks * 5 * self.head_width**2,
            ("width", "num_classes", "num_class_tokens", "latent_size", "patch_size"): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in decoder and head, of which each block stores at least its input."""
        stored = {name: 1 if name in recomputed else OF_A_TOKEN for name in ("decoder", "head")}
        tokens = self.num_class_tokens + self.num_tokens
        decoder = self.decoder_blocks * tokens * self.width_of_decoder * stored["decoder"]
        head = self.head_blocks * draws * self.num_tokens * self.head_width * stored["head"]
        return (0 if head_alone else decoder) + head

    def least_drawn(self) -> int:
        """The tokens in the decoder, before and after a norm."""
        return 2 * (self.num_class_tokens + self.num_tokens) * self.width_of_decoder
