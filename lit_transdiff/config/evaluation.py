"""Settings of evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import expand, require

OF_IMAGES = ("reference_images", "real_images", "training_images")
USUAL_METRICS = (
    "frechet_distance spatial_frechet_distance inception_score kernel_distance precision recall"
).split()
OWN_PATHS = ("extractor_weights", "weights", "reference", *OF_IMAGES)
MOST = 10_000_000  # images of an evaluation, whose features must fit into memory


@dataclass(frozen=True)
class EvaluationConfig:
    """The generated images, the metrics and the reference of an evaluation."""

    num_images: int = 50_000  # number of generated images per evaluation
    batch_size: int = 64  # images generated together per device; the images do not depend on it
    seed: int = 0  # seed of the generated images
    label_mode: Literal["balanced", "random"] = "balanced"
    # balanced: every class equally often; random: random by the seed
    extractor: str = "inception"  # a name in evaluation.features.EXTRACTORS
    extractor_weights: Optional[str] = None  # file of its weights
    extractors: list[str] = field(
        default_factory=list
    )  # further extractors of the same images; their scores are named EXTRACTOR/METRIC
    weights: dict[str, str] = field(default_factory=dict)  # weights files of the further extractors, by name
    reference: Optional[str] = None  # statistics file (.npz) of the real images, for the extractor
    reference_images: Optional[str] = None
    # real images (shards or .npz): the reference of extractors without a statistics file
    real_images: Optional[str] = None
    # other real images (shards or .npz): their scores are those to reach, and 1 in ratios
    training_images: Optional[str] = None  # images of training (shards or .npz), to find copies of them
    metrics: list[str] = field(default_factory=USUAL_METRICS.copy)  # names in evaluation.metrics.METRICS
    keep: Literal["last", "all"] = "last"
    # the images of an MRAR row that are scored: the final one, or all R of them
    num_neighbours: int = 3  # k of precision and recall
    every: int = 0  # steps between evaluations of the averaged weights during training; 0: none
    online_images: int = 2000  # number of images per evaluation during training

    @property
    def all_extractors(self) -> dict[str, str | None]:
        """The weights files of all extractors by name, the main one first."""
        further = {name: self.weights.get(name) for name in self.extractors}
        return {self.extractor: self.extractor_weights or further.get(self.extractor)} | {
            name: file for name, file in further.items() if name != self.extractor
        }

    def __post_init__(self) -> None:
        expand(self, *(f"evaluation.{name}" for name in OWN_PATHS))
        for name in ("num_images", "online_images"):
            allowed = f"2 to {MOST:,}"
            require(2 <= getattr(self, name) <= MOST, f"evaluation.{name}", getattr(self, name), allowed)
        require(1 <= self.batch_size <= 2**16, "evaluation.batch_size", self.batch_size, "1 to 65,536")
        require(0 <= self.seed < 2**32, "evaluation.seed", self.seed, "0 to 2^32 - 1")
        for name in self.weights:
            allowed = "only weights of evaluation.extractors"
            if name == self.extractor:
                allowed += "; those of evaluation.extractor are evaluation.extractor_weights"
            require(name in self.extractors, f"evaluation.weights.{name}", self.weights[name], allowed)
        require(len(self.metrics) > 0, "evaluation.metrics", self.metrics, "at least one name")
        require(self.every >= 0, "evaluation.every", self.every, "0 (off) or more")
        allowed = "an integer of at least 1"
        require(self.num_neighbours >= 1, "evaluation.num_neighbours", self.num_neighbours, allowed)
