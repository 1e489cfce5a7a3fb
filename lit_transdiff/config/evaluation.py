"""Settings of evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import expand, require

MOST = 10_000_000  # images of an evaluation, whose features must fit into memory


@dataclass(frozen=True)
class EvaluationConfig:
    """The generated images, the metrics and the reference of an evaluation."""

    num_images: int = 50_000  # number of generated images per evaluation
    batch_size: int = 64  # images generated together per device; the images do not depend on it
    seed: int = 0  # seed of the generated images
    label_mode: Literal["balanced", "random"] = (
        "balanced"  # balanced: every class equally often; random: random by the seed
    )
    extractor: str = "inception"  # a name in evaluation.features.EXTRACTORS
    extractor_weights: Optional[str] = None  # file of its weights
    reference: Optional[str] = None  # statistics file (.npz) of the real images
    metrics: list[str] = field(
        default_factory=lambda: [
            *("frechet_distance", "spatial_frechet_distance", "inception_score"),
            *("kernel_distance", "precision", "recall"),
        ]
    )  # names in evaluation.metrics.METRICS
    keep: Literal["last", "all"] = (
        "last"  # which images of an MRAR row are scored: the final one, or all R of them
    )
    num_neighbours: int = 3  # k of precision and recall
    every: int = 0  # steps between evaluations of the averaged weights during training; 0: none
    online_images: int = 2000  # number of images per evaluation during training

    def __post_init__(self) -> None:
        expand(self, "evaluation.extractor_weights", "evaluation.reference")
        for name in ("num_images", "online_images"):
            require(
                2 <= getattr(self, name) <= MOST, f"evaluation.{name}", getattr(self, name), f"2 to {MOST:,}"
            )
        require(1 <= self.batch_size <= 2**16, "evaluation.batch_size", self.batch_size, "1 to 65,536")
        require(0 <= self.seed < 2**32, "evaluation.seed", self.seed, "0 to 2^32 - 1")
        require(len(self.metrics) > 0, "evaluation.metrics", self.metrics, "at least one name")
        require(self.every >= 0, "evaluation.every", self.every, "0 (off) or more")
        require(
            self.num_neighbours >= 1,
            "evaluation.num_neighbours",
            self.num_neighbours,
            "an integer of at least 1",
        )
