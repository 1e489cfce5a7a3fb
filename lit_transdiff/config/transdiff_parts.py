"""Model settings of TransDiff over the parts of one image."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import OF_A_TOKEN, OF_SIZE, CellSettings, check_dropout, check_positive
from lit_transdiff.config.model import SIZES


@dataclass(frozen=True)
class TransDiffPartsConfig(CellSettings):
    """TransDiff whose autoregressive groups are parts of one image in place of whole images: cells in an
    order, or scales (an ablation of arXiv 2506.09482).
    """

    of_a_row: ClassVar[tuple[str, ...]] = ("width", "latent_size", "patch_size", "num_class_tokens")
    sizes: ClassVar = SIZES
    paradigm: str = "transdiff_parts"
    size: str = "base"  # a name in config.model.SIZES: defaults of width, heads and blocks
    encoder_blocks: int = OF_SIZE  # number of blocks of the autoregressive transformer
    decoder_blocks: int = OF_SIZE  # number of blocks of the diffusion decoder
    parts: Literal["cells", "scales"] = "cells"
    # the parts of an image, drawn in turn: squares of tokens, or ever finer means over squares
    order: Literal["raster", "random"] = "raster"  # order of cells: by rows, or random for each image
    num_class_tokens: int = 64
    # number of copies of the class embedding at the start of the encoder's sequence
    attention_dropout: float = 0.1  # dropout of attention weights; 0 allows fused attention on CPUs
    projection_dropout: float = 0.1  # dropout after attention and within MLPs

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "encoder_blocks", "decoder_blocks", "num_class_tokens")
        check_dropout(self)
        self.check_order()

    def check_order(self) -> None:
        """Refuse what has no effect on the order of scales, or of one cell; and a latent without scales."""
        scales, order, side = self.parts == "scales", self.order, self.parts_per_side
        allowed = "'raster' with model.parts=scales or model.parts_per_side=1"
        require(order == "raster" or (not scales and side > 1), "model.order", order, allowed)
        allowed = "2 with model.parts=scales, which are powers of 2"
        require(not scales or side == 2, "model.parts_per_side", side, allowed)
        allowed = "a power of 2 with model.parts=scales"
        require(not scales or self.grid.bit_count() == 1, "tokens of a side", self.grid, allowed)

    @property
    def num_blocks(self) -> int:
        return self.encoder_blocks + self.decoder_blocks

    @property
    def sides(self) -> tuple[int, ...]:
        """Tokens of a side of each scale."""
        return tuple(2**k for k in range(self.grid.bit_length()))

    @property
    def part_sizes(self) -> tuple[int, ...]:
        """Tokens of each part."""
        if self.parts == "scales":
            return tuple(side**2 for side in self.sides)
        return (self.tokens_of_part,) * self.parts_per_side**2

    @property
    def is_drawn_at_once(self) -> bool:
        return len(self.part_sizes) == 1

    def least_drawn(self) -> int:
        """Keys and values of all parts in the encoder and, of the last one's context, in the decoder."""
        return 2 * self.width * self.num_blocks * sum(self.part_sizes)

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        block = 4 * self.width**2 + 2 * self.width * int(self.mlp_ratio * self.width)
        tables = self.width * (self.num_classes + self.num_class_tokens + 3 * self.num_tokens)
        return {
            ("width", "mlp_ratio", "encoder_blocks", "decoder_blocks"): self.num_blocks * block,
            ("width", "num_classes", "num_class_tokens", "latent_size", "patch_size"): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in the blocks, each of which stores at least its input."""
        stored = {name: 1 if name in recomputed else OF_A_TOKEN for name in ("encoder", "decoder")}
        tokens = sum(self.part_sizes)
        encoder = self.encoder_blocks * (self.num_class_tokens + tokens) * stored["encoder"]
        decoder = self.decoder_blocks * draws * tokens * stored["decoder"]
        return self.width * ((0 if head_alone else encoder) + decoder)
