"""Reference statistics: their numbers, their files, and which extractor they belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lit_transdiff.evaluation.features import FeatureExtractor
from lit_transdiff.evaluation.statistics import (
    Reservoir,
    Statistics,
    check_extractor,
    load_statistics,
    reference_statistics,
    save_statistics,
)
from tests.evaluation.conftest import random_images


def test_mean_and_covariance_as_numpy_computes_them(extractor: FeatureExtractor) -> None:
    images = random_images(50)
    features = extractor(images).features.double().numpy()
    for size in (7, 50):
        found = reference_statistics(images.split(size), extractor)
        assert found.num_images == 50
        np.testing.assert_allclose(found.mu, features.mean(0), atol=1e-6)
        np.testing.assert_allclose(found.sigma, np.cov(features, rowvar=False), atol=1e-6)
        np.testing.assert_allclose(found.features, features, atol=1e-6)


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


def test_a_file_reads_back_equal_and_the_same_content_has_the_same_hash(tmp_path: Path, extractor: FeatureExtractor) -> None:
    made = reference_statistics([random_images(20)], extractor, max_features=6, source="noise", settings={"crop": "center"})
    first, second = save_statistics(made, tmp_path / "a" / "x.npz"), save_statistics(made, tmp_path / "y.npz")
    assert (first.mu == made.mu).all() and (first.sigma == made.sigma).all() and (first.features == made.features).all()
    assert first.about == made.about and first.about["settings"]["crop"] == "center" and first.num_images == 20
    assert first.features is not None and first.features.shape == (6, 64)
    assert first.hash == second.hash and first.hash is not None
    assert [file.name for file in tmp_path.iterdir()] in (["a", "y.npz"], ["y.npz", "a"])  # no temporary file stays
    check_extractor(first, extractor)


def test_the_public_layout_is_inceptions(tmp_path: Path, extractor: FeatureExtractor) -> None:
    np.savez(tmp_path / "public.npz", mu=np.zeros(64), sigma=np.eye(64), mu_s=np.zeros(3), arr_0=np.zeros((2, 2)))
    found = load_statistics(tmp_path / "public.npz")
    assert found.num_images is None and found.features is None and found.about == {}
    with pytest.raises(ValueError, match=r"extractor: got 'inception'; allowed: classifier"):
        check_extractor(found, extractor)


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


def test_one_image_has_no_covariance(extractor: FeatureExtractor) -> None:
    with pytest.raises(ValueError, match="at least 2"):
        reference_statistics([random_images(1)], extractor)
    assert reference_statistics([random_images(3)], extractor, max_features=0).features is None
