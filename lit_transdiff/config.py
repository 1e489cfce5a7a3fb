"""Every setting of the platform, as frozen dataclasses that are checked once, when they are made.

A run is one YAML file (see ``loading``). This module imports no torch, so that a bad setting is reported before anything
slow is loaded.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

# Table of sizes: the paper's three (arXiv 2506.09482, Table 1) and small ones for laptops and tests.
# encoder_blocks is the real number of blocks; the reference code counts pairs of them.
SIZES: dict[str, dict[str, int]] = {
    #              width       heads          encoder               decoder
    "test": dict(width=32, num_heads=2, encoder_blocks=2, decoder_blocks=2),
    "nano": dict(width=128, num_heads=4, encoder_blocks=4, decoder_blocks=4),
    "small": dict(width=384, num_heads=6, encoder_blocks=12, decoder_blocks=6),
    "base": dict(width=768, num_heads=12, encoder_blocks=24, decoder_blocks=12),
    "large": dict(width=1024, num_heads=16, encoder_blocks=32, decoder_blocks=16),
    "huge": dict(width=1280, num_heads=16, encoder_blocks=40, decoder_blocks=20),
}


def unknown(what: str, value: object, allowed: Iterable[str]) -> ValueError:
    """The one wording for a name that is not in a table: field, value, what is allowed, nearest match."""
    names = sorted(allowed)
    close = difflib.get_close_matches(str(value), names, n=1, cutoff=0.5)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{what}: {value!r} is not known.{hint} Allowed: {', '.join(names)}.")


def require(condition: bool, what: str, value: object, allowed: str) -> None:
    """Raise ``ValueError`` naming the field, the value received and what is allowed, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"{what}: got {value!r}; allowed: {allowed}.")


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how samples are ordered and augmented."""

    train: str = ""  # folder of shards with an index.json, or a webdataset URL (``pipe:``, ``http(s)://``, braces expand)
    evaluation: Optional[str] = None  # same, for held-out data
    index: Optional[str] = None  # index.json of ``train`` when ``train`` is a URL
    image_size: int = 256  # pixels; images are cropped to a square and resized to it
    image_channels: int = 3
    crop: Literal["none", "center", "random"] = "center"
    horizontal_flip: bool = True  # flip half of the images (the other half of a cache made with both flips)
    groups: Optional[str] = None  # JSON lines, one list of sample keys a line: the groups of an MRAR run, instead of regrouping
    shuffle_block: int = 64  # shards whose samples are shuffled together: bounds how many files are open at a time
    on_bad_sample: Literal["refuse", "skip"] = "refuse"
    num_workers: int = 0

    def __post_init__(self) -> None:
        require(self.image_size >= 1, "data.image_size", self.image_size, "an integer of at least 1")
        require(self.image_channels in (1, 3), "data.image_channels", self.image_channels, "1 (grey) or 3 (RGB)")
        require(self.shuffle_block >= 1, "data.shuffle_block", self.shuffle_block, "an integer of at least 1")
        require(self.num_workers >= 0, "data.num_workers", self.num_workers, "0 or more")


@dataclass(frozen=True)
class AutoencoderConfig:
    """Pixels <-> normalised latents. The scale lives in the autoencoder's own folder, not here."""

    kind: Literal["kl", "identity"] = "kl"
    path: Optional[str] = None  # folder in diffusers' layout (config.json + safetensors)

    def __post_init__(self) -> None:
        require(
            (self.kind == "kl") == (self.path is not None),
            "autoencoder.path",
            self.path,
            "a folder when autoencoder.kind is 'kl', nothing when it is 'identity'",
        )


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
        require(len(channels) > 0, "autoencoder_training.block_channels", channels, "at least one level")
        require(
            all(c % self.norm_groups == 0 for c in channels),
            "autoencoder_training.block_channels",
            channels,
            f"multiples of norm_groups={self.norm_groups}",
        )
        require(self.kl_weight >= 0, "autoencoder_training.kl_weight", self.kl_weight, "0 or more")


COUNTS_OF_MODEL = (
    "width",
    "num_heads",
    "encoder_blocks",
    "decoder_blocks",
    "num_classes",
    "num_class_tokens",
    "latent_channels",
    "latent_size",
    "patch_size",
    "num_context_tokens",
    "num_references",
)


