"""A small model, classifier and reference, with random weights: the scores mean nothing, but must be the same
each time.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.features import load_extractor
from tests.helpers.judge import tiny_files


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in the layout of torch-fidelity's InceptionV3."""
    path = tmp_path_factory.mktemp("inception") / "inception.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {}
        )
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_, **__: None)
        torch.manual_seed(0)
        torch.save(FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception(inception_file: Path) -> FeatureExtractor:
    return load_extractor("inception", inception_file)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_files(tmp_path_factory.mktemp("judge"))


@pytest.fixture
def extractor(files: Path) -> FeatureExtractor:
    return load_extractor("classifier", files / "judge.safetensors")
