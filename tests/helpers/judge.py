"""A small model, classifier and reference, with random weights: the scores mean nothing, but must be the same
each time.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.config import EvaluationConfig, RunConfig, SamplingConfig
from lit_transdiff.config.loading import run_from
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.statistics import reference_statistics, save_statistics
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.classifier import SmallClassifier, save_classifier
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.sampling.generator import Generator

# float32 features of about 1, made in other batches: five layers of sums of up to 864 terms err by some
# sqrt(864) 2^-24 each.
BATCHES = {"rtol": 1e-5, "atol": 1e-5}
SAMPLING = SamplingConfig(solver="euler", grid="uniform", num_steps=2, guidance_scale=1.5)


def tiny_run(references: int = 1, name: str = "tiny") -> RunConfig:
    model = dict(
        size="test", num_classes=3, num_class_tokens=2, latent_channels=1, latent_size=16, patch_size=4
    )
    model |= dict(num_context_tokens=16, num_references=references)
    return run_from({"name": name, "data": {"image_size": 16, "image_channels": 1}, "model": model})


class ExactGenerator(Generator):
    """Computes in float64: in float32 the last bits, and now and then a byte of an image, depend on the
    batch.
    """

    def latents(self, *arguments: Any, **named: Any) -> Tensor:
        torch.set_default_dtype(torch.float64)  # of the noise
        try:
            return super().latents(*arguments, **named)
        finally:
            torch.set_default_dtype(torch.float32)


def tiny_generator(references: int = 1, name: str = "tiny") -> Generator:
    run = tiny_run(references, name)
    torch.manual_seed(0)
    model = TransDiff(run.model).eval().requires_grad_(False)
    for parameter in model.parameters():  # a fresh decoder gives zero: then no label or guidance would matter
        parameter += 0.2 * torch.randn_like(parameter)
    parts = model.double(), load_autoencoder("identity", None, 1), run, ["a", "b", "c"]
    return ExactGenerator(*parts, "in memory", f"weights of {references}")


def random_images(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def tiny_settings(folder: Path, **changes: object) -> EvaluationConfig:
    """Settings for the files that ``tiny_files`` wrote."""
    metrics = [
        "frechet_distance",
        "inception_score",
        "kernel_distance",
        "precision",
        "recall",
        "class_accuracy",
        "feature_diversity",
    ]
    given = dict(num_images=22, batch_size=5, seed=3, extractor="classifier", metrics=metrics)
    given |= dict(
        extractor_weights=str(folder / "judge.safetensors"), reference=str(folder / "reference.npz")
    )
    return EvaluationConfig(**(given | changes))  # type: ignore[arg-type]


def tiny_files(folder: Path) -> Path:
    """A classifier and reference statistics made with it."""
    torch.manual_seed(1)
    save_classifier(SmallClassifier(3, 16, 1), folder / "judge.safetensors")
    extractor = load_extractor("classifier", folder / "judge.safetensors")
    save_statistics(reference_statistics(random_images(40).split(7), extractor), folder / "reference.npz")
    return folder
