"""The best that scores can be: real images and their reconstructions, against the same written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.evaluation.bounds import best_scores
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.prepare import batches_of, statistics
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.classifier import load_classifier
from tests.helpers.small import FASHION, ROOT

pytestmark = pytest.mark.numeric
CLASSIFIER = str(FASHION / "classifier.safetensors")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Two images of each class are scored, against statistics of the evaluation images."""
    folder = tmp_path_factory.mktemp("bounds")
    settings = {
        "output_dir": folder,
        "autoencoder.path": FASHION / "autoencoder",
        "evaluation.extractor_weights": CLASSIFIER,
        "evaluation.num_images": 20,
        "evaluation.batch_size": 7,
    }
    run = load_run(
        ROOT / "experiments/fashion/ar_pretrain.yaml", [f"{name}={value}" for name, value in settings.items()]
    )
    statistics(
        FASHION / "evaluation",
        folder / "reference.npz",
        data=run.data,
        extractor=load_extractor("classifier", CLASSIFIER),
    )
    return run


def frechet(features: Tensor, reference: Tensor) -> float:
    """The distance of two sets of features [N, D], in float64."""
    (a, b), means = (
        (torch.cov(x.double().T) for x in (features, reference)),
        features.double().mean(0) - reference.double().mean(0),
    )
    values, vectors = torch.linalg.eigh(b)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = torch.linalg.eigvalsh(root @ a @ root).clamp(min=0).sqrt().sum()
    return float(means.square().sum() + a.trace() + b.trace() - 2 * product)


def test_real_images_and_reconstructions_are_scored_as_drawn_ones_are(run: RunConfig) -> None:
    found = best_scores(run, FASHION / "train")
    batch = next(iter(batches_of(FASHION / "train", run.data, 200)))
    first = torch.cat([(batch.labels == c).nonzero()[:2, 0] for c in range(10)])
    images, labels = batch.values[first, 0], batch.labels[first]
    network, autoencoder = load_classifier(CLASSIFIER), load_autoencoder("kl", FASHION / "autoencoder", 1)
    reference = torch.cat(
        [network.features(b.values[:, 0]) for b in batches_of(FASHION / "evaluation", run.data, 500)]
    )
    again = (
        autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))
        .add(1)
        .mul(127.5)
        .round()
        .div(127.5)
        .sub(1)
    )
    for kind, shown in {"real images": images, "reconstructions": again}.items():
        features = network.features(shown)
        accuracy = (network.head(features).argmax(1) == labels).double().mean().item()
        assert found[kind]["class_accuracy"] == pytest.approx(accuracy)
        assert found[kind]["frechet_distance"] == pytest.approx(frechet(features, reference), rel=1e-3)
    assert "feature_diversity" not in found["real images"]


def test_what_would_mislead_is_refused(run: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"the images: got .*evaluation.*; allowed: others than those that .*reference\.npz"
    ):
        best_scores(run, FASHION / "evaluation")
    more = load_run(ROOT / "experiments/fashion/ar_pretrain.yaml", ["evaluation.num_images=4001"])
    with pytest.raises(
        ValueError, match=r"num_images: got 4001; allowed: fewer: 401 would be of class 0, which has 400"
    ):
        best_scores(more, FASHION / "train")
