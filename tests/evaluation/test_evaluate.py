"""Evaluation: the same scores for any batch size and number of ranks, and a file that says how they came about."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_transdiff.config import EvaluationConfig, SamplingConfig
from lit_transdiff.evaluation.evaluate import choose_labels, choose_shown, draw, evaluate, image_seeds, prepare
from lit_transdiff.evaluation.features import FeatureExtractor
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.pictures import to_bytes
from tests.evaluation.conftest import SAMPLING, tiny_generator, tiny_settings


def close(first: dict, second: dict) -> None:
    """Scores equal up to float32 features computed in other batches."""
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-7), name


def test_the_result_file_holds_all_scores_and_what_decided_them(files: Path, tmp_path: Path) -> None:
    generator, settings = tiny_generator(), tiny_settings(files)
    result = evaluate(generator, settings, SAMPLING, output=tmp_path)
    written = json.loads(Path(result["file"]).read_text())
    assert written == {"scores": result["scores"], "manifest": result["manifest"]}
    assert set(written["scores"]) == set(METRICS) - {"spatial_frechet_distance"}
    manifest = written["manifest"]
    assert manifest["sampling"] == dataclasses.asdict(SAMPLING)
    assert manifest["weights_fingerprint"] == generator.fingerprint and manifest["extractor"] == "classifier"
    assert manifest["reference_hash"] and manifest["scored_reference"] == 0 and manifest["precision"] == "float32"
    assert manifest["decoder_evaluations_per_image"] == 2 * 2  # two steps, each with and without the label
    assert sorted(p.suffix for p in (tmp_path / "evaluations").iterdir()) == [".json", ".png"]
    with Image.open(Path(result["file"]).with_suffix(".png")) as picture:
        assert picture.width > 7 * 96


def test_equal_settings_replace_the_file_and_others_do_not(files: Path, tmp_path: Path) -> None:
    settings = tiny_settings(files, metrics=["class_accuracy"])
    names = [
        evaluate(tiny_generator(), changed, sampling, output=tmp_path)["file"]
        for changed, sampling in [
            (settings, SAMPLING),
            (dataclasses.replace(settings, batch_size=22), SAMPLING),  # decides nothing
            (dataclasses.replace(settings, seed=9), SAMPLING),
            (settings, dataclasses.replace(SAMPLING, guidance_scale=2.0)),
        ]
    ]
    assert names[0] == names[1] and len(set(names)) == 3


def test_scores_do_not_depend_on_the_batch_size(files: Path, tmp_path: Path) -> None:
    results = [evaluate(tiny_generator(), tiny_settings(files, batch_size=b), SAMPLING, output=tmp_path) for b in (1, 22)]
    close(results[0]["scores"], results[1]["scores"])


def test_the_last_image_of_a_row_is_scored(files: Path, tmp_path: Path, extractor: FeatureExtractor) -> None:
    generator, settings = tiny_generator(references=4), tiny_settings(files, num_images=6)
    job = prepare(generator, settings, SAMPLING)
    images = generator.images(job.labels, image_seeds(settings, range(6)), SAMPLING)
    assert images.shape[1] == 4
    drawn = draw(job, range(2, 6))
    assert torch.allclose(drawn.found.features, extractor(images[2:, 3]).features, atol=1e-5)
    assert torch.equal(
        drawn.pixels, to_bytes(generator.images(job.labels[2:], image_seeds(settings, range(2, 6)), SAMPLING)[:, 3])
    )
    manifest = evaluate(generator, settings, SAMPLING, output=tmp_path)["manifest"]
    assert manifest["scored_reference"] == 3 and manifest["decoder_evaluations_per_image"] == 16


def test_labels_seeds_and_shown_images() -> None:
    settings = EvaluationConfig(num_images=100)
    labels = choose_labels(settings, 30)
    assert (labels.diff() >= 0).all() and set(labels.bincount().tolist()) == {3, 4}
    assert choose_labels(dataclasses.replace(settings, num_images=10), 30).unique().numel() == 10
    random = choose_labels(dataclasses.replace(settings, label_mode="random"), 30)
    assert torch.equal(random, choose_labels(dataclasses.replace(settings, label_mode="random"), 30))
    assert random.min() >= 0 and random.max() < 30 and not torch.equal(random, labels)
    others = dataclasses.replace(settings, seed=1)
    assert len({*image_seeds(settings, range(100)), *image_seeds(others, range(100))}) == 200
    shown = choose_shown(labels)
    assert shown.shape == (10, 3) and labels[shown[:, 0]].tolist() == labels[shown[:, 2]].tolist()
    assert labels[shown[0, 0]] == 0 and labels[shown[-1, 0]] == 29


def test_what_cannot_be_scored_is_refused_before_any_image_is_drawn(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = tiny_generator()
    monkeypatch.setattr(generator, "images", lambda *_: pytest.fail("an image was drawn"))
    for changes, message in [
        (dict(metrics=["fid"]), "evaluation.metrics: 'fid' is not known"),
        (dict(reference=None), "set evaluation.reference"),
        (dict(num_neighbours=30), "evaluation.num_neighbours: got 30"),
        (dict(extractor="classifer"), "Did you mean 'classifier'"),
        (dict(extractor_weights=None), "evaluation.extractor_weights: got None"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(generator, tiny_settings(files, **changes), SAMPLING, output=tmp_path)
    with pytest.raises(ValueError, match=r"sampling\.solver"):
        evaluate(generator, tiny_settings(files), SamplingConfig(solver="eular"), output=tmp_path)
