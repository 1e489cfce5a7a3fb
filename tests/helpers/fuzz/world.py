"""A small place to break things in: a healthy file of each kind that the program reads, and a picture of all
that lies there.
"""

from __future__ import annotations

import argparse
import gzip
import os
import random
import shutil
import struct
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from lit_transdiff.__main__ import main
from lit_transdiff.config import ModelConfig
from lit_transdiff.study.runs import archive
from tests.helpers import plain_autoencoder
from tests.helpers.released_files import SMALL, random_state
from tests.helpers.run_folders import make_run
from tests.helpers.small import ROOT, SETTINGS

SIDE, CLASSES, EACH = 32, 10, 2  # pixels, classes, images of a class
CLASSIFIER = ROOT / "data" / "fashion" / "classifier.safetensors"


def recipe() -> dict:
    """A run of two steps on a few images."""
    settings = {
        section: {**value} if isinstance(value, dict) else value for section, value in SETTINGS.items()
    }
    settings["data"] |= {"train": "work/shards", "evaluation": "work/shards", "image_size": SIDE}
    settings["model"] |= {
        "num_classes": CLASSES,
        "latent_size": SIDE,
        "patch_size": 16,
        "num_context_tokens": 4,
    }
    settings["training"] |= {
        "max_steps": 2,
        "global_batch_size": 2,
        "log_every": 1,
        "num_validation_samples": 4,
    }
    settings["evaluation"] = {
        "extractor": "classifier",
        "extractor_weights": "work/classifier.safetensors",
        "num_images": 6,
    }
    settings["evaluation"] |= {"metrics": ["class_accuracy"]}
    return settings | {"output_dir": "out"}


def write_yaml(path: Path, content: object) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def build_world(root: Path) -> None:
    """Fill ``root``: ``work`` holds what attempts break, the other folders are neighbours that nothing may
    touch.
    """
    healthy = root / "healthy"
    healthy.mkdir()
    (root / "work").symlink_to("healthy")  # paths in files are those of a copy
    write_images(healthy)
    write_recipes(healthy)
    run("pack", "work/photos", "work/shards", "--samples-per-shard", "8")
    shutil.copy(CLASSIFIER, healthy / "classifier.safetensors")
    run("train", "work/run.yaml", "output_dir=work/runs")
    write_studies(healthy)
    write_released(healthy)
    np.savez(healthy / "statistics.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(healthy / "images.npz", arr_0=np.zeros((4, SIDE, SIDE, 3), np.uint8))
    (root / "work").unlink()
    for name in ("home", "neighbour"):
        (root / name).mkdir()
        (root / name / "kept.txt").write_text("of somebody else")


def run(*words: str) -> None:
    assert main(words) == 0, words


def write_images(healthy: Path) -> None:
    draw = random.Random(0)
    for label in range(CLASSES):
        folder = healthy / "photos" / f"class {label}"
        folder.mkdir(parents=True)
        for number in range(EACH):
            Image.frombytes("L", (SIDE, SIDE), draw.randbytes(SIDE * SIDE)).save(folder / f"{number}.png")
    (healthy / "idx").mkdir()
    pixels = struct.pack(">IIII", 0x803, 10, SIDE, SIDE) + draw.randbytes(10 * SIDE * SIDE)
    for name, content in (
        ("images-idx3", pixels),
        ("labels-idx1", struct.pack(">II", 0x801, 10) + bytes(range(10))),
    ):
        (healthy / "idx" / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(content))


def write_recipes(healthy: Path) -> None:
    write_yaml(healthy / "run.yaml", recipe())
    listed = {
        "output_dir": "out",
        "runs": [{"recipe": "run.yaml"}, {"recipe": "run.yaml", "overrides": ["name=second"]}],
    }
    write_yaml(healthy / "pipeline.yaml", listed)
    parameters = {
        "x": {"values": [1, 2]},
        "lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2},
    }
    sweep = {
        "method": "random",
        "metric": {"name": "loss", "goal": "minimize"},
        "parameters": parameters,
        "run_cap": 1,
    }
    command = [
        "${env}",
        "sh",
        "-c",
        "printf 'step,images_seen,seconds,metric,value\\n1,1,1,loss,2\\n' > $WANDB_DIR/metrics.csv",
    ]
    write_yaml(healthy / "sweep.yaml", sweep | {"command": command})


def write_studies(healthy: Path) -> None:
    for number in range(2):
        make_run(healthy / "study", f"run{number}", 1.0 + number, lr=10 ** -(number + 2), seed=number)
    archive(healthy / "study", healthy / "study.zip")


def write_released(healthy: Path) -> None:
    config = ModelConfig(**SMALL)  # type: ignore[arg-type]
    content = {"model": random_state(config, 1), "model_ema": random_state(config, 2), "epoch": 7}
    content["args"] = argparse.Namespace(model="transdiff_large", resume=None)
    torch.save(content, healthy / "checkpoint-last.pth")
    torch.save({"model": plain_autoencoder.make(channels=(32, 32, 32, 32, 32))}, healthy / "kl16.ckpt")
    run("convert", "work/kl16.ckpt", "work/autoencoder")


def picture_of(root: Path, but: list[str]) -> dict[str, str]:
    """The content of every file, folder and link below ``root``, without the folders and files ``but``."""
    found: dict[str, str] = {}
    for folder, folders, files in os.walk(root):
        place = os.path.relpath(folder, root)
        folders[:] = [name for name in folders if os.path.normpath(os.path.join(place, name)) not in but]
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            relative = os.path.relpath(path, root)
            if relative not in but:
                found[relative] = look_at(path)
    return found


def look_at(path: str) -> str:
    if os.path.islink(path):
        return f"a link to {os.readlink(path)}"
    if os.path.isdir(path):
        return "a folder"
    state = os.stat(path)
    return f"{state.st_size} bytes, written at {state.st_mtime_ns}"
