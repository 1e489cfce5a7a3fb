"""Model settings of FlowAR."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Optional

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import (
    OF_A_TOKEN,
    OF_SIZE,
    PatchSettings,
    check_dropout,
    check_positive,
    check_rotary_heads,
)

HEAD_DIM = 64  # numbers of an attention head of the flow network
# The three sizes of the released code (arXiv 2412.15205), and small ones for laptops and tests.
OF_A_SIZE = "width num_heads encoder_blocks decoder_blocks head_width head_blocks head_version".split()
FLOWAR_SIZES: dict[str, dict[str, int]] = {
    "test": dict(zip(OF_A_SIZE, (32, 2, 2, 2, 32, 2, 2), strict=True)),
    "nano": dict(zip(OF_A_SIZE, (128, 4, 2, 2, 128, 2, 2), strict=True)),
    "small": dict(zip(OF_A_SIZE, (768, 12, 6, 6, 1024, 2, 1), strict=True)),
    "large": dict(zip(OF_A_SIZE, (1024, 16, 8, 8, 1024, 12, 2), strict=True)),
    "huge": dict(zip(OF_A_SIZE, (1536, 16, 15, 15, 1536, 12, 2), strict=True)),
}


@dataclass(frozen=True)
class FlowARConfig(PatchSettings):
    """FlowAR: scales of a latent from coarse to fine, each by a flow network (arXiv 2412.15205)."""

    of_a_row: ClassVar[tuple[str, ...]] = ("width", "head_width", "latent_size", "patch_size")
    sizes: ClassVar = FLOWAR_SIZES
    paradigm: str = "flowar"
    size: str = "small"  # a name in config.flowar.FLOWAR_SIZES: defaults of width, heads, blocks and the head
    encoder_blocks: int = OF_SIZE  # number of blocks of the first half
    decoder_blocks: int = OF_SIZE  # number of blocks of the second half, which has positions of its own
    head_width: int = OF_SIZE  # width of the flow network, which has an attention head for each 64
    head_blocks: int = OF_SIZE  # number of blocks of the flow network
    head_version: int = OF_SIZE  # 1: modulated by the transformer's output; 2: attends to it, too
    decoder_heads: Optional[int] = None  # number of attention heads of the second half; null: num_heads
    scales: Optional[list[int]] = (
        None  # tokens of a side at each scale, rising divisors of those of the latent; null: 1, 2, 4, ...
    )
    mlp_ratio: float = 4.0  # 1.5 times the hidden width of an MLP, which is gated, / width
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "encoder_blocks", "decoder_blocks", "head_width", "head_blocks")
        require(self.head_version in (1, 2), "model.head_version", self.head_version, "1 or 2")
        check_rotary_heads(self, num_heads=self.num_heads, decoder_heads=self.heads_of_decoder)
        allowed = f"a multiple of {HEAD_DIM}, or below that a multiple of 4"
        fits = self.head_width % (HEAD_DIM if self.head_width > HEAD_DIM else 4) == 0
        require(fits, "model.head_width", self.head_width, allowed)
        sides = self.sides
        allowed = f"rising numbers from 1 on that end with the {self.grid} tokens of a side"
        rising = bool(sides) and sides[0] >= 1 and all(a < b for a, b in pairwise(sides))
        require(rising and sides[-1] == self.grid, "model.scales", self.scales, allowed)
        check_dropout(self)

    def check_scales(self) -> None:
        """Refuse scales whose tokens are not means over equal squares; earlier versions trained such."""
        divisors = [side for side in range(1, self.grid + 1) if self.grid % side == 0]
        allowed = f"some of {divisors}, which divide the {self.grid} tokens of a side"
        require({*self.sides} <= {*divisors}, "model.scales", list(self.sides), allowed)

    @property
    def heads_of_decoder(self) -> int:
        return self.num_heads if self.decoder_heads is None else self.decoder_heads

    @property
    def heads_of_head(self) -> int:
        return max(1, self.head_width // HEAD_DIM)

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens of a side at each scale: powers of 2 and at last the whole grid, or as given."""
        if self.scales is not None:
            return tuple(self.scales)
        return (*(2**k for k in range((self.grid - 1).bit_length())), self.grid)

    @property
    def is_drawn_at_once(self) -> bool:
        return len(self.sides) == 1

    @property
    def num_tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(side**2 for side in self.sides)

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        block, of_head = (
            10 * width**2 + 3 * width * int(width * ratio * 2 / 3)
            for width, ratio in ((self.width, self.mlp_ratio), (self.head_width, 4.0))
        )
        blocks = (self.encoder_blocks + self.decoder_blocks) * block
        return {
            ("width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): blocks,
            ("head_width", "head_blocks"): self.head_blocks * of_head,
            ("width", "num_classes", "latent_size", "patch_size"): self.width
            * (self.num_classes + 3 * self.num_tokens),
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in decoder and flow network, of which each block stores at least its input."""
        stored = {name: 1 if name in recomputed else OF_A_TOKEN for name in ("decoder", "head")}
        decoder = self.decoder_blocks * self.num_tokens * self.width * stored["decoder"]
        head = self.head_blocks * draws * self.num_tokens * self.head_width * stored["head"]
        return (0 if head_alone else decoder) + head

    def least_drawn(self) -> int:
        """Keys and values of all scales in all blocks."""
        return 2 * self.width * (self.encoder_blocks + self.decoder_blocks) * self.num_tokens