@dataclass(frozen=True)
class ModelConfig:
    """One TransDiff for every number of references: R = 1 is one-step AR, R > 1 is MRAR."""

    size: str = "base"  # a row of SIZES; the four fields below override it
    width: int = 768
    num_heads: int = 12
    encoder_blocks: int = 24
    decoder_blocks: int = 12
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    num_class_tokens: int = 64
    latent_channels: int = 16
    latent_size: int = 16  # height and width of the latent
    patch_size: int = 1  # latent pixels (a side) in one decoder token
    num_context_tokens: int = 256  # R x L, the semantic features of all references together
    num_references: int = 1
    attention_dropout: float = 0.1
    projection_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in COUNTS_OF_MODEL:
            require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "an integer of at least 1")
        require(self.width % self.num_heads == 0, "model.num_heads", self.num_heads, f"a divisor of model.width={self.width}")
        require(self.latent_size % self.patch_size == 0, "model.patch_size", self.patch_size, f"a divisor of {self.latent_size}")
        for name in ("attention_dropout", "projection_dropout"):
            require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "0 <= p < 1")
        require(
            self.num_context_tokens % self.num_references == 0,
            "model.num_references",
            self.num_references,
            f"a divisor of model.num_context_tokens={self.num_context_tokens}",
        )
        if self.num_references > 1:
            side = math.isqrt(self.tokens_per_reference)
            require(
                side * side == self.tokens_per_reference and self.latent_size % side == 0,
                "model.num_references",
                self.num_references,
                f"a value for which {self.num_context_tokens}/num_references tokens form a square grid that divides "
                f"the {self.latent_size} x {self.latent_size} latent",
            )

    @property
    def tokens_per_reference(self) -> int:
        return self.num_context_tokens // self.num_references

    @property
    def reference_patch_size(self) -> int:
        """Latent pixels (a side) in one encoder token of a reference image (2 in the paper); meaningful for R > 1."""
        return self.latent_size // math.isqrt(self.tokens_per_reference)

    @property
    def num_decoder_tokens(self) -> int:
        return (self.latent_size // self.patch_size) ** 2


@dataclass(frozen=True)
class FlowConfig:
    """The training objective: how t is drawn, how many draws an image, how often the label is dropped."""

    density: str = "logit_normal"  # a name in flow.loss.DENSITIES
    density_mean: float = 0.0  # of the normal under the logit; unused by 'uniform'
    density_std: float = 1.0
    shift: float = 1.0  # t -> shift t / (1 + (shift - 1) t); above 1 moves mass towards noise
    discretize: Optional[int] = None  # t -> floor(t n) / n; the reference trains with n = 1000
    num_noise_draws: int = 4
    label_drop_prob: float = 0.1

    def __post_init__(self) -> None:
        require(self.density_std > 0, "flow.density_std", self.density_std, "above 0")
        require(self.shift > 0, "flow.shift", self.shift, "above 0")
        require(self.discretize is None or self.discretize >= 2, "flow.discretize", self.discretize, "nothing, or 2 and more")
        require(self.num_noise_draws >= 1, "flow.num_noise_draws", self.num_noise_draws, "an integer of at least 1")
        require(0 <= self.label_drop_prob <= 1, "flow.label_drop_prob", self.label_drop_prob, "0 to 1")


@dataclass(frozen=True)
class SamplingConfig:
    """How an image is drawn from a trained model."""

    solver: str = "euler_maruyama"  # a name in flow.solvers.SOLVERS
    grid: str = "paper"  # a name in flow.solvers.GRIDS
    num_steps: int = 100
    shift: float = 1.0  # of the grid, as in FlowConfig
    drift_scale: float = 1.0  # the paper's scale_0
    noise_scale: float = 1.0  # the paper's scale_1
    guidance_scale: float = 1.0
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])  # t (1 = noise) between which guidance acts
    reference_guidance: Optional[list[float]] = None  # one scale a reference instead of guidance_scale
    reuse_noise: bool = True  # MRAR: one initial noise for all references of an image, as in the paper

    def __post_init__(self) -> None:
        require(self.num_steps >= 1, "sampling.num_steps", self.num_steps, "an integer of at least 1")
        require(self.shift > 0, "sampling.shift", self.shift, "above 0")
        scales = [self.guidance_scale, *(self.reference_guidance or [])]
        require(all(s >= 1 for s in scales), "sampling.guidance_scale", scales, "1 (no guidance) and more")
        low_high = self.guidance_interval
        require(
            len(low_high) == 2 and 0 <= low_high[0] <= low_high[1] <= 1,
            "sampling.guidance_interval",
            low_high,
            "[low, high] with 0 <= low <= high <= 1",
        )
        require(self.noise_scale >= 0, "sampling.noise_scale", self.noise_scale, "0 or more")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with the paper's two groups, warm-up, clipping and the average of the weights."""

    lr: float = 8e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    eps: float = 1e-8
    weight_decay: float = 0.02
    warmup_steps: int = 0
    schedule: str = "constant"  # a name in stages.optim.SCHEDULES
    min_lr: float = 0.0
    gradient_clip: float = 3.0
    ema_decay: float = 0.9999

    def __post_init__(self) -> None:
        require(self.lr > 0, "optimizer.lr", self.lr, "above 0")
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 <= decay < 1")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(self.gradient_clip >= 0, "optimizer.gradient_clip", self.gradient_clip, "0 (off) or more")
        require(
            len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "optimizer.betas", self.betas, "two values in [0, 1)"
        )


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and rhythm of a run. The clock is optimizer steps and images seen, never epochs."""

    max_steps: int = 1000
    global_batch_size: int = 256
    micro_batch_size: Optional[int] = None  # images a device and forward pass; nothing: global batch / devices
    precision: Literal["auto", "fp32", "bf16-mixed"] = "auto"  # auto: bf16-mixed on GPUs that have it, fp32 on CPUs
    log_every: int = 10
    validate_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 500
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    num_validation_samples: int = 512

    def __post_init__(self) -> None:
        for name in ("max_steps", "global_batch_size", "log_every", "checkpoint_every"):
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), "an integer of at least 1")
        for name in ("validate_every", "sample_every", "num_validation_samples"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        micro = self.micro_batch_size
        require(
            micro is None or (micro >= 1 and self.global_batch_size % micro == 0),
            "training.micro_batch_size",
            micro,
            f"a divisor of training.global_batch_size={self.global_batch_size}",
        )


@dataclass(frozen=True)
class EvaluationConfig:
    """Which images are generated for a score, and what they are compared with."""

    num_images: int = 50_000
    batch_size: int = 64
    seed: int = 0
    label_mode: Literal["balanced", "random"] = "balanced"
    extractor: str = "inception"  # a name in evaluation.features.EXTRACTORS
    extractor_weights: Optional[str] = None
    reference: Optional[str] = None  # statistics file (.npz) of the real images
    metrics: list[str] = field(
        default_factory=lambda: ["frechet_distance", "inception_score", "kernel_distance", "precision", "recall"]
    )  # names in evaluation.metrics.METRICS
    num_neighbours: int = 3  # of precision and recall

    def __post_init__(self) -> None:
        require(self.num_images >= 2, "evaluation.num_images", self.num_images, "an integer of at least 2")
        require(self.batch_size >= 1, "evaluation.batch_size", self.batch_size, "an integer of at least 1")
        require(self.num_neighbours >= 1, "evaluation.num_neighbours", self.num_neighbours, "an integer of at least 1")


@dataclass(frozen=True)
class TrackingConfig:
    """Weights & Biases. Online, offline or disabled is decided by W&B's own environment variables."""

    wandb: bool = True
    project: str = "lit-transdiff"
    group: Optional[str] = None
    tags: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class DistributedConfig:
    """On what the run is spread."""

    strategy: str = "auto"  # a name in distributed.STRATEGIES, or auto: single on one device, ddp on several
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: Optional[int] = None  # a node; nothing: as many as torchrun started, or one
    num_nodes: int = 1

    def __post_init__(self) -> None:
        require(self.devices is None or self.devices >= 1, "distributed.devices", self.devices, "nothing, or 1 and more")
        require(self.num_nodes >= 1, "distributed.num_nodes", self.num_nodes, "1 or more")


