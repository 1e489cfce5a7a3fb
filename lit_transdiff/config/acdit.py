"""The size and shape of ACDiT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lit_transdiff.config.family import (
    OF_A_TOKEN,
    OF_SIZE,
    CellSettings,
    check_cells,
    check_patches,
    check_positive,
    check_rotary_heads,
    check_transformer,
    take_size,
)

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
    """ACDiT: squares of a latent one after the other, each by diffusion given the clean ones before it (arXiv
    2412.07720).
    """

    of_a_row: ClassVar[tuple[str, ...]] = ("width", "latent_size", "patch_size")
    paradigm: str = (
        "acdit"  # family of the model, a name in config.paradigms.PARADIGMS; each has its own settings
    )
    size: str = "base"  # a name in config.acdit.ACDIT_SIZES, which sets the defaults of the next three fields
    width: int = OF_SIZE  # D, four times model.num_heads or a multiple of that
    num_heads: int = OF_SIZE  # of attention
    num_blocks: int = OF_SIZE  # of the transformer
    mlp_ratio: float = 4.0  # hidden width of an MLP / width
    process: Literal["linear_diffusion", "flow"] = (
        "linear_diffusion"  # the family's own diffusion in discrete steps, or TransDiff's flow matching
    )
    num_classes: int = 1000  # labels are 0 to num_classes - 1
    latent_channels: int = 16  # of the autoencoder's latents
    latent_size: int = 16  # height and width of the latent
    patch_size: int = 1  # side of the square of latent pixels that is one token
    parts_per_side: int = 2  # an image is drawn in so many rows of so many squares

    def __post_init__(self) -> None:
        take_size(self, ACDIT_SIZES)
        check_positive(self, "width", "num_heads", "num_blocks", "num_classes")
        check_rotary_heads(self, num_heads=self.num_heads)
        check_transformer(self)
        check_patches(self)
        check_cells(self)

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices that all blocks have, and the table of classes."""
        block = 10 * self.width**2 + 2 * self.width * int(self.mlp_ratio * self.width)
        return {
            ("width", "mlp_ratio", "num_blocks"): self.num_blocks * block,
            ("width", "num_classes"): self.width * self.num_classes,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The clean tokens and those of all draws in the blocks, of which a block keeps its input or much
        more.
        """
        kept = 1 if "blocks" in recomputed else OF_A_TOKEN
        return self.num_blocks * (1 + draws) * self.num_tokens * self.width * kept
