"""Model settings of ACDiT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lit_transdiff.config.family import OF_A_TOKEN, OF_SIZE, CellSettings, check_positive, check_rotary_heads

# The paper's four sizes (arXiv 2412.07720; heads of 64 numbers), and small ones for laptops and tests.
ACDIT_SIZES: dict[str, dict[str, int]] = {
    "test": dict(width=32, num_heads=2, num_blocks=2),
    "nano": dict(width=128, num_heads=4, num_blocks=6),
    "base": dict(width=768, num_heads=12, num_blocks=12),
    "large": dict(width=1024, num_heads=16, num_blocks=24),
    "xl": dict(width=1152, num_heads=18, num_blocks=28),
    "huge": dict(width=1280, num_heads=20, num_blocks=32),
}


@dataclass(frozen=True)
class ACDiTConfig(CellSettings):
    """ACDiT: cells of a latent in order, each by diffusion given the clean ones before (arXiv 2412.07720)."""

    sizes: ClassVar = ACDIT_SIZES
    paradigm: str = "acdit"
    size: str = "base"  # a name in config.acdit.ACDIT_SIZES: defaults of width, heads and blocks
    num_blocks: int = OF_SIZE  # number of blocks of the transformer
    process: Literal["linear_diffusion", "flow"] = (
        "linear_diffusion"  # the family's own diffusion in discrete steps, or TransDiff's flow matching
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_blocks")
        check_rotary_heads(self, num_heads=self.num_heads)

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices that all blocks have, and the table of classes."""
        block = 10 * self.width**2 + 2 * self.width * int(self.mlp_ratio * self.width)
        return {
            ("width", "mlp_ratio", "num_blocks"): self.num_blocks * block,
            ("width", "num_classes"): self.width * self.num_classes,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The clean tokens and those of all draws in the blocks, each of which stores at least its input."""
        kept = 1 if "blocks" in recomputed else OF_A_TOKEN
        return self.num_blocks * (1 + draws) * self.num_tokens * self.width * kept

    def least_drawn(self) -> int:
        return self.least_cached(self.num_blocks)