@dataclass(frozen=True)
class RunConfig:
    """One run: everything that decides its numbers."""

    name: str = "run"
    stage: str = "ar_pretrain"  # a name in stages.STAGES
    output_dir: str = "runs"  # the run folder is output_dir/name
    seed: int = 0
    init_from: Optional[str] = None  # run folder or export folder whose (EMA) weights this run starts from
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(kind="identity"))
    autoencoder_training: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    model: ModelConfig = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)

    def __post_init__(self) -> None:
        require(bool(self.name) and "/" not in self.name, "name", self.name, "a folder name without '/'")
        require(
            self.optimizer.warmup_steps <= self.training.max_steps,
            "optimizer.warmup_steps",
            self.optimizer.warmup_steps,
            f"at most training.max_steps={self.training.max_steps}",
        )
        scales = self.sampling.reference_guidance
        require(
            scales is None or len(scales) == self.model.num_references,
            "sampling.reference_guidance",
            scales,
            f"one scale for each of the model's {self.model.num_references} references",
        )

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def images_per_step(self) -> int:
        """Images of an optimizer step: a row of the batch holds ``num_references`` of them."""
        return self.training.global_batch_size * self.model.num_references


# Sections of a run's settings and what they are made of.
NESTED: dict[str, type] = {
    "data": DataConfig,
    "autoencoder": AutoencoderConfig,
    "autoencoder_training": AutoencoderTraining,
    "model": ModelConfig,
    "flow": FlowConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "sampling": SamplingConfig,
    "evaluation": EvaluationConfig,
    "tracking": TrackingConfig,
    "distributed": DistributedConfig,
}
