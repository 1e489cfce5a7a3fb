"""One pass over the images for several extractors, with references made of images and stored once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from lit_transdiff.base.files import read_json
from lit_transdiff.config import EvaluationConfig
from lit_transdiff.config.loading import run_from
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.evaluation.extractor import FeatureExtractor, Features
from lit_transdiff.evaluation.features import EXTRACTORS
from lit_transdiff.evaluation.job import draw_batch, prepare_job
from lit_transdiff.evaluation.memorisation import SHOWN_PAIRS, probability_of_less, redrawn
from lit_transdiff.evaluation.references import features_of, images_at, in_order_of_class
from lit_transdiff.evaluation.scores import nearest_file
from lit_transdiff.evaluation.statistics import load_statistics
from lit_transdiff.study.runs import runs
from tests.helpers.judge import SAMPLING, random_images, tiny_generator, tiny_settings
from tests.helpers.run_folders import on_the_page

METRICS = ["frechet_distance", "mind", "cmmd", "whole_kernel_distance", "recall", "coverage"]
OF_REAL = ["frechet_ratio", "sliced_ratio", "mean_frechet_ratio", "authenticity"]


class Corners(FeatureExtractor):
    """Four pixels of an image."""

    gives_logits = False
    weights_file = "any file"

    def __init__(self, path: str | Path) -> None:
        super().__init__("corners", torch.nn.Identity(), "fingerprint", 4, None)

    def extract(self, pixels: Tensor, spatial: bool) -> Features:
        return Features(pixels[:, 0, ::9, ::9].flatten(1).float() / 255)


@pytest.fixture(autouse=True)
def corners(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(EXTRACTORS, "corners", Corners)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Real images, other ones, and images of training."""
    for name, seed in {"real": 1, "others": 2, "training": 3}.items():
        bytes_ = ((random_images(60, seed) + 1) * 127.5).byte().numpy()
        np.savez(tmp_path / f"{name}.npz", arr_0=np.repeat(bytes_.transpose(0, 2, 3, 1), 3, axis=3))
    return tmp_path


def several(files: Path, images: Path, **changes: Any) -> EvaluationConfig:
    given: dict[str, Any] = dict(
        num_images=48,
        extractors=["classifier", "corners"],
        weights={"corners": __file__},
        reference=None,
        reference_images=str(images / "real.npz"),
        real_images=str(images / "others.npz"),
        training_images=str(images / "training.npz"),
        metrics=[*METRICS, *OF_REAL, "class_accuracy", "feature_diversity"],
    )
    return tiny_settings(files, **(given | changes))


