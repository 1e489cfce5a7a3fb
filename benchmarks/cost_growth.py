"""How the time and memory of a training step grow with tokens, references, noise draws and micro-batch.

    python benchmarks/cost_growth.py --figure docs/cost_growth.png

One thing is varied at a time around one setting. Lines are computed beforehand: the model's operations at the
rate of that setting, and the plan's memory; points are medians of real steps (forward, backward, clipping,
AdamW, average) and the bytes of their tensors.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.allocations import Allocations
from benchmarks.model_speed import CLIP, machine
from lit_transdiff.config import SIZES, FlowConfig, ModelConfig, OptimizerConfig, RunConfig, TrainingConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.planning.memory import pass_cost
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.optim import build_optimizer

VARIED = {
    "decoder tokens": (64, 256, 576, 1024),
    "references": (1, 4, 16),
    "noise draws": (1, 2, 4, 8),
    "micro-batch": (1, 2, 4, 8),
}
CENTRE = {"decoder tokens": 256, "references": 1, "noise draws": 2, "micro-batch": 2}


@dataclass
class Point:
    """A step that is taken again and again."""

    run: RunConfig
    seconds: list[float]
    bytes: float = 0.0  # of activations and what is made of them, at the worst moment

    @property
    def flops(self) -> float:
        cost = row_cost(self.run.model, self.run.flow.num_noise_draws)
        return self.run.training.global_batch_size * cost.flops

    @property
    def planned_bytes(self) -> float:
        return pass_cost(self.run, bf16=False).kept(self.run.training.global_batch_size)


def run_of(size: str, settings: dict[str, int]) -> RunConfig:
    references, side = settings["references"], int(settings["decoder tokens"] ** 0.5)
    model = ModelConfig(size=size, latent_size=side, num_references=references)
    model = replace(model, attention_dropout=0.0, projection_dropout=0.0)
    return RunConfig(
        stage="ar_pretrain" if references == 1 else "mrar_finetune",
        model=model,
        flow=FlowConfig(num_noise_draws=settings["noise draws"]),
        training=TrainingConfig(global_batch_size=settings["micro-batch"]),
        optimizer=OptimizerConfig(lr=1e-6),
    )


def take_steps(point: Point, rounds: int) -> None:
    """Fill in the seconds of steps, after two that warm up, of which the second is counted in bytes."""
    model, rows = point.run.model, point.run.training.global_batch_size
    stage = STAGES[point.run.stage](point.run, IdentityAutoencoder(point.run.model.latent_channels))
    optimizer = build_optimizer(stage.model, point.run.optimizer)
    numbers = torch.zeros(rows, dtype=torch.int64)
    values = torch.randn(
        rows, model.num_references, model.latent_channels, model.latent_size, model.latent_size
    )
    batch = Batch(values, numbers, torch.zeros(rows, model.num_references, dtype=torch.int64), numbers)

    def passes() -> None:
        optimizer.zero_grad(set_to_none=False)  # gradients are no activations: they are there before
        stage.objective(batch, lambda *shape: torch.randn(rows, *shape))[0].mean().backward()

    passes()
    with Allocations() as allocations:
        passes()
    point.bytes = allocations.peak
    for _ in range(rounds):
        start = time.perf_counter()
        passes()
        torch.nn.utils.clip_grad_norm_(stage.parameters(), CLIP)
        optimizer.step()
        point.seconds.append(time.perf_counter() - start)


def draw(points: dict[tuple[str, int], Point], rate: float, title: str, file: Path) -> None:
    """Seconds above, bytes below; a column for each thing that is varied."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        2, len(VARIED), figsize=(3.4 * len(VARIED), 6), layout="constrained", sharey="row"
    )
    for column, name in enumerate(VARIED):
        mine = [points[name, value] for value in VARIED[name]]
        for row, (measured, computed, unit) in enumerate(
            [
                (
                    [statistics.median(p.seconds) for p in mine],
                    [p.flops / rate for p in mine],
                    "seconds per step",
                ),
                ([p.bytes / 1e9 for p in mine], [p.planned_bytes / 1e9 for p in mine], "GB of activations"),
            ]
        ):
            panel = axes[row, column]
            panel.plot(
                VARIED[name],
                computed,
                color="grey",
                label="operations at one rate" if row == 0 else "planned",
            )
            panel.plot(VARIED[name], measured, "o", color="C0", label="measured")
            panel.set(xscale="log", yscale="log", xlabel=name)
            panel.set_xticks(VARIED[name], [str(value) for value in VARIED[name]])
            panel.minorticks_off()
            if column == 0:
                panel.set_ylabel(unit)
                panel.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    points = {}
    for name, values in VARIED.items():
        for value in values:
            points[name, value] = Point(run_of(args.size, {**CENTRE, name: value}), [])
            take_steps(points[name, value], args.rounds)
    centre = points["micro-batch", CENTRE["micro-batch"]]
    rate = centre.flops / statistics.median(centre.seconds)
    print(machine(torch.device("cpu")))
    print(
        f"fp32, size {args.size}, around {CENTRE}, {args.rounds} steps each; {rate / 1e9:.0f} GFLOP/s there\n"
    )
    print(
        "| varied | value | GFLOP | s | relative s per GFLOP | GB | GB / planned "
        "|\n|---|---|---|---|---|---|---|"
    )
    for (name, value), point in points.items():
        median, expected = statistics.median(point.seconds), point.flops / rate
        shares = (
            f"{median / expected:.2f} | {point.bytes / 1e9:.3f} | {point.bytes / point.planned_bytes:.2f}"
        )
        print(f"| {name} | {value} | {point.flops / 1e9:,.0f} | {median:.2f} | {shares} |")
    if args.figure:
        draw(points, rate, f"size {args.size} on {machine(torch.device('cpu'))}, float32", args.figure)


if __name__ == "__main__":
    main()
