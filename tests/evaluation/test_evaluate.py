"""Evaluation: the same scores for any batch size and number of ranks, and a file with
all their conditions.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lit_transdiff.base.files import read_json, short_hash
from lit_transdiff.config import EvaluationConfig, SamplingConfig
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.evaluation.evaluate import choose_shown, evaluate
from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.job import choose_labels, draw_batch, image_seeds, prepare_job
from lit_transdiff.evaluation.results import result_name, said
from lit_transdiff.evaluation.statistics import Statistics, load_statistics, save_statistics
from tests.helpers.judge import SAMPLING, tiny_generator, tiny_settings
from tests.helpers.small import twice


def close(first: dict, second: dict) -> None:
    """Scores of the same pixels, equal up to float32 features computed in other batches."""
    assert first.keys() == second.keys()
    for name in first:
        assert first[name] == pytest.approx(second[name], rel=1e-4, abs=1e-7), name


def test_the_result_file_holds_all_scores_and_what_decided_them(files: Path, tmp_path: Path) -> None:
    generator, settings = tiny_generator(), tiny_settings(files)
    result = evaluate(generator, settings, SAMPLING, output=tmp_path)
    written = read_json(Path(result["file"]))
    assert written == {"scores": result["scores"], "manifest": result["manifest"]}
    assert set(written["scores"]) == set(settings.metrics)
    manifest = written["manifest"]
    assert manifest["sampling"] == said(SAMPLING)
    assert manifest["weights_fingerprint"] == generator.fingerprint and manifest["extractor"] == "classifier"
    assert (
        manifest["reference_hash"]
        and manifest["scored_reference"] == 0
        and manifest["precision"] == "float32"
    )
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


@pytest.mark.numeric
def test_scores_do_not_depend_on_the_batch_size(files: Path, tmp_path: Path) -> None:
    results = [
        evaluate(tiny_generator(), tiny_settings(files, batch_size=b), SAMPLING, output=tmp_path)
        for b in (1, 22)
    ]
    close(results[0]["scores"], results[1]["scores"])


@pytest.mark.parametrize("label_mode, spread", [("balanced", 1), ("random", 2)])
def test_the_manifest_says_how_labels_were_chosen_and_what_was_kept(
    files: Path, tmp_path: Path, label_mode: str, spread: int
) -> None:
    settings = tiny_settings(files, label_mode=label_mode)
    manifest = evaluate(tiny_generator(), settings, SAMPLING, output=tmp_path, save_images="folder")[
        "manifest"
    ]
    assert manifest["label_mode"] == label_mode
    counts = choose_labels(settings, 3).bincount(minlength=3)
    assert (
        manifest["images_of_a_class"] == [counts.min(), counts.max()]
        and counts.max() - counts.min() >= spread
    )
    assert (
        manifest["spatial_features"] is False
        and manifest["num_features"] == 64
        and manifest["num_ranks"] == 1
    )
    assert manifest["saved_images"] == [f"{result_name(manifest)}-images"]
    assert manifest["reference_hash"] == short_hash(files / "reference.npz")
    assert manifest["extractor_fingerprint"] == short_hash(files / "judge.safetensors")


def test_all_scores_of_the_adm_evaluator_from_a_file_in_its_layout(
    tmp_path: Path, inception_file: Path
) -> None:
    """mu, sigma, mu_s, sigma_s and arr_0 in one file; each score as its parts give it."""
    random = np.random.default_rng(0)
    pixels = random.integers(256, size=(12, 16, 16, 3), dtype=np.uint8)
    given = {"mu": np.zeros(2048), "sigma": np.eye(2048), "mu_s": np.ones(2023), "sigma_s": 2 * np.eye(2023)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, **given)
    names = [
        "frechet_distance",
        "spatial_frechet_distance",
        "inception_score",
        "kernel_distance",
        "precision",
        "recall",
    ]
    settings = EvaluationConfig(
        num_images=8, batch_size=3, extractor_weights=str(inception_file), metrics=names
    )
    settings = dataclasses.replace(settings, reference=str(tmp_path / "adm.npz"))
    generator = tiny_generator()
    result = evaluate(generator, settings, SAMPLING, output=tmp_path)
    assert set(result["scores"]) == set(names) and result["manifest"]["spatial_features"] is True

    without = dataclasses.replace(settings, reference=None, metrics=["inception_score"])
    job = prepare_job(generator, without, SAMPLING)
    spatial = dataclasses.replace(job.representations[0], metrics=["spatial_frechet_distance"])
    found = draw_batch(dataclasses.replace(job, representations=[spatial]), range(8)).features[0]
    for name, rows, mu, scale in [
        ("frechet_distance", found.features, 0.0, 1.0),
        ("spatial_frechet_distance", found.spatial, 1.0, 2.0),
    ]:
        # Against N(mu, s I) it is |m - mu|^2 + sum (a - s^(1/2))^2 over all D deviations a, of which N - 1
        # are not zero.
        wide = rows.double().numpy()
        a = np.zeros(wide.shape[1])
        a[:8] = np.linalg.svd(wide - wide.mean(0), compute_uv=False) / np.sqrt(7)
        expected = ((wide.mean(0) - mu) ** 2).sum() + ((a - np.sqrt(scale)) ** 2).sum()
        assert result["scores"][name] == pytest.approx(expected, rel=1e-5)


def test_images_are_saved_as_adm_reads_them_and_as_files(files: Path, tmp_path: Path) -> None:
    generator, settings = tiny_generator(), tiny_settings(files)
    result = evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="both")
    name = Path(result["file"]).with_suffix("")
    drawn = [
        draw_batch(prepare_job(generator, settings, SAMPLING), range(i, min(i + 5, 22))).pixels
        for i in range(0, 22, 5)
    ]
    expected = torch.cat(drawn)[:, 0].numpy()  # [N, H, W], grey
    saved = np.load(name.with_suffix(".npz"))
    assert saved["arr_0"].shape == (22, 16, 16, 3) and saved["arr_0"].dtype == np.uint8
    assert (saved["arr_0"] == expected[..., None]).all()
    assert (saved["arr_1"] == choose_labels(settings, 3).numpy()).all()
    files_of_images = sorted(Path(f"{name}-images").iterdir())
    assert [file.name for file in files_of_images] == [f"{i:05d}.png" for i in range(22)]
    assert all(
        (np.asarray(Image.open(file)) == image).all()
        for file, image in zip(files_of_images, expected, strict=True)
    )
    kinds = {path.suffix for path in (tmp_path / "evaluations").iterdir()}
    assert kinds == {".json", ".png", ".npz", ""} and len(list((tmp_path / "evaluations").iterdir())) == 4
    again = load_statistics(name.with_suffix(".npz"))  # the export is a reference, too
    assert again.images == 22


def test_saved_images_are_part_of_what_is_reused(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, settings = tiny_generator(), tiny_settings(files, metrics=["class_accuracy"])
    evaluate(generator, settings, SAMPLING, output=tmp_path)
    result = evaluate(generator, settings, SAMPLING, output=tmp_path, reuse=True, save_images="npz")
    assert Path(result["file"]).with_suffix(".npz").is_file() and result["manifest"]["saved_images"]
    monkeypatch.setattr(generator, "images", lambda *_: pytest.fail("an image was drawn"))
    assert evaluate(generator, settings, SAMPLING, output=tmp_path, reuse=True, save_images="npz") == result
    with pytest.raises(ValueError, match="save_images: 'nzp' is not known"):
        evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="nzp")


def test_images_without_room_are_not_drawn(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """22 images of 16 x 16: three channels in the file, and one (grey) for each image
    that is still missing.
    """
    generator, settings = tiny_generator(), tiny_settings(files, metrics=["class_accuracy"])
    needed = 22 * 16 * 16 * (3 + 1)
    monkeypatch.setattr("lit_transdiff.base.files.free_bytes", lambda folder: needed - 1)
    with monkeypatch.context() as patch:
        patch.setattr(generator, "images", lambda *_: pytest.fail("an image was drawn"))
        with pytest.raises(
            ValueError, match=r"22\.5 kB are to be written, but only 22\.5 kB are free on that disk"
        ):
            evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="npz")
    evaluate(generator, settings, SAMPLING, output=tmp_path)
    monkeypatch.setattr("lit_transdiff.base.files.free_bytes", lambda folder: needed)
    evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="npz")


def test_an_evaluation_that_failed_while_scoring_draws_nothing_again(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, settings = tiny_generator(), tiny_settings(files, metrics=["class_accuracy", "precision"])
    with monkeypatch.context() as patch:
        patch.setattr("lit_transdiff.evaluation.evaluate.measure_all", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="folder")
    (parts,) = (tmp_path / "evaluations").iterdir()
    assert "division by zero" in (parts / "failed").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(generator, "images", lambda *_: pytest.fail("an image was drawn"))
        result = evaluate(generator, settings, SAMPLING, output=tmp_path, save_images="folder")
    assert not parts.exists()
    assert result["scores"] == evaluate(generator, settings, SAMPLING, output=tmp_path / "other")["scores"]


@pytest.mark.numeric
def test_the_last_image_of_a_row_is_scored(files: Path, tmp_path: Path, extractor: FeatureExtractor) -> None:
    generator, settings = tiny_generator(references=4), tiny_settings(files, num_images=6)
    job = prepare_job(generator, settings, SAMPLING)
    images = generator.images(job.labels, image_seeds(settings, range(6)), SAMPLING)
    assert images.shape[1] == 4
    drawn = draw_batch(job, range(2, 6))
    assert torch.allclose(drawn.features[0].features, extractor(images[2:, 3]).features, atol=1e-5)
    assert torch.equal(
        drawn.pixels,
        to_bytes(generator.images(job.labels[2:], image_seeds(settings, range(2, 6)), SAMPLING)[:, 3]),
    )
    manifest = evaluate(generator, settings, SAMPLING, output=tmp_path)["manifest"]
    assert manifest["scored_reference"] == 3 and manifest["decoder_evaluations_per_image"] == 16


@pytest.mark.numeric
def test_all_images_of_a_row_are_scored_for_the_work_of_one(
    files: Path, tmp_path: Path, extractor: FeatureExtractor
) -> None:
    generator, settings = (
        tiny_generator(references=4),
        tiny_settings(files, num_images=16, batch_size=8, keep="all"),
    )
    job = prepare_job(generator, settings, SAMPLING)
    rows = generator.images(job.labels[::4], image_seeds(settings, range(0, 16, 4)), SAMPLING)
    drawn = draw_batch(job, range(8, 16))
    assert torch.equal(drawn.pixels, to_bytes(rows[2:].flatten(0, 1)))
    assert torch.allclose(drawn.features[0].features, extractor(rows[2:].flatten(0, 1)).features, atol=1e-5)
    assert all(len(set(labels)) == 1 for labels in job.labels.reshape(-1, 4).tolist())
    manifest = evaluate(generator, settings, SAMPLING, output=tmp_path)["manifest"]
    assert manifest["scored_reference"] == "all" and manifest["decoder_evaluations_per_image"] == 4
    for name in ("num_images", "batch_size"):
        with pytest.raises(
            ValueError, match=rf"evaluation\.{name}: got 6; allowed: a multiple of the 4 images of a row"
        ):
            prepare_job(generator, dataclasses.replace(settings, **{name: 6}), SAMPLING)


def test_settings_that_came_later_are_said_where_they_are_changed() -> None:
    """So a result of an earlier version and the same one of today have one name."""
    assert {"part_guidance", "num_parts"}.isdisjoint(said(SamplingConfig()))
    changed = SamplingConfig(part_guidance="growing", num_parts=4)
    assert said(changed) == said(SamplingConfig()) | {"part_guidance": "growing", "num_parts": 4}


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


def reference_of(files: Path, rows: int) -> Statistics:
    """The reference with only so many rows of features."""
    reference = load_statistics(files / "reference.npz")
    assert reference.features is not None
    return dataclasses.replace(reference, features=reference.features[:rows])


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
    few = save_statistics(reference_of(files, rows=3), tmp_path / "few.npz")
    for metrics in (["precision"], ["recall"]):
        with pytest.raises(
            ValueError, match=r"num_neighbours: features of .*few\.npz: got 3; allowed: more than 3"
        ):
            evaluate(
                generator,
                tiny_settings(files, metrics=metrics, reference=few.path),
                SAMPLING,
                output=tmp_path,
            )
    with pytest.raises(ValueError, match=r"sampling\.solver"):
        evaluate(generator, tiny_settings(files), SamplingConfig(solver="eular"), output=tmp_path)


def test_a_classifier_of_other_classes_does_not_judge(files: Path, tmp_path: Path) -> None:
    """Its class names are in the export beside its weights; without an export only their number is known."""
    (tmp_path / "judge.safetensors").write_bytes((files / "judge.safetensors").read_bytes())
    settings = tiny_settings(files, extractor_weights=str(tmp_path / "judge.safetensors"))
    prepare_job(tiny_generator(), settings, SAMPLING)
    for names in (["a", "b", "c"], ["0", "1", "2"]):
        (tmp_path / "export.json").write_text(json.dumps({"class_names": names}))
        prepare_job(tiny_generator(), settings, SAMPLING)
    (tmp_path / "export.json").write_text(json.dumps({"class_names": ["b", "c", "d"]}))
    with pytest.raises(
        ValueError, match=r"_weights: .*: got class 0 'b'; allowed: 'a', which is class 0 of the trained"
    ):
        prepare_job(tiny_generator(), settings, SAMPLING)
    # asks for no class
    prepare_job(tiny_generator(), dataclasses.replace(settings, metrics=["frechet_distance"]), SAMPLING)


def test_two_evaluations_at_once_are_one(files: Path, tmp_path: Path) -> None:
    generator, settings = tiny_generator(), tiny_settings(files)
    one, other = twice(lambda: evaluate(generator, settings, SAMPLING, output=tmp_path))
    assert one == other and [path.suffix for path in sorted((tmp_path / "evaluations").iterdir())] == [
        ".json",
        ".png",
    ]