def test_one_pass_gives_the_scores_of_every_extractor(
    files: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, settings = tiny_generator(), several(files, images)
    drawn: list[int] = []
    made = type(generator).images
    monkeypatch.setattr(type(generator), "images", lambda self, *a: drawn.append(len(a[0])) or made(self, *a))
    result = evaluate(generator, settings, SAMPLING, output=images)
    assert sum(drawn) == 48 + SHOWN_PAIRS  # the pairs in the picture are drawn again
    scores, manifest = result["scores"], result["manifest"]
    of_both = [*METRICS, "frechet_ratio", "sliced_ratio", "authenticity"]
    of_network = ["class_accuracy", "feature_diversity", "mean_frechet_ratio"]
    assert set(scores) == {*of_both, *of_network, *(f"corners/{name}" for name in of_both)}
    ratios = [scores[f"{prefix}frechet_ratio"] for prefix in ("", "corners/")]
    assert scores["mean_frechet_ratio"] == pytest.approx(np.mean(ratios))
    assert manifest["extractors"]["corners"]["extractor_fingerprint"] == "fingerprint"
    assert manifest["groups"] == 20 and len(manifest["without_group"]["corners/mind"]) == 20
    real = manifest["real_scores"]
    assert scores["corners/frechet_ratio"] == pytest.approx(
        scores["corners/frechet_distance"] / real["corners/frechet_distance"]
    )

    alone = dataclasses.replace(
        settings, extractor="corners", extractor_weights=__file__, extractors=[], weights={}
    )
    alone = dataclasses.replace(alone, metrics=of_both)
    own = evaluate(tiny_generator(), alone, SAMPLING, output=images / "alone")["scores"]
    assert own == {name: scores[f"corners/{name}"] for name in of_both}


def test_features_of_real_images_are_stored_under_a_fingerprint(
    files: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = several(files, images)
    first = evaluate(tiny_generator(), settings, SAMPLING, output=images / "first")
    stored = sorted(path.name for path in images.glob("*-*-fingerprint.npz"))
    assert [name.split("-")[0] for name in stored] == ["others", "real", "training"]
    monkeypatch.setattr(
        "lit_transdiff.evaluation.references.reference_statistics", lambda *_, **__: pytest.fail("again")
    )
    again = evaluate(tiny_generator(), settings, SAMPLING, output=images / "again")
    assert again["scores"] == first["scores"]


def test_copies_of_training_images_are_found_and_shown(
    files: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """First training images of the same distribution as the held-out ones, then the samples themselves."""
    settings = several(files, images, extractors=[], weights={}, metrics=["authenticity"])
    first = evaluate(tiny_generator(), settings, SAMPLING, output=images, save_images="npz")
    told = first["manifest"]["nearest_training_images"]
    assert told["held_out_images"] == settings.real_images and 0 <= told["closer"] <= 1
    samples = Path(first["file"]).with_suffix(".npz")
    copied = dataclasses.replace(settings, training_images=str(samples))
    again = evaluate(tiny_generator(), copied, SAMPLING, output=images / "again")
    told = again["manifest"]["nearest_training_images"]
    assert told["closer"] == 1 and told["samples"][1] < 1e-6 < told["held_out"][0]
    assert again["scores"]["authenticity"] == 0
    with Image.open(nearest_file(Path(again["file"]))) as picture:
        tiles = np.asarray(picture.convert("L"), dtype=int)
    assert tiles.std() > 10

    job = prepare_job(tiny_generator(), copied, SAMPLING)
    drawn = redrawn(job, [3, 40])
    assert torch.equal(to_bytes(drawn), draw_batch(job, [3, 40]).pixels)
    page = on_the_page(runs(images / "again"))[0]["evaluations"][0]
    assert page["nearest"].startswith("data:image/webp")


def test_memorisation_by_hand() -> None:
    assert probability_of_less(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])) == (0.5 + 1 + 1 + 0) / 4


def test_settings_of_several_extractors_name_the_result_and_earlier_names_stay(
    files: Path, images: Path
) -> None:
    settings = several(files, images, metrics=METRICS)
    one = dataclasses.replace(settings, extractors=[], weights={}, real_images=None)
    names = [evaluate(tiny_generator(), each, SAMPLING, output=images)["file"] for each in (settings, one)]
    assert names[0] != names[1] and read_json(Path(names[1]))["manifest"]["extractors"] == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": {}}, r"evaluation\.weights\.corners: got None"),
        ({"extractors": ["classifier"]}, r"evaluation\.weights\.corners: got .*only weights of"),
        ({"real_images": None}, "Frechet ratio needs real images beside the reference"),
        ({"training_images": None}, "authentic images needs images of training"),
        ({"reference_images": None}, "reference_images"),
        ({"reference_images": "nothing.npz"}, r"evaluation\.reference_images: got 'nothing.npz'"),
        ({"metrics": ["class_coverage"]}, "set evaluation.reference_images to shards"),
        ({"extractors": ["corner"], "weights": {}}, "Did you mean 'corners'"),
    ],
)
def test_what_is_missing_is_refused_before_sampling(
    files: Path, images: Path, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = tiny_generator()
    monkeypatch.setattr(generator, "images", lambda *_: pytest.fail("an image was drawn"))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        evaluate(generator, several(files, images, **changes), SAMPLING, output=images / "out")


def test_shards_give_features_with_their_classes_and_images(tmp_path: Path, monkeypatch: Any) -> None:
    """Against the images themselves; nothing is written beside the bundled shards."""
    source = "data/fashion/evaluation"
    data = run_from({"data": {"image_size": 32, "image_channels": 1}}).data
    found = features_of(source, data, Corners(""), tmp_path)
    assert found.labels is not None and found.features is not None
    assert len(list(tmp_path.iterdir())) == 1 and found.features.shape == (2000, 16)
    assert np.all(np.diff(np.sort(found.labels)) >= 0) and np.bincount(found.labels).tolist() == [200] * 10
    places = [5, 1999, 700]
    again = Corners("").extract(((images_at(source, data, places) + 1) * 127.5).round().byte(), False)
    assert np.allclose(again.features.numpy(), found.features[places])
    ordered = in_order_of_class(found)
    assert np.array_equal(ordered[:200], found.features[found.labels == 0])
    assert load_statistics(next(tmp_path.iterdir())).places.tolist() == list(range(2000))  # type: ignore[union-attr]
