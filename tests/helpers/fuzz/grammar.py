"""The grammar of attempts: a broken file, and the command that a user would run on it."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from tests.helpers.fuzz.damage import (
    Change,
    change_arrays,
    change_bytes,
    change_json,
    change_members,
    change_settings,
    change_tensors,
    change_text,
    odd_value,
    places,
)
from tests.helpers.fuzz.world import recipe

RUN, EXPORT = "work/runs/small", "work/runs/small/export"
CHECKPOINT = f"{RUN}/checkpoints/step-00000002"
KL = (
    "autoencoder.kind=kl autoencoder.path=work/autoencoder data.image_channels=3 model.latent_channels=4 "
    "model.latent_size=2"
)
CACHE = f"cache work/run.yaml work/shards out/latents {KL} model.patch_size=1"
CONVERT = "convert work/checkpoint-last.pth out/converted --autoencoder work/autoencoder --num-heads 2"
REFERENCE = "evaluation.reference=work/statistics.npz evaluation.metrics=[frechet_distance]"
SHARD_CHANGES = (change_bytes, change_members, change_members)
# What is broken: files (patterns below the world), how, and the commands that read them. OUT is where the
# command may write.
KINDS: dict[str, list[tuple[str, Sequence[Change], list[str]]]] = {
    "recipe": [
        (
            "work/run.yaml",
            (change_settings, change_settings, change_text),
            [
                "train work/run.yaml --dry-run",
                "train work/run.yaml --dry-run",
                "train work/run.yaml",
                "plan work/run.yaml --gpus 8 --gpu h100",
                CACHE,
                "statistics work/run.yaml work/shards out/statistics.npz",
                f"{CONVERT} --recipe work/run.yaml",
            ],
        ),
        (
            "work/pipeline.yaml",
            (change_settings, change_text),
            ["run work/pipeline.yaml --dry-run", "run work/pipeline.yaml"],
        ),
    ],
    "sweep": [
        (
            "work/sweep.yaml",
            (change_settings, change_settings, change_text),
            ["sweep work/sweep.yaml --output out/sweep", "sweep work/sweep.yaml"],
        )
    ],
    "index": [
        (
            "work/shards/index.json",
            (change_json, change_json, change_bytes, change_text),
            READERS := [
                "verify work/shards",
                "train work/run.yaml",
                CACHE,
                "statistics work/run.yaml work/shards out/statistics.npz",
                f"evaluate --checkpoint {RUN} --output out",
            ],
        ),
        ("work/shards/index.npz", (change_arrays, change_arrays, change_bytes, change_members), READERS),
    ],
    "archive": [
        (
            "work/shards/*.tar",
            SHARD_CHANGES,
            [
                *READERS,
                "index work/shards",
                "index work/shards --label json:a --workers 0",
                "index work/shards --class-names a,b,c",
            ],
        ),
        (
            "work/photos/*/*.png",
            (change_bytes,),
            ["pack work/photos out/pack --image-size 8", "pack work/photos out/pack"],
        ),
        ("work/idx/*", (change_bytes,), ["pack work/idx out/pack --split train"]),
        (
            "work/study.zip",
            (change_bytes, change_members),
            ["report work/study.zip --output out/report.html"],
        ),
        (
            "work/statistics.npz",
            (change_arrays, change_bytes, change_members),
            [f"evaluate --checkpoint {RUN} --output out {REFERENCE}"],
        ),
        (
            "work/images.npz",
            (change_arrays, change_bytes, change_members),
            ["statistics work/run.yaml work/images.npz out/statistics.npz"],
        ),
    ],
    "checkpoint": [
        (
            f"{EXPORT}/export.json",
            (change_json, change_bytes),
            USERS := [
                f"sample --checkpoint {RUN} --per-class 1 --output out/drawn",
                f"evaluate --checkpoint {EXPORT} --output out",
                "train work/run.yaml output_dir=work/runs",
                "train work/run.yaml stage=diffusion_head init_from=work/runs/small name=head",
                "report work/runs --output out/report.html",
                "train work/run.yaml model.width=32 init_from=work/runs/small init_shapes=new name=wide",
            ],
        ),
        (f"{EXPORT}/config.yaml", (change_settings, change_text), USERS),
        (f"{EXPORT}/model.safetensors", (change_tensors, change_tensors, change_bytes), USERS),
        (
            f"{RUN}/config.yaml",
            (change_settings, change_text),
            GOES_ON := [
                "train work/run.yaml output_dir=work/runs training.max_steps=3",
                f"export {RUN} --output out/export",
                "report work/runs --output out/report.html",
            ],
        ),
        (f"{RUN}/environment.json", (change_json, change_bytes), GOES_ON),
        (f"{RUN}/metrics.csv", (change_text, change_bytes), GOES_ON),
        (f"{CHECKPOINT}/*", (change_bytes, change_bytes), GOES_ON),
        (f"{CHECKPOINT}/*.json", (change_json,), GOES_ON),
        (f"{CHECKPOINT}/*.safetensors", (change_tensors,), GOES_ON),
        (
            "work/checkpoint-last.pth",
            (change_bytes, change_members),
            [CONVERT],
        ),
        ("work/kl16.ckpt", (change_bytes, change_members), ["convert work/kl16.ckpt out/autoencoder"]),
        (
            "work/autoencoder/config.json",
            (change_json, change_bytes),
            AUTOENCODER := [
                "convert work/autoencoder out/kl16.ckpt",
                CACHE,
                CONVERT,
            ],
        ),
        ("work/autoencoder/*.safetensors", (change_tensors, change_bytes), AUTOENCODER),
        (
            "work/classifier.safetensors",
            (change_tensors, change_bytes),
            [
                f"evaluate --checkpoint {RUN} --output out",
                "statistics work/run.yaml work/shards out/statistics.npz",
            ],
        ),
        (
            "work/study/run0/evaluations/r.json",
            (change_json, change_bytes),
            STUDY := ["compare work/study --output out", "report work/study --output out/report.html"],
        ),
        ("work/study/run0/metrics.csv", (change_text, change_bytes), STUDY),
        ("work/study/run0/config.yaml", (change_settings, change_text), STUDY),
        ("work/study/run0/*/*.png", (change_bytes,), STUDY),
        ("work/study/run0/export/export.json", (change_json, change_bytes), STUDY),
    ],
}
WRITES = {"index": ["work/shards"], "train": ["work/runs"], "evaluate": [], "sweep": ["runs"]}  # beside "out"


@dataclass(frozen=True)
class Attempt:
    """A command after something was broken: its words, what was done before it, and where it may write."""

    kind: str
    words: list[str]
    done: str
    writes: list[str]


def draw_attempt(draw: random.Random, kind: str) -> Attempt:
    """Break something in the working folder and choose a command that reads it."""
    pattern, changes, commands = draw.choice(KINDS[kind])
    words = draw.choice(commands).split()
    done = ""
    if draw.random() < 0.9:
        file = draw.choice(sorted(path for path in Path().glob(pattern) if path.is_file()))
        change: Callable[[random.Random, Path], str] = draw.choice(changes)
        done = f"{file}: {change.__name__}: {change(draw, file)}"
    else:
        words.append(odd_override(draw, words[0]))
    return Attempt(kind, words, done, ["out", *WRITES.get(words[0], []), *output_dirs(Path("work"))])


def output_dirs(work: Path) -> list[str]:
    """Where the recipes say that their runs are written, whatever was changed in them."""
    found = []
    for file in (work / "run.yaml", work / "pipeline.yaml"):
        try:
            given = yaml.safe_load(file.read_text()).get("output_dir", "runs")
        except (OSError, ValueError, yaml.YAMLError, AttributeError, RecursionError):
            continue
        found.append(os.path.relpath(os.path.expandvars(os.path.expanduser(str(given).strip()))))
    return found


def odd_override(draw: random.Random, command: str) -> str:
    """A setting on the command line with a value that it may not expect."""
    settings = recipe()
    sections = [name for name in settings if isinstance(settings[name], dict)]
    section = draw.choice(["sampling", "evaluation"] if command in ("sample", "evaluate") else sections)
    inside, key = draw.choice(places(settings[section]))
    return f"{section}.{key}={odd_value(draw, inside[key])}"
