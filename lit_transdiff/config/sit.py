"""Model settings of SiT and DiT."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Optional

from lit_transdiff.config.checks import require
from lit_transdiff.config.family import OF_A_TOKEN, OF_SIZE, PatchSettings, check_positive

# The papers' four sizes (arXiv 2212.09748, Table 1; arXiv 2401.08740), and small ones for laptops and tests.
SIT_SIZES: dict[str, dict[str, int]] = {
    "test": dict(width=32, num_heads=2, num_blocks=2),
    "nano": dict(width=128, num_heads=4, num_blocks=6),
    "small": dict(width=384, num_heads=6, num_blocks=12),
    "base": dict(width=768, num_heads=12, num_blocks=12),
    "large": dict(width=1024, num_heads=16, num_blocks=24),
    "xl": dict(width=1152, num_heads=16, num_blocks=28),
}


@dataclass(frozen=True)
class SiTConfig(PatchSettings):
    """SiT: one transformer over all patches of a noisy latent, and no autoregression (arXiv 2401.08740)."""

    sizes: ClassVar = SIT_SIZES
    paradigm: str = "sit"
    size: str = "base"  # a name in config.sit.SIT_SIZES: defaults of width, heads and blocks
    num_blocks: int = OF_SIZE  # number of blocks of the transformer
    guided_channels: Optional[int] = (
        None  # number of first channels with guidance, 3 in the released samplers; null: all
    )
    learn_sigma: bool = (
        False  # twice the output channels, of which SiT uses the first half, as in the released files
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(self, "num_blocks")
        require(self.width % 4 == 0, "model.width", self.width, "a multiple of 4")
        guided, channels = self.guided_channels, self.latent_channels
        allowed = f"null or 1 to model.latent_channels={channels}"
        require(guided is None or 1 <= guided <= channels, "model.guided_channels", guided, allowed)

    @property
    def is_drawn_at_once(self) -> bool:
        return True

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """The matrices of all blocks, and the tables of classes and positions."""
        block = 10 * self.width**2 + 2 * self.width * int(self.mlp_ratio * self.width)
        tables = self.width * (self.num_classes + self.num_tokens)
        return {
            ("width", "mlp_ratio", "num_blocks"): self.num_blocks * block,
            ("width", "num_classes", "latent_size", "patch_size"): tables,
        }

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """The tokens in the blocks, each of which stores at least its input."""
        stored = 1 if "blocks" in recomputed else OF_A_TOKEN
        return self.num_blocks * draws * self.num_tokens * self.width * stored

    def least_drawn(self) -> int:
        """The tokens in a block, before and after a norm."""
        return 2 * self.num_tokens * self.width


@dataclass(frozen=True)
class DiTConfig(SiTConfig):
    """DiT: SiT's network as a diffusion in 1000 steps that learns their variances (arXiv 2212.09748)."""

    paradigm: str = "dit"
    learn_sigma: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.learn_sigma, "model.learn_sigma", self.learn_sigma, "true with model.paradigm dit")
