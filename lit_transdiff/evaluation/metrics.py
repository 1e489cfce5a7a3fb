"""The metrics: the table METRICS of functions, their requirements, and the scores of one extractor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from lit_transdiff.config import EvaluationConfig, require_known
from lit_transdiff.evaluation import functions
from lit_transdiff.evaluation.features import EXTRACTORS, check_extractor_weights, check_name
from lit_transdiff.evaluation.functions import Scored
from lit_transdiff.evaluation.scores import Score
from lit_transdiff.evaluation.statistics import Statistics


@dataclass(frozen=True)
class Metric:
    """A row of METRICS, callable like its function: title, whether higher is better, and requirements."""

    function: Callable[..., Score | Tensor]
    title: str
    higher_is_better: bool
    needs: tuple[str, ...] = ()  # keys of NEEDS
    in_parts: bool = False  # whether its uncertainty is from disjoint parts: scores of nearest neighbours

    def __call__(self, generated: Scored, reference: Statistics | None, settings: EvaluationConfig) -> Score:
        found = self.values(generated, reference, settings)
        return float(found[0]) if isinstance(found, Tensor) else found

    def values(
        self, generated: Scored, reference: Statistics | None, settings: EvaluationConfig
    ) -> Score | Tensor:
        """The score, or of smooth ones also the values without each group of images: [1 + K]."""
        self.check(
            there(
                reference,
                logits=generated.logits is not None,
                class_logits=generated.logits_name_classes,
                semantic=generated.semantic_features is not None,
                spatial=generated.spatial is not None,
                held_out=generated.held_out is not None,
                training=generated.training is not None,
            )
        )
        return self.function(generated, reference, settings)

    def check(self, have: set[str]) -> None:
        """Raise ``ValueError`` with the setting that provides a requirement missing in ``have``."""
        for need in self.needs:
            if need not in have:
                raise ValueError(f"evaluation.metrics: {self.title} needs {NEEDS[need]}.")


OF_REFERENCE, OF_FEATURES = ("reference",), ("reference", "reference features")
METRICS: dict[str, Metric] = {
    "frechet_distance": Metric(functions.frechet_distance, "Frechet distance", False, OF_REFERENCE),
    "frechet_ratio": Metric(
        functions.frechet_ratio, "Frechet ratio", False, ("reference", "other real images")
    ),
    "mean_frechet_ratio": Metric(
        functions.frechet_ratio, "mean Frechet ratio", False, ("reference", "other real images")
    ),
    "spatial_frechet_distance": Metric(
        functions.spatial_frechet_distance,
        "spatial Frechet distance",
        False,
        ("reference", "reference spatial", "spatial features"),
    ),
    "inception_score": Metric(functions.inception_score, "inception score", True, ("logits",)),
    "mind": Metric(functions.mind, "MIND", False, OF_FEATURES),
    "sliced_ratio": Metric(
        functions.sliced_ratio, "sliced Wasserstein ratio", False, (*OF_FEATURES, "other real images")
    ),
    "cmmd": Metric(functions.cmmd, "CMMD", False, OF_FEATURES),
    "unbiased_cmmd": Metric(functions.unbiased_cmmd, "unbiased CMMD", False, OF_FEATURES),
    "kernel_distance": Metric(functions.kernel_distance, "kernel distance", False, OF_FEATURES),
    "whole_kernel_distance": Metric(
        functions.whole_kernel_distance, "kernel distance of all images", False, OF_FEATURES
    ),
    "precision": Metric(functions.precision, "precision", True, OF_FEATURES, in_parts=True),
    "recall": Metric(functions.recall, "recall", True, OF_FEATURES, in_parts=True),
    "density": Metric(functions.density, "density", True, OF_FEATURES, in_parts=True),
    "coverage": Metric(functions.coverage, "coverage", True, OF_FEATURES, in_parts=True),
    "class_coverage": Metric(
        functions.class_coverage,
        "lowest coverage of a class",
        True,
        (*OF_FEATURES, "reference labels"),
        in_parts=True,
    ),
    "authenticity": Metric(
        functions.authenticity, "authentic images", True, ("training images",), in_parts=True
    ),
    "class_accuracy": Metric(functions.class_accuracy, "class accuracy", True, ("logits", "class logits")),
    "feature_diversity": Metric(
        functions.feature_diversity, "feature similarity", False, ("semantic features",)
    ),
}

NEEDS: dict[str, str] = {
    "reference": "the statistics of real images: set evaluation.reference to a statistics file (.npz), or "
    "evaluation.reference_images to real images",
    "reference features": "features of real images, missing in evaluation.reference: make it with "
    "max_features above 0, or use a file with the images themselves (arr_0)",
    "reference spatial": "spatial statistics of real images (mu_s, sigma_s), missing in evaluation.reference",
    "spatial features": "spatial features: set evaluation.extractor to 'inception'",
    "logits": "logits: set evaluation.extractor to a network that has them",
    "class logits": "logits over the model's own classes: set evaluation.extractor to 'classifier' or "
    "'judge', trained on them",
    "reference labels": "the classes of real images: set evaluation.reference_images to shards",
    "other real images": "real images beside the reference: set evaluation.real_images",
    "training images": "images of training: set evaluation.training_images",
    "semantic features": "a model.paradigm with semantic features (an encoder before its decoder)",
}


def there(
    reference: Statistics | None,
    *,
    logits: bool,
    class_logits: bool,
    semantic: bool,
    spatial: bool,
    held_out: bool = False,
    training: bool = False,
) -> set[str]:
    """The NEEDS that are met."""
    have = {
        "reference": reference is not None,
        "reference features": reference is not None and reference.has_features,
        "reference spatial": reference is not None and reference.has_spatial,
        "reference labels": reference is not None and reference.labels is not None,
        "other real images": held_out,
        "training images": training,
        "spatial features": spatial,
        "logits": logits,
        "class logits": class_logits,
        "semantic features": semantic,
    }
    return {need for need, met in have.items() if met}


def needed_by(names: Sequence[str]) -> set[str]:
    """The NEEDS of all these metrics."""
    return {need for name in names for need in METRICS[name].needs}


def check_metrics(names: Sequence[str], have: set[str]) -> None:
    """Raise ``ValueError`` for an unknown metric or one with unmet requirements, before hours of sampling."""
    for name in names:
        require_known("evaluation.metrics", name, METRICS)
        METRICS[name].check(have)


def check_evaluation(settings: EvaluationConfig, *, scores: bool, semantic: bool = True) -> None:
    """Refuse unknown extractors and metrics and, for a run that ``scores``, settings that do not fit them.

    Files are not checked, because the extractor and the reference may still be made before their use.
    ``semantic`` tells whether the model has semantic features.
    """
    for name in settings.all_extractors:
        check_name(name)
    lacking: set[str] = set()
    if scores:
        for name, weights in settings.all_extractors.items():
            check_extractor_weights(name, weights, settings.extractor)
        extractor = EXTRACTORS[settings.extractor]
        has = {
            "reference": settings.reference or settings.reference_images,
            "reference labels": settings.reference_images,
            "other real images": settings.real_images,
            "training images": settings.training_images,
            "logits": extractor.gives_logits,
            "spatial features": extractor.num_spatial,
        }
        has["semantic features"] = semantic
        lacking = {need for need, value in has.items() if not value}
    check_metrics(settings.metrics, set(NEEDS) - lacking)
