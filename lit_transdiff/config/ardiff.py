"""Model settings of ARDiff."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lit_transdiff.config.family import OF_A_TOKEN, OF_SIZE, PatchSettings, check_positive

# The four sizes of the released code (arXiv 2507.15856), and small ones for laptops and tests.
ARDIFF_SIZES: dict[str, dict[str, int]] = {
    "test": dict(width=32, num_heads=2, num_blocks=2, head_width=32, head_blocks=2),
    "nano": dict(width=128, num_heads=4, num_blocks=5, head_width=192, head_blocks=3),
    "base": dict(width=768, num_heads=12, num_blocks=12, head_width=1024, head_blocks=3),
    "large": dict(width=1024, num_heads=16, num_blocks=24, head_width=1024, head_blocks=3),
    "xl": dict(width=1152, num_heads=16, num_blocks=28, head_width=1024, head_blocks=3),
    "huge": dict(width=1280, num_heads=16, num_blocks=32, head_width=1024, head_blocks=3),
}


@dataclass(frozen=True)
class ARDiffConfig(PatchSettings):
    """ARDiff: a causal transformer over tokens, each drawn by a small diffusion head (arXiv 2406.11838)."""

    sizes: ClassVar = ARDIFF_SIZES
    paradigm: str = "ardiff"
    size: str = "base"  # a name in config.ardiff.ARDIFF_SIZES: defaults of width, heads, blocks and the head
    num_blocks: int = OF_SIZE  # number of blocks of the transformer
    head_width: int = OF_SIZE  # width of the network that denoises a token
    head_blocks: int = OF_SIZE  # number of blocks of that network
    order: Literal["raster", "random"] = "raster"  # order of tokens: by rows, or random for each image
    process: Literal["cosine_diffusion", "flow"] = (
        "cosine_diffusion"  # the family's own diffusion in discrete steps, or TransDiff's flow matching
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_blocks", "head_width", "head_blocks")

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        block = 10 * self.width**2 + 2 * self.width * int(self.mlp_ratio * self.width)
        tables = self.width * (self.num_classes + 3 * self.num_tokens)
        return {
            ("width", "mlp_ratio", "num_blocks"): self.num_blocks * block,
            ("head_width", "head_blocks"): self.head_blocks * 5 * self.head_width**2,
            ("width", "num_classes", "latent_size", "patch_size"): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in transformer and head, of which each block stores at least its input."""
        stored = {name: 1 if name in recomputed else OF_A_TOKEN for name in ("blocks", "head")}
        blocks = self.num_blocks * self.num_tokens * self.width * stored["blocks"]
        head = self.head_blocks * draws * self.num_tokens * self.head_width * stored["head"]
        return (0 if head_alone else blocks) + head

    def least_drawn(self) -> int:
        """Keys and values of all tokens but the last one in all blocks."""
        return 2 * self.width * self.num_blocks * (self.num_tokens - 1)
