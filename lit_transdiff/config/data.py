"""Settings of the data and the autoencoder."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional
from urllib.parse import urlsplit

from lit_transdiff.base.files import user_cache
from lit_transdiff.config.checks import expand, require

BACKGROUNDS = "white, black, grey, or a colour as '#rrggbb'"


def is_colour(text: str) -> bool:
    """Whether a setting is a colour (see ``BACKGROUNDS``)."""
    return text in ("white", "black", "grey") or re.fullmatch("#[0-9a-fA-F]{6}", text) is not None


def is_stream(source: str) -> bool:
    """Whether ``data.train`` names tars that are read as a stream, instead of a folder with an index."""
    tars = source.startswith(("http://", "https://")) and urlsplit(source).path.endswith(".tar")
    return source.startswith("pipe:") or "{" in source or tars


@dataclass(frozen=True)
class DataConfig:
    """Training and validation data, their order and augmentation."""

    train: str = ""
    # folder of shards with index.json, or the URL of one (``s3://``, ``gs://``, ``hf://datasets/``,
    # ``http(s)://``), or a stream of tars (``pipe:COMMAND``, ``http(s)://...tar``, braces)
    evaluation: Optional[str] = None  # folder of held-out shards, or the URL of one, for validation
    index: Optional[str] = None  # index.json of ``train`` if ``train`` is a stream
    cache_dir: Optional[str] = None
    # folder in which shards from URLs are kept, for all processes of a machine; null: below ~/.cache
    cache_gb: float = 50.0  # maximal size of that folder in GB; the shards not read for longest are removed
    image_size: int = 256  # pixels; images are cropped to a square and resized to it
    image_channels: int = 3  # 1 (grey) or 3 (RGB); images are converted
    crop: Literal["none", "center", "random", "random-square"] = "center"
    # center and random: ADM's crops; random-square: TransDiff's crop of training images; none: images are
    # already squares of image_size
    exif: Literal["turn", "ignore"] = "turn"  # turn: rotate by the EXIF orientation; ignore: as in ADM
    background: str = "white"  # colour behind transparent pixels: white, black, grey, or "#rrggbb"
    horizontal_flip: bool = True  # flip half of the images at random (from a cache: one made with --flips)
    groups: Optional[str] = None
    # the groups of an MRAR run: JSON lines, each a list of sample keys or {"cate", "files"}
    shuffle_block: int = 64  # shards whose samples are shuffled together; it bounds the number of open files
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    # refuse: an unreadable or damaged sample stops the run; skip: the next one of its class replaces it, with
    # a warning
    num_workers: int = 0  # data loading processes per device; 0: the training process itself

    def __post_init__(self) -> None:
        expand(self, "data.train", "data.evaluation", "data.index", "data.groups", "data.cache_dir")
        require(self.image_size >= 1, "data.image_size", self.image_size, "an integer of at least 1")
        allowed = "1 (grey) or 3 (RGB)"
        require(self.image_channels in (1, 3), "data.image_channels", self.image_channels, allowed)
        require(is_colour(self.background), "data.background", self.background, BACKGROUNDS)
        require(self.shuffle_block >= 1, "data.shuffle_block", self.shuffle_block, "an integer of at least 1")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")

        require(self.cache_gb > 0, "data.cache_gb", self.cache_gb, "above 0")

    @property
    def cache_folder(self) -> Path:
        """The folder in which shards from URLs are kept."""
        return user_cache("shards") if self.cache_dir is None else Path(self.cache_dir)

    @property
    def crops_at_random(self) -> bool:
        """Whether training uses random crops; evaluation then uses the centre crop."""
        return self.crop in ("random", "random-square")


@dataclass(frozen=True)
class AutoencoderConfig:
    """The autoencoder between pixels and normalised latents. Its folder contains the normalisation."""

    kind: str = "kl"  # a name in models.autoencoder.AUTOENCODERS
    path: Optional[str] = None
    # folder of its weights; for kl in diffusers' layout (config.json + safetensors)

    def __post_init__(self) -> None:
        expand(self, "autoencoder.path")


@dataclass(frozen=True)
class AutoencoderTraining:
    """The small KL autoencoder trained by the stage autoencoder."""

    block_channels: list[int] = field(default_factory=lambda: [32, 64, 96, 128])
    # channels of each level; every level but the last halves the size
    layers_per_block: int = 1  # residual blocks per level
    norm_groups: int = 8  # number of groups of group normalisation
    latent_channels: int = 8  # number of channels of the latents
    kl_weight: float = 1e-4  # weight of the posterior's KL divergence from N(0, 1) beside the reconstruction
    num_statistics_images: int = 10_000
    # images on which the mean and std of the latents are measured, at the end

    def __post_init__(self) -> None:
        channels = self.block_channels
        for name in ("layers_per_block", "norm_groups", "latent_channels", "num_statistics_images"):
            allowed = "an integer of at least 1"
            require(getattr(self, name) >= 1, f"autoencoder_training.{name}", getattr(self, name), allowed)
        require(len(channels) > 0, "autoencoder_training.block_channels", channels, "at least one level")
        allowed = f"multiples of norm_groups={self.norm_groups}"
        fits = all(c >= 1 and c % self.norm_groups == 0 for c in channels)
        require(fits, "autoencoder_training.block_channels", channels, allowed)
        most, given = 10_000_000, self.num_statistics_images
        require(given <= most, "autoencoder_training.num_statistics_images", given, f"at most {most:,}")
        require(self.kl_weight >= 0, "autoencoder_training.kl_weight", self.kl_weight, "0 or more")
