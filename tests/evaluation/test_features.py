"""Extractors: what they refuse, and that they see images as files hold them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_transdiff.evaluation.features import EXTRACTORS, FeatureExtractor, load_extractor
from lit_transdiff.models.classifier import load_classifier
from tests.evaluation.conftest import random_images


def test_the_classifier_gives_its_own_features_and_logits(files: Path, extractor: FeatureExtractor) -> None:
    pixels = torch.randint(256, (6, 1, 16, 16), dtype=torch.uint8)
    images = pixels.float() / 255 * 2 - 1
    network = load_classifier(files / "judge.safetensors")
    found = extractor(images)
    assert torch.allclose(found.features, network.features(images), atol=1e-5)
    assert torch.allclose(found.logits, network(images), atol=1e-5)
    assert found.features.shape == (6, extractor.num_features) and found.logits.shape == (6, extractor.num_classes)


def test_images_are_rounded_to_bytes_first(extractor: FeatureExtractor) -> None:
    images = random_images(4)
    rounded = torch.from_numpy(np.round(np.clip((images.numpy() + 1) / 2 * 255, 0, 255))) / 127.5 - 1
    assert torch.equal(extractor(images).features, extractor(rounded).features)
    assert torch.equal(extractor(images.clamp(0.9, 3)).features, extractor(images.clamp(0.9, 1)).features)


def test_training_mode_cannot_be_entered(extractor: FeatureExtractor) -> None:
    extractor.train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@pytest.mark.parametrize("name", EXTRACTORS)
def test_weights_are_required(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"evaluation.extractor_weights: got None"):
        load_extractor(name, None)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_extractor(name, tmp_path / "nothing.pth")


def test_wrong_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Did you mean 'inception'\?"):
        load_extractor("inceptoin", "x")
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for file in ("text.pth", "other.pth"):
        with pytest.raises(ValueError, match="pt_inception-2015-12-05-6726825d"):
            load_extractor("inception", tmp_path / file)


def test_inception_with_a_weights_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights in the right layout: shapes, grey images, and the network that torch-fidelity makes of the same file."""
    with monkeypatch.context() as patch:
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), tmp_path / "inception.pth")
    extractor = load_extractor("inception", tmp_path / "inception.pth")
    grey = random_images(2)
    found = extractor(grey)
    assert found.features.shape == (2, extractor.num_features) == (2, 2048) and found.logits.shape == (2, 1008)
    assert torch.equal(found.features, extractor(grey.expand(-1, 3, -1, -1)).features)

    original = FeatureExtractorInceptionV3("same", ["2048", "logits_unbiased"], str(tmp_path / "inception.pth"))
    pixels = ((grey + 1) / 2 * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    assert all(torch.equal(a, b) for a, b in zip(original(pixels), found, strict=True))
