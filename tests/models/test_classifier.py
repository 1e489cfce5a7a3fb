"""The small classifier and the judge: their files rebuild them, and the shipped weights know the bundled
clothes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_transdiff.evaluation.moments import frechet, gaussian_of
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.classifier import (
    Classifier,
    Judge,
    SmallClassifier,
    load_classifier,
    save_classifier,
)
from lit_transdiff.stages.judge import blur, noise
from tests.helpers.datamodule import FASHION, evaluation_batch

LOST = 0.03  # accuracy that the autoencoder may cost


@pytest.mark.parametrize("network", [SmallClassifier, Judge])
@pytest.mark.parametrize(("num_classes", "image_size", "image_channels"), [(10, 32, 1), (3, 24, 3)])
def test_the_file_alone_rebuilds_it(
    network: type[Classifier], num_classes: int, image_size: int, image_channels: int, tmp_path: Path
) -> None:
    classifier = network(num_classes, image_size, image_channels).eval()
    save_classifier(classifier, tmp_path / "weights.safetensors")
    loaded = load_classifier(tmp_path / "weights.safetensors", network)
    images = torch.rand(4, image_channels, image_size, image_size) * 2 - 1
    assert torch.equal(loaded(images), classifier(images))
    assert loaded(images).shape == (4, num_classes) and loaded.features(images).shape == (
        4,
        network.num_features,
    )
    torch.testing.assert_close(loaded.head(loaded.features(images)), loaded(images))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_weights_come_back_as_they_were(tmp_path: Path) -> None:
    classifier = SmallClassifier(10, 32, 1)
    save_classifier(classifier, tmp_path / "classifier.safetensors")
    before, after = classifier.state_dict(), load_classifier(tmp_path / "classifier.safetensors").state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"images: got \(2, 3, 32, 32\)"):
        SmallClassifier(10, 32, 1)(torch.zeros(2, 3, 32, 32))
    with pytest.raises(FileNotFoundError, match="classifier weights"):
        load_classifier(tmp_path / "nowhere.safetensors")
    save_file({"head.bias": torch.zeros(10)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="header"):
        load_classifier(tmp_path / "other.safetensors")
    with pytest.raises(
        ValueError, match=r"data\.image_size: got 28; allowed: a multiple of 8 in stage judge"
    ):
        Judge(10, 28, 1)
    save_classifier(SmallClassifier(10, 32, 1), tmp_path / "whole.safetensors")
    with pytest.raises(
        ValueError, match=r"header: got no 'judge' entry; allowed: a file that a run of stage judge exports"
    ):
        load_classifier(tmp_path / "whole.safetensors", Judge)
    content = (tmp_path / "whole.safetensors").read_bytes()
    for damaged in (b"", content[:100], content[:-1]):
        (tmp_path / "cut.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"cut\.safetensors is not a whole safetensors file"):
            load_classifier(tmp_path / "cut.safetensors")
    weights = SmallClassifier(10, 32, 1).state_dict()
    for header in (
        '{"num_classes": 11, "image_size": 32, "image_channels": 1}',
        '{"num_classes": 10}',
        "{",
        "[]",
    ):
        save_file(weights, tmp_path / "odd.safetensors", metadata={"classifier": header})
        with pytest.raises(ValueError, match=r"odd\.safetensors: the weights do not fit the header"):
            load_classifier(tmp_path / "odd.safetensors")


@pytest.mark.parametrize(("network", "least"), [(SmallClassifier, 0.90), (Judge, 0.86)])
def test_the_shipped_weights_know_the_bundled_images_and_their_reconstructions(
    network: type[Classifier], least: float
) -> None:
    classifier = load_classifier(FASHION / f"{network.kind}.safetensors", network)
    autoencoder = load_autoencoder("kl", FASHION / "autoencoder", image_channels=1)
    batch = evaluation_batch(1000)
    images = batch.values[:, 0]

    def accuracy(pixels: torch.Tensor) -> float:
        return (classifier(pixels).argmax(dim=1) == batch.labels).double().mean().item()

    real = accuracy(images)
    assert real >= least
    assert accuracy(autoencoder.decode(autoencoder.sample(autoencoder.encode(images)))) >= real - LOST


def test_the_judge_sees_noise_and_blur() -> None:
    """A network that names classes alone gives noise of 0.1 a distance of twice that of real images."""
    judge = load_classifier(FASHION / "judge.safetensors", Judge)
    images, others = evaluation_batch(1000).values[:, 0].split(500)
    torch.manual_seed(0)
    strength = torch.full((500, 1, 1, 1), 0.5)

    def distance(pixels: torch.Tensor) -> float:
        return frechet(gaussian_of([judge.features(pixels)]), gaussian_of([judge.features(others)]))

    real = distance(images)
    assert distance(noise(images, strength).clamp(-1, 1)) > 10 * real
    assert distance(blur(images, strength)) > 10 * real
