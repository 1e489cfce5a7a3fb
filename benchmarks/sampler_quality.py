"""Frechet distance against decoder evaluations: what each setting of the sampler costs and gives, on a
trained model.

    lit-transdiff run experiments/fashion/pipeline.yaml           # or any run with reference statistics
    python benchmarks/sampler_quality.py runs/fashion/ar_pretrain --figure docs/sampler_quality.png

Each setting draws ``--images`` images with ``--seeds`` seeds; the table gives means and the spread over the
seeds. A decoder evaluation is one image through the decoder, so a guided step costs two. Results stay below
``--output``: the same command continues.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from lit_transdiff.config import PRESETS, SamplingConfig
from lit_transdiff.distributed import default_device
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.sampling.generator import Generator, load_generator

BASELINE = "paper, 100 steps"


def settings_of(references: int, guidance: float) -> dict[str, dict[str, Any]]:
    """Name -> what differs from the paper's sampler at 100 steps with this guidance."""
    found: dict[str, dict[str, Any]] = {BASELINE: {}}
    found |= {f"paper, {n} steps": {"num_steps": n} for n in (50, 25, 12)}
    for n in (25, 12):
        found[f"paper, {n} steps, guided in [0, 0.7]"] = {"num_steps": n, "guidance_interval": [0.0, 0.7]}
    found["fast preset"] = PRESETS["fast"]
    scaled = {"drift_scale": 0.95, "noise_scale": 0.85}
    found |= {f"paper, {n} steps, scaled": {"num_steps": n, **scaled} for n in (12, 8)}
    solvers = (
        {"euler": (25, 12)}
        if references > 1
        else {"adams_bashforth": (24, 12, 8), "heun": (12,), "euler": (25, 12)}
    )
    for solver, counts in solvers.items():
        found |= {
            f"{solver}, {n} steps": {"solver": solver, "grid": "uniform", "num_steps": n} for n in counts
        }
    if references == 1:
        found["other grids, paper's sampler on 12 uniform steps"] = {"grid": "uniform", "num_steps": 12}
        found["other grids, euler on the paper's 12 steps"] = {"solver": "euler", "num_steps": 12}
        for shift in (0.5, 2.0):
            found[f"other grids, paper's 12 steps, shift {shift:g}"] = {"num_steps": 12, "shift": shift}
        return found
    early = references - 1
    for last, before in ((25, 6), (25, 3), (12, 6)):
        found[f"paper, last {last} steps, earlier {before}"] = {
            "num_steps": last,
            "reference_steps": [before] * early + [last],
        }
    only_last = {"num_steps": 25, "reference_guidance": [1.0] * early + [guidance]}
    found["paper, 25 steps, only the last guided"] = only_last
    return found


def score(
    generator: Generator, sampling: SamplingConfig, images: int, seeds: int, output: Path
) -> dict[str, list[float]]:
    """Frechet distance, class accuracy and decoder evaluations an image, one value a seed."""
    values: dict[str, list[float]] = {"distance": [], "accuracy": [], "evaluations": []}
    for seed in range(seeds):
        metrics = ["frechet_distance", "class_accuracy"]
        settings = dataclasses.replace(
            generator.run.evaluation, num_images=images, seed=seed, metrics=metrics
        )
        result = evaluate(generator, settings, sampling, output=output, reuse=True)
        values["distance"].append(result["scores"]["frechet_distance"])
        values["accuracy"].append(result["scores"]["class_accuracy"])
        values["evaluations"].append(result["manifest"]["decoder_evaluations_per_image"])
    return values


def draw(rows: dict[str, dict[str, list[float]]], title: str, file: Path) -> None:
    """Distance against evaluations, with the spread over seeds; the paper's sampler stands out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.5), layout="constrained")
    families = list(dict.fromkeys(name.split(",")[0] for name in rows))
    at_cost: dict[int, list[str]] = {}  # samplers of one cost stand side by side
    for name, values in rows.items():
        at_cost.setdefault(round(statistics.mean(values["evaluations"])), []).append(name)
    for cost, names in at_cost.items():
        for i, name in enumerate(names):
            family, _, text = name.partition(", ")
            x, distances = cost * 1.033 ** (i - (len(names) - 1) / 2), rows[name]["distance"]
            y, spread = statistics.mean(distances), statistics.stdev(distances) if len(distances) > 1 else 0.0
            colour = f"C{families.index(family)}"
            axes.errorbar(x, y, spread, fmt="o", color=colour, capsize=2, markersize=4)
            axes.text(
                x, y + spread, f" {text}", fontsize=7, color=colour, rotation=90, ha="center", va="bottom"
            )
    for family in families:
        label = "Euler-Maruyama on the paper's grid" if family == "paper" else family.replace("_", "-")
        axes.plot([], [], "o", color=f"C{families.index(family)}", label=label)
    base = statistics.mean(rows[BASELINE]["distance"])
    axes.axhline(base, color="grey", linewidth=0.8, linestyle="--")
    axes.axvline(
        statistics.mean(rows[BASELINE]["evaluations"]) / 4, color="grey", linewidth=0.8, linestyle=":"
    )
    costs = sorted(at_cost)
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top + 0.4 * (top - bottom))  # room for what stands on the bars
    axes.set(
        xscale="log",
        xlabel="decoder evaluations per image",
        ylabel="Frechet distance (lower is better)",
        title=title,
    )
    axes.set_xticks(costs, [str(cost) for cost in costs], rotation=60, fontsize=8)
    axes.minorticks_off()
    axes.legend(fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="settings of the table beside the baseline"
    )
    parser.add_argument("--output", type=Path, help="default: sampler_quality in the run folder")
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    generator = load_generator(args.checkpoint, default_device())
    run = generator.run
    base = dataclasses.replace(
        run.sampling, solver="euler_maruyama", grid="paper", num_steps=100, guidance_interval=[0.0, 1.0]
    )
    rows = {}
    settings = settings_of(run.model.num_references, run.sampling.guidance_scale)
    if wrong := [name for name in args.only if name not in settings]:
        parser.error(f"--only: got {wrong[0]!r}; allowed: {', '.join(settings)}")
    for name in [BASELINE, *args.only] if args.only else settings:
        changes = settings[name]
        sampling = dataclasses.replace(base, **changes)
        rows[name] = score(
            generator,
            sampling,
            args.images,
            args.seeds,
            args.output or Path(args.checkpoint) / "sampler_quality",
        )
    cost = statistics.mean(rows[BASELINE]["evaluations"])
    print(f"{run.name}, guidance {run.sampling.guidance_scale:g}, {args.images} images, {args.seeds} seeds\n")
    print(
        "| sampler | evaluations per image | of the paper's | Frechet distance | class accuracy "
        "|\n|---|---|---|---|---|"
    )
    for name, values in rows.items():
        mean = {key: statistics.mean(found) for key, found in values.items()}
        spread = statistics.stdev(values["distance"]) if args.seeds > 1 else 0.0
        print(
            f"| {name} | {mean['evaluations']:.0f} | {mean['evaluations'] / cost:.0%} "
            f"| {mean['distance']:.3f} ± {spread:.3f} | {mean['accuracy']:.1%} |"
        )
    if args.figure:
        draw(rows, f"{run.name}: {args.images} images, mean and spread of {args.seeds} seeds", args.figure)


if __name__ == "__main__":
    main()
