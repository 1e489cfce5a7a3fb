"""The trained models that come with the program draw at once, from any folder, and do not change theirs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.data.pixels import from_bytes
from lit_transdiff.models.classifier import load_classifier
from lit_transdiff.tracking.metrics_file import last_logged, read_rows
from tests.helpers.small import ROOT

FASHION = ROOT / "data" / "fashion"
MODELS = {"one_step": 1, "mrar": 4}  # references


def files() -> set[Path]:
    return set(FASHION.rglob("*"))


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_draws_images_of_their_classes(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = files()
    assert (
        main(["sample", "--checkpoint", f"data/fashion/{name}", "--classes", "1,8,9", "--per-class", "4"])
        == 0
    )
    drawn = tmp_path / "runs" / "bundled" / name / "samples" / "drawn"
    assert (drawn / "grid.png").is_file() and files() == before
    images = {
        file: int(file.parent.name.removeprefix("class-")) for file in sorted(drawn.glob("class-*/*.png"))
    }
    pixels = torch.from_numpy(np.stack([np.array(Image.open(file).convert("L")) for file in images]))
    found = load_classifier(FASHION / "classifier.safetensors")(from_bytes(pixels[:, None])).argmax(dim=1)
    assert len(images) == 12 and (found == torch.tensor(list(images.values()))).sum() >= 11


@pytest.mark.parametrize("name", MODELS)
def test_a_bundled_model_says_how_it_was_trained(name: str) -> None:
    export = read_export(FASHION / name)
    assert (
        export.run.model.num_references == MODELS[name]
        and export.info["step"] == export.run.training.max_steps
    )
    assert {value.dtype for value in export.state.values() if value.is_floating_point()} == {torch.float16}
    assert sum((FASHION / other / "model.safetensors").stat().st_size for other in MODELS) < 8 * 2**20
    assert last_logged(read_rows(FASHION / name / "metrics.csv"))["val/loss"] < 1
