"""What is read, and the autoencoder between pixels and latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import require


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how samples are ordered and augmented."""

    train: str = ""  # folder of shards with an index.json, or a webdataset URL (``pipe:``, ``http(s)://``, braces expand)
    evaluation: Optional[str] = None  # same, for held-out data
    index: Optional[str] = None  # index.json of ``train`` when ``train`` is a URL
    image_size: int = 256  # pixels; images are cropped to a square and resized to it
    image_channels: int = 3
    crop: Literal["none", "center", "random", "random-square"] = "center"  # center, random: of ADM; random-square: of TransDiff
    horizontal_flip: bool = True  # flip half of the images (the other half of a cache made with both flips)
    groups: Optional[str] = None  # JSON lines, a list of sample keys or {"cate", "files"} each: the groups of an MRAR run
    shuffle_block: int = 64  # shards whose samples are shuffled together: bounds how many files are open at a time
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    num_workers: int = 0

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "an integer of at least 1")
        require(self.image_channels in (1, 3), "data.image_channels", self.image_channels, "1 (grey) or 3 (RGB)")
        require(self.shuffle_block >= 1, "data.shuffle_block", self.shuffle_block, "an integer of at least 1")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")

    @property
    def crops_at_random(self) -> bool:
        """Whether training sees another crop of an image each time; evaluation then takes the centre crop."""
        return self.crop in ("random", "random-square")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Pixels <-> normalised latents. The scale lives in the autoencoder's own folder, not here."""

    kind: str = "kl"  # a name in models.autoencoder.AUTOENCODERS
    path: Optional[str] = None  # its folder, where it has one: kl in diffusers' layout (config.json + safetensors)


@dataclass(frozen=True)
class AutoencoderTraining:
    """The small KL autoencoder that the preparatory stage trains on the user's own shards."""

    block_channels: list[int] = field(
        default_factory=lambda: [32, 64, 96, 128]
    )  # one level each; every level but the last halves the size
    layers_per_block: int = 1
    norm_groups: int = 8
    latent_channels: int = 8
    kl_weight: float = 1e-4
    num_statistics_images: int = 10_000  # images over which the latents' per-channel mean and std are measured at the end

    def __post_init__(self) -> None:
        channels = self.block_channels
        for name in ("layers_per_block", "norm_groups", "latent_channels", "num_statistics_images"):
            require(getattr(self, name) >= 1, f"autoencoder_training.{name}", getattr(self, name), "an integer of at least 1")
        require(len(channels) > 0, "autoencoder_training.block_channels", channels, "at least one level")
        require(
            all(c >= 1 and c % self.norm_groups == 0 for c in channels),
            "autoencoder_training.block_channels",
            channels,
            f"multiples of norm_groups={self.norm_groups}",
        )
        require(self.kl_weight >= 0, "autoencoder_training.kl_weight", self.kl_weight, "0 or more")
