"""Reference statistics: their numbers, their files, and which extractor they belong to."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_transdiff.evaluation.extractor import FeatureExtractor
from lit_transdiff.evaluation.images import image_batches
from lit_transdiff.evaluation.moments import Gaussian
from lit_transdiff.evaluation.statistics import (
    Reservoir,
    Statistics,
    check_extractor,
    completed,
    load_statistics,
    reference_statistics,
    save_statistics,
)
from tests.helpers.judge import BATCHES, random_images


@pytest.mark.numeric
def test_mean_and_covariance_as_numpy_computes_them(extractor: FeatureExtractor) -> None:
    images = random_images(50)
    features = extractor(images).features.double().numpy()
    for size in (7, 50):
        found = reference_statistics(images.split(size), extractor)
        assert found.num_images == 50
        np.testing.assert_allclose(found.mu, features.mean(0), **BATCHES)
        np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), **BATCHES)
        np.testing.assert_allclose(found.features, features, **BATCHES)


def test_the_kept_sample_does_not_depend_on_the_batch_size() -> None:
    rows = np.arange(1000, dtype=np.float32)[:, None]
    kept = []
    for size in (1, 7, 1000):
        reservoir = Reservoir(100, seed=5)
        for i in range(0, 1000, size):
            reservoir.add(rows[i : i + size])
        kept.append(reservoir.stacked()[:, 0])
    assert (kept[0] == kept[1]).all() and (kept[0] == kept[2]).all()
    assert len(np.unique(kept[0])) == 100 and (np.diff(kept[0]) > 0).all()
    assert abs(kept[0].mean() - 500) < 100  # from the whole stream, not from its beginning


def test_a_file_reads_back_equal_and_the_same_content_has_the_same_hash(
    tmp_path: Path, extractor: FeatureExtractor
) -> None:
    made = reference_statistics(
        [random_images(20)], extractor, max_features=6, source="noise", settings={"crop": "center"}
    )
    first, second = save_statistics(made, tmp_path / "a" / "x.npz"), save_statistics(made, tmp_path / "y.npz")
    assert (
        (first.mu == made.mu).all()
        and (first.sigma == made.sigma).all()
        and (first.features == made.features).all()
    )
    assert (
        first.about == made.about and first.about["settings"]["crop"] == "center" and first.num_images == 20
    )
    assert first.features is not None and first.features.shape == (6, 64)
    assert first.hash == second.hash and first.hash is not None
    # no temporary file stays
    assert [file.name for file in tmp_path.iterdir()] in (["a", "y.npz"], ["y.npz", "a"])
    check_extractor(first, extractor)


def test_the_public_layout_is_inceptions(tmp_path: Path, extractor: FeatureExtractor) -> None:
    np.savez(tmp_path / "public.npz", mu=np.zeros(64), sigma=np.eye(64))
    found = load_statistics(tmp_path / "public.npz")
    assert found.num_images is None and not found.has_features and not found.has_spatial and found.about == {}
    with pytest.raises(ValueError, match=r"extractor: got 'inception'; allowed: classifier"):
        check_extractor(found, extractor)


def colour_images(count: int, size: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(256, size=(count, size, size, 3), dtype=np.uint8)


def test_a_file_with_everything_serves_each_score_its_part(
    tmp_path: Path, inception: FeatureExtractor
) -> None:
    """mu, sigma and mu_s, sigma_s are used directly, and features are computed from the images once."""
    random, pixels = np.random.default_rng(1), colour_images(9)
    given = {"mu": random.standard_normal(2048), "mu_s": random.standard_normal(2023)}
    np.savez(tmp_path / "adm.npz", arr_0=pixels, sigma=np.eye(2048), sigma_s=2 * np.eye(2023), **given)
    found = load_statistics(tmp_path / "adm.npz")
    check_extractor(found, inception)
    assert found.images == 9 and found.features is None and found.has_features and found.spatial is not None
    assert completed(found, inception, tmp_path, features=False, spatial=True) is found
    full = completed(found, inception, tmp_path, features=True, spatial=True)
    assert (
        (full.mu == given["mu"]).all()
        and (full.spatial.mu == given["mu_s"]).all()
        and (full.sigma == np.eye(2048)).all()
    )
    expected = inception(torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1).features
    np.testing.assert_allclose(full.features, expected.numpy(), **BATCHES)
    (cache,) = set(tmp_path.iterdir()) - {tmp_path / "adm.npz"}
    assert found.hash in cache.name and inception.fingerprint in cache.name
    before = cache.stat().st_mtime_ns
    again = completed(found, inception, tmp_path, features=True, spatial=True)
    assert cache.stat().st_mtime_ns == before and (again.features == full.features).all()


def test_images_alone_are_a_reference(tmp_path: Path, inception: FeatureExtractor) -> None:
    """The statistics of ``arr_0`` equal those of reference_statistics for the same images."""
    pixels = colour_images(7)
    np.savez_compressed(tmp_path / "images.npz", arr_0=pixels, arr_1=np.arange(7))
    found = load_statistics(tmp_path / "images.npz")
    check_extractor(found, inception)
    full = completed(found, inception, tmp_path, features=False, spatial=False)
    expected = reference_statistics([torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1], inception)
    for a, b in [(full.mu, expected.mu), (full.sigma, expected.sigma), (full.features, expected.features)]:
        np.testing.assert_allclose(a, b, **BATCHES)
    np.testing.assert_allclose(full.spatial.mu, expected.spatial.mu, **BATCHES)
    assert full.num_images == 7 and full.path == str(tmp_path / "images.npz")


def test_spatial_statistics_are_written_and_read_in_the_public_layout(
    tmp_path: Path, inception: FeatureExtractor
) -> None:
    images = torch.rand(6, 3, 12, 12) * 2 - 1
    made = save_statistics(reference_statistics(images.split(4), inception), tmp_path / "ours.npz")
    spatial = inception(images, spatial=True).spatial.double().numpy()
    with np.load(tmp_path / "ours.npz") as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)
        np.testing.assert_allclose(file["mu_s"], spatial.mean(0), **BATCHES)
        np.testing.assert_allclose(file["sigma_s"], np.cov(spatial, rowvar=False), **BATCHES)
    assert made.has_spatial and made.spatial.mu.shape == (2023,)
    with pytest.raises(ValueError, match=r"spatial features \(mu_s\): got 3; allowed: 2023"):
        check_extractor(dataclasses.replace(made, spatial=Gaussian(np.zeros(3), np.eye(3))), inception)


def test_images_that_the_extractor_cannot_take_are_refused_early(
    tmp_path: Path, extractor: FeatureExtractor
) -> None:
    np.savez(tmp_path / "colour.npz", arr_0=colour_images(4))
    with pytest.raises(ValueError, match="images: got"):
        check_extractor(load_statistics(tmp_path / "colour.npz"), extractor)
    for i, wrong in enumerate(
        [np.zeros((2, 8, 8), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((2, 3, 8, 8), np.uint8)]
    ):
        np.savez(tmp_path / f"{i}.npz", arr_0=wrong)
        with pytest.raises(ValueError, match=r"arr_0: got .* uint8 images of shape"):
            load_statistics(tmp_path / f"{i}.npz")


def test_another_extractor_is_refused(extractor: FeatureExtractor) -> None:
    about = {"extractor": "classifier", "fingerprint": "of other weights"}
    with pytest.raises(ValueError, match="weights of the extractor: got 'of other weights'"):
        check_extractor(Statistics(np.zeros(64), np.eye(64), about=about), extractor)
    about = {"extractor": "classifier", "fingerprint": extractor.fingerprint}
    with pytest.raises(ValueError, match="features: got 3"):
        check_extractor(Statistics(np.zeros(3), np.eye(3), about=about), extractor)


def test_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_statistics(tmp_path / "none.npz")
    np.savez(tmp_path / "half.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="at least mu and sigma"):
        load_statistics(tmp_path / "half.npz")
    np.savez(tmp_path / "half_spatial.npz", mu=np.zeros(3), sigma=np.eye(3), mu_s=np.zeros(3))
    with pytest.raises(ValueError, match="mu_s with sigma_s"):
        load_statistics(tmp_path / "half_spatial.npz")
    np.savez(tmp_path / "shape.npz", mu=np.zeros(3), sigma=np.eye(2))
    with pytest.raises(ValueError, match="sigma: got"):
        load_statistics(tmp_path / "shape.npz")
    np.savez(tmp_path / "nan.npz", mu=np.full(3, np.nan), sigma=np.eye(3))
    with pytest.raises(ValueError, match="finite"):
        load_statistics(tmp_path / "nan.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("PK\x03\x04 but no archive")
    for name in ("array.npy", "text.npz"):
        with pytest.raises(ValueError, match=r"an \.npz file"):
            load_statistics(tmp_path / name)


COVARIANCE = np.cov(np.random.default_rng(0).standard_normal((3, 100)))
MEAN = {"mu": np.zeros(3), "sigma": COVARIANCE}


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"sigma": -COVARIANCE}, "sigma: got 'eigenvalues from -1.*; allowed: none below 0"),
        ({"sigma": np.triu(COVARIANCE)}, "sigma: got 'a matrix that is not symmetric'"),
        ({"sigma": COVARIANCE + 0j}, "sigma: got 'complex128'; allowed: real numbers"),
        ({"mu": np.array(["a", "b", "c"])}, "mu: got '<U1'; allowed: real numbers"),
        ({"mu": np.zeros(0), "sigma": np.zeros((0, 0))}, "mu: got 'no numbers'"),
        ({"mu_s": np.zeros(3), "sigma_s": -COVARIANCE}, "sigma_s: got 'eigenvalues"),
        ({"features": np.full((5, 3), np.inf)}, "features: got 'NaN or Inf'"),
        ({"features": np.zeros((1, 3))}, r"features: got \(1, 3\); allowed: at least 2 rows"),
        ({"features": np.zeros((0, 3))}, r"features: got \(0, 3\); allowed: at least 2 rows"),
        ({"num_images": np.arange(3)}, r"num_images: got \[0, 1, 2\]; allowed: an integer"),
        ({"about": np.array("[1]")}, r"about: got \[1\]; allowed: a JSON object"),
        ({"about": np.array("{")}, "Expecting property name"),
        ({"arr_0": np.zeros((1, 4, 4, 3), np.uint8)}, "arr_0: got '1 image'"),
    ],
)
def test_numbers_that_are_no_statistics_are_refused_with_the_file(
    tmp_path: Path, wrong: dict, message: str
) -> None:
    np.savez(tmp_path / "odd.npz", **{**MEAN, **wrong})
    with pytest.raises(ValueError, match=rf"^evaluation\.reference: {tmp_path}/odd\.npz: {message}"):
        load_statistics(tmp_path / "odd.npz")


def test_a_covariance_may_be_rounded_and_of_low_rank(tmp_path: Path) -> None:
    rows = np.random.default_rng(0).standard_normal((5, 40)) * np.linspace(1, 100, 40)
    np.savez(tmp_path / "ok.npz", mu=np.zeros(40, np.float32), sigma=np.cov(rows.T).astype(np.float32))
    assert load_statistics(tmp_path / "ok.npz").mu.dtype == np.float64
    np.savez(tmp_path / "zero.npz", mu=np.zeros(4), sigma=np.zeros((4, 4)))
    load_statistics(tmp_path / "zero.npz")


def test_a_damaged_compressed_file_is_named(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "whole.npz", **MEAN)
    content = bytearray((tmp_path / "whole.npz").read_bytes())
    content[100:140] = bytes(byte ^ 255 for byte in content[100:140])
    (tmp_path / "damaged.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.npz"):
        load_statistics(tmp_path / "damaged.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_and_cut_images_are_named(tmp_path: Path, save) -> None:
    images = np.random.default_rng(0).integers(256, size=(9, 8, 8, 3), dtype=np.uint8)
    save(tmp_path / "whole.npz", arr_0=images)
    whole = (tmp_path / "whole.npz").read_bytes()
    for content in (
        whole[:-200],
        whole[:300] + bytes(byte ^ 255 for byte in whole[300:340]) + whole[340:],
        b"PK",
    ):
        (tmp_path / "damaged.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged\.npz is damaged"):
            list(image_batches(tmp_path / "damaged.npz", 4))
    save(tmp_path / "other.npz", arr_1=images)
    with pytest.raises(ValueError, match=r"other\.npz: .*arr_0.*; allowed: images as arr_0"):
        list(image_batches(tmp_path / "other.npz", 4))
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (9, 8, 8, 3)}
    )
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + images[:6].tobytes())
    with pytest.raises(
        ValueError, match=r"short\.npz: arr_0: got 'an end after 4 to 8 images'; allowed: 9 images"
    ):
        list(image_batches(tmp_path / "short.npz", 4))


def test_one_image_has_no_covariance(extractor: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        reference_statistics([random_images(1)], extractor)
    assert reference_statistics([random_images(3)], extractor, max_features=0).features is None
    with pytest.raises(ValueError, match="max_features: got 1; allowed: 0 or at least 2"):
        reference_statistics([random_images(3)], extractor, max_features=1)
