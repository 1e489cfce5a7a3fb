"""Evaluation: the same scores for any batch size and number of ranks, and a file that says how they came about."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from lit_transdiff.config import EvaluationConfig, SamplingConfig
from lit_transdiff.evaluation.evaluate import choose_labels, choose_shown, draw, evaluate, image_seeds
from lit_transdiff.evaluation.features import FeatureExtractor
from lit_transdiff.evaluation.metrics import METRICS
from tests.evaluation.conftest import SAMPLING, tiny_generator, tiny_settings

TWO_PROCESSES = """
import json, sys
from pathlib import Path
from lightning.fabric import Fabric
import torch
torch.set_num_threads(1)
from lit_transdiff.evaluation.evaluate import evaluate
from tests.evaluation.conftest import SAMPLING, tiny_generator, tiny_settings
files, output = Path(sys.argv[1]), Path(sys.argv[2])
fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
fabric.launch()
result = evaluate(tiny_generator(), tiny_settings(files, num_images=23), SAMPLING, output=output, fabric=fabric)
(output / f"rank{fabric.global_rank}.json").write_text(json.dumps(result))
fabric.barrier()
torch.distributed.destroy_process_group()
"""


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
    assert set(written["scores"]) == set(METRICS)
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


def test_shares_of_ranks_interleave_to_the_whole(files: Path, extractor: FeatureExtractor) -> None:
    settings, generator = tiny_settings(files), tiny_generator()
    labels = choose_labels(settings, 3)
    shown = choose_shown(labels)
    whole = draw(generator, extractor, settings, SAMPLING, labels, shown)
    shares = [draw(generator, extractor, settings, SAMPLING, labels, shown, rank, 3) for rank in range(3)]
    for rank, share in enumerate(shares):
        assert torch.allclose(share.features, whole.features[rank::3], atol=1e-5)
    assert torch.allclose(sum(share.samples for share in shares), whole.samples, atol=1e-5)
    assert sum(share.evaluations for share in shares) == whole.evaluations


def test_two_processes_give_the_scores_of_one(files: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = Path(__file__).parents[2]
    common = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TWO_PROCESSES, str(files), str(tmp_path)]
    processes = [
        subprocess.Popen(command, cwd=root, env=common | {"RANK": r, "LOCAL_RANK": r, "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"})
        for r in "01"
    ]
    try:
        assert [process.wait(timeout=300) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2)]
    assert ranks[0] == ranks[1] and ranks[0]["manifest"]["num_ranks"] == 2
    alone = evaluate(tiny_generator(), tiny_settings(files, num_images=23), SAMPLING, output=tmp_path)
    assert Path(alone["file"]) == Path(ranks[0]["file"])
    close(alone["scores"], ranks[0]["scores"])


def test_the_last_image_of_a_row_is_scored(files: Path, tmp_path: Path, extractor: FeatureExtractor) -> None:
    generator, settings = tiny_generator(references=4), tiny_settings(files, num_images=6)
    labels = choose_labels(settings, 3)
    share = draw(generator, extractor, settings, SAMPLING, labels, choose_shown(labels))
    images = generator.images(labels, image_seeds(settings, range(6)), SAMPLING)
    assert images.shape[1] == 4
    assert torch.allclose(share.features, extractor(images[:, 3]).features, atol=1e-5)
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
