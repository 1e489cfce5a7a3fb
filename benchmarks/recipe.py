"""Which changes of the demo's recipe pay off? Each change of stage 1 and of MRAR, trained with several seeds.

RECIPE, which says how images are encoded, is experiments/fashion/ar_pretrain.yaml:

    lit-transdiff cache RECIPE data/fashion/train runs/fashion/latents/train --flips
    lit-transdiff cache RECIPE data/fashion/evaluation runs/fashion/latents/evaluation
    python benchmarks/recipe.py results.jsonl --workers 2         # the same command continues
    python benchmarks/recipe.py results.jsonl --table             # the table of what is there

The guidance of a run is chosen by the classifier's Frechet distance of 1,000 images, on seeds that the scores
do not use. Then 2,000 images are scored by the classifier and by the judge. A change of MRAR starts from the
base's run of the same seed. Intervals are of the difference from the base, at 95%, by Student's t.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import re
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_transdiff.base.student import student
from lit_transdiff.config.loading import load_run
from lit_transdiff.distributed import default_device
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.training.trainer import train

RECIPES = Path("experiments/fashion")
RECIPE, MRAR = "base", "mrar"  # what the others are compared with
BASE = ["model.encoder_blocks=4", "data.horizontal_flip=true"]  # of all stages
STEPS = ["training.max_steps=2600"]  # of stage 1
# Changes of stage 1: settings beside those of ar_pretrain.yaml.
STAGE_1: dict[str, list[str]] = {
    RECIPE: [],
    "half as many steps": ["training.max_steps=1300"],
    "no mirror images": ["data.horizontal_flip=false"],
    "encoder 2, decoder 6": ["model.encoder_blocks=2", "model.decoder_blocks=6"],
    "encoder 2, decoder 5": ["model.encoder_blocks=2", "model.decoder_blocks=5"],
    "learning rate 1e-3": ["optimizer.lr=1e-3"],
    "learning rate 4e-3": ["optimizer.lr=4e-3"],
    "average of about 500 steps": ["optimizer.ema_decay=0.998"],
    "4 noise draws": ["flow.num_noise_draws=4"],
    "times towards noise": ["flow.density_mean=0.4"],
    "dropout 0.1": ["model.attention_dropout=0.1", "model.projection_dropout=0.1"],
    "direction loss 0.2": ["flow.loss_terms={direction: 0.2}"],
    "AdamW, 2e-3": ["optimizer.name=adamw"],
    "16 class tokens": ["model.num_class_tokens=16"],
    "1 noise draw": ["flow.num_noise_draws=1"],
    "uniform times": ["flow.density=uniform"],
    "32 images, twice the steps": ["training.global_batch_size=32", "training.max_steps=5200"],
}
# Changes of MRAR: settings beside those of mrar_finetune.yaml.
STAGE_3: dict[str, list[str]] = {
    MRAR: [],
    "mrar, 250 steps": ["training.max_steps=250"],
    "mrar, 500 steps": ["training.max_steps=500"],
    "mrar, 250 steps, 5e-4": ["training.max_steps=250", "optimizer.lr=5e-4"],
    "mrar, 250 steps, 2e-3": ["training.max_steps=250", "optimizer.lr=2e-3"],
}
GUIDANCE = (1.6, 2.0, 2.5, 3.0)
TUNING_SEED = 777_000
SETTINGS: dict[str, Any] = {
    "extractor": "classifier",
    "extractor_weights": "data/fashion/classifier.safetensors",
    "extractors": ["judge"],
    "weights": {"judge": "data/fashion/judge.safetensors"},
    "reference": None,
    "reference_images": "data/fashion/evaluation",
    "metrics": ["frechet_distance", "precision", "recall", "class_accuracy"],
    "batch_size": 100,
}
SCORES = {
    "loss": "loss",
    "frechet_distance": "distance, classifier",
    "class_accuracy": "accuracy",
    "recall": "recall",
    "judge/frechet_distance": "distance, judge",
    "judge/class_accuracy": "accuracy, judge",
}


@dataclass(frozen=True)
class Trial:
    """One run of a change with a seed; ``extra`` settings go to every stage."""

    change: str
    seed: int
    output: Path
    latents: Path
    extra: tuple[str, ...] = ()
    images: int = 2000

    def name(self, what: str) -> str:
        return re.sub(r"[^a-z0-9]+", "-", what.lower()) + f"-{self.seed}"

    def train(self, recipe: str, what: str, overrides: Sequence[str]) -> Path:
        """Train a stage; its folder."""
        settings = [
            f"name={self.name(what)}",
            f"output_dir={self.output}",
            f"seed={self.seed}",
            f"data.train={self.latents}/train",
            f"data.evaluation={self.latents}/evaluation",
            "training.num_validation_samples=2000",
            "training.checkpoint_every=100000",
            "training.precision=fp32",
            "training.compile=false",
            "tracking.wandb=false",
        ]
        run = load_run(RECIPES / f"{recipe}.yaml", [*settings, *overrides, *self.extra])
        train(run, lambda line: None)
        return run.folder

    def trained(self) -> Path:
        """The run folder of this change. One of MRAR begins with the base's run of the same seed."""
        if self.change in STAGE_1:
            return self.train("ar_pretrain", self.change, [*BASE, *STEPS, *STAGE_1[self.change]])
        start = [*BASE, f"init_from={self.output / self.name(RECIPE)}"]
        head = self.train("diffusion_head", f"{self.change} head", start)
        return self.train("mrar_finetune", self.change, [*BASE, f"init_from={head}", *STAGE_3[self.change]])

    def __call__(self) -> dict[str, Any]:
        """Train, choose the guidance, score."""
        torch.set_num_threads(1)
        start = time.time()
        folder = self.trained()
        seconds = time.time() - start
        generator = load_generator(folder, default_device(), compile=False)

        def scores(images: int, seed: int, guidance: float) -> dict[str, float]:
            settings = replace(generator.run.evaluation, num_images=images, seed=seed, **SETTINGS)
            sampling = replace(generator.run.sampling, guidance_scale=guidance)
            return evaluate(generator, settings, sampling, output=folder, reuse=True)["scores"]

        tuning = {g: scores(self.images // 2, TUNING_SEED, g)["frechet_distance"] for g in GUIDANCE}
        best = min(tuning, key=tuning.__getitem__)
        return {
            "change": self.change,
            "seed": self.seed,
            "device": str(default_device()),
            "train_seconds": seconds,
            "loss": last_loss(folder),
            "tuning": tuning,
            "guidance": best,
            "scores": scores(self.images, self.seed, best),
        }


def last_loss(folder: Path) -> float:
    """The loss on the evaluation images at the end of a run."""
    with (folder / "metrics.csv").open() as file:
        return float([row["value"] for row in csv.DictReader(file) if row["metric"] == "val/loss"][-1])


def run_trial(trial: Trial) -> dict[str, Any]:
    return trial()


def missing(args: argparse.Namespace) -> list[Trial]:
    """The trials without a result: seed by seed, and MRAR after the runs that it starts from."""
    done = {(row["change"], row["seed"]) for row in results(args.file)}
    chosen = [name for name in [*STAGE_1, *STAGE_3] if not args.only or name in args.only]
    output, latents = args.output.absolute(), args.latents.absolute()
    order = [
        (c, s) for stage in (STAGE_1, STAGE_3) for s in range(1, args.seeds + 1) for c in chosen if c in stage
    ]
    todo = [trial for trial in order if trial not in done]
    return [Trial(*trial, output, latents, tuple(args.extra), args.images) for trial in todo]


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def compute(args: argparse.Namespace) -> None:
    """Run the missing trials in several processes; each result is a line of the file at once."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        futures = {pool.submit(run_trial, trial): trial for trial in missing(args)}
        for future in as_completed(futures):
            trial = futures[future]
            if error := future.exception():
                print(f"{trial.change}, seed {trial.seed}: {error!r}", file=sys.stderr, flush=True)
                continue
            with args.file.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            print(f"{trial.change}, seed {trial.seed}: done", file=sys.stderr, flush=True)


def table(rows: Sequence[dict[str, Any]]) -> None:
    """The means of the base, and what each change adds to them."""
    print("| change | seeds | guidance | " + " | ".join(SCORES.values()) + " |")
    print("|---" * (3 + len(SCORES)) + "|")
    for base, stage in ((RECIPE, STAGE_1), (MRAR, STAGE_3)):
        own = [row for row in rows if row["change"] in stage]
        if not own:
            continue
        effects = [
            effects_on([(row["change"], row["seed"], value(row, score)) for row in own], base)
            for score in SCORES
        ]
        for change in stage:
            if of := [row for row in own if row["change"] == change]:
                guidance = ", ".join(f"{g:g}" for g in sorted({row["guidance"] for row in of}))
                cells = [in_words(*found[change], change == base) for found in effects]
                print(f"| {change} | {len(of)} | {guidance} | " + " | ".join(cells) + " |")


def value(row: dict[str, Any], score: str) -> float:
    return row["loss"] if score == "loss" else row["scores"][score]


def effects_on(values: Sequence[tuple[str, int, float]], base: str) -> dict[str, tuple[float, float]]:
    """The mean of ``base``, the difference of every other change from it, and half the width of its interval.

    A least-squares fit of score = change + seed + error, with one variance of the errors for all runs: runs
    of one seed share their noise, and not every change has every seed.
    """
    changes = [base, *dict.fromkeys(change for change, _, _ in values if change != base)]
    seeds = list(dict.fromkeys(seed for _, seed, _ in values))
    design = np.zeros((len(values), len(changes) + len(seeds)))
    design[:, 0] = 1
    for row, (change, seed, _) in enumerate(values):
        design[row, changes.index(change)] = 1
        design[row, len(changes) + seeds.index(seed)] = 1
    design[:, len(changes) :] -= design[:, len(changes) :].mean(axis=0)  # the seeds' effects have the sum 0
    scores = np.array([score for _, _, score in values])
    inverse = np.linalg.pinv(design)
    fitted = inverse @ scores
    freedom = len(values) - np.linalg.matrix_rank(design)
    variance = ((scores - design @ fitted) ** 2).sum() / max(freedom, 1)
    errors = np.sqrt(variance * (inverse @ inverse.T).diagonal())
    return {change: (fitted[i], student(freedom) * errors[i]) for i, change in enumerate(changes)}


def in_words(mean: float, half: float, is_base: bool) -> str:
    return f"{mean:.3f}" if is_base else f"{mean:+.3f} ± {half:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="results, one trial a line")
    parser.add_argument("--latents", type=Path, default=Path("runs/fashion/latents"))
    parser.add_argument("--output", type=Path, default=Path("runs/recipe"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1, help="trials at once")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=2000, help="scored images; half as many tune")
    parser.add_argument("--only", nargs="*", help="these changes; default: all")
    parser.add_argument("--extra", nargs="*", default=[], help="settings of every trial")
    parser.add_argument("--table", action="store_true", help="only print the table")
    args = parser.parse_args()
    if not args.table:
        compute(args)
    table(results(args.file))


if __name__ == "__main__":
    main()
