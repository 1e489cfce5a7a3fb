"""Films: the states that images pass through while they are drawn.

A family's own loop assembles every state: it is run again with the solutions of the first parts, and with its
stand-ins for the rest. Of an image that is drawn at once, the states are those of the solver.

Shapes: N images, F states of each, C channels, H W pixels; c h w a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from lit_transdiff.base.randomness import mix
from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.process import Process
from lit_transdiff.models.paradigm import Paradigm
from lit_transdiff.sampling.draw import check_number
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.graphs import Task
from lit_transdiff.sampling.pictures import grid, save_film, save_picture

MOST_STATES = 16  # the most states shown, at equal distances
SQUARE = 1.6  # columns per row of an animation's grid


@dataclass
class Recorded:
    """Solves the parts, and keeps each solution and the solver's states on the way to it."""

    solutions: list[Tensor] = field(default_factory=list)
    states: dict[float, Tensor] = field(default_factory=dict)  # of the last part, by (mean) level of noise

    def solve(self, task: Task) -> Tensor:
        self.states = {}
        watched, problem = partial(self.watched, task.process), task.problem
        problem = replace(problem, predict=watched(problem.predict), pair=watched(problem.pair))
        self.solutions.append(replace(task, problem=problem).solve())
        return self.solutions[-1]

    def watched(self, process: Process, function: Callable[[Tensor, Any], Any]) -> Callable[..., Any]:
        """``function``, whose states are kept. Of two at one time, the second is the corrected one."""

        def run(x_t: Tensor, t: Any) -> Any:
            self.states[noise_level(process, t)] = x_t
            return function(x_t, t)

        return run


def noise_level(process: Process, t: float | Tensor) -> float:
    """The standard deviation of the noise at a time, or its mean at a time of each row."""
    times = torch.as_tensor(t).reshape(-1).to(process.times(torch.zeros(1)).dtype)
    return process.noised(torch.zeros_like(times), torch.ones_like(times), times).mean().item()


@dataclass
class Replayed:
    """Gives the ``solutions`` of the first parts again, and then a model's stand-ins."""

    model: Paradigm
    solutions: Sequence[Tensor]
    latest: Tensor | None = None
    number: int = 0

    def solve(self, task: Task) -> Tensor:
        self.number += 1
        if self.latest is None or self.number <= len(self.solutions):
            self.latest = self.solutions[self.number - 1]
        else:
            self.latest = self.model.stand_in(self.latest, task.problem.shape)
        return self.latest


@torch.no_grad()
def film(
    generator: Generator, labels: Sequence[int], seeds: Sequence[int], sampling: SamplingConfig
) -> tuple[Tensor, list[str]]:
    """The states [N, F, C, H, W] of images, the last of which is the image, and a caption for each."""
    rows, recorded = generator.check_labels(labels), Recorded()
    generator.latents(rows, seeds, sampling, solving=recorded)
    parts = len(recorded.solutions)
    if parts > 1:
        captions = [f"{k} of {parts}" for k in range(1, parts + 1)]
        known = [recorded.solutions[:k] for k in range(1, parts + 1)]
    else:
        noisy = {level: x_t for level, x_t in sorted(recorded.states.items(), reverse=True) if level > 0}
        captions = [*(f"noise {level:.2f}" for level in noisy), "noise 0"]
        known = [*([x_t] for x_t in noisy.values()), recorded.solutions]
    shown = shown_states(len(known))
    latents = [
        generator.latents(rows, seeds, sampling, solving=Replayed(generator.network, known[i]))[:, -1]
        for i in shown
    ]
    images = torch.cat([generator.autoencoder.decode(each).cpu() for each in latents])
    return rearrange(images, "(f n) c h w -> n f c h w", f=len(shown)), [captions[i] for i in shown]


def shown_states(number: int) -> list[int]:
    """At most ``MOST_STATES`` of so many states, the first and the last one among them."""
    count = min(number, MOST_STATES)
    return torch.linspace(0, number - 1, count).round().long().tolist()  # type: ignore[no-any-return]


def draw_film(
    generator: Generator,
    classes: Sequence[int],
    per_class: int,
    output: Path,
    *,
    sampling: SamplingConfig | None = None,
    seed: int = 0,
) -> Path:
    """Write the states of ``per_class`` images of each class, as ``output/film.png`` and ``film.webp``."""
    check_number(generator, per_class, len(classes) * MOST_STATES)
    labels = [c for c in classes for _ in range(per_class)]
    seeds = [mix(seed, c, n) for c in classes for n in range(per_class)]
    states, captions = film(generator, labels, seeds, sampling or generator.run.sampling)
    rows = [generator.names[c] if n == 0 else "" for c in classes for n in range(per_class)]
    output.mkdir(parents=True, exist_ok=True)
    picture = grid(
        rearrange(states, "n f c h w -> (n f) c h w"), len(captions), row_labels=rows, column_labels=captions
    )
    save_picture(picture, output / "film.png")
    save_film(frames(states, captions), output / "film.webp")
    return output / "film.png"


def frames(states: Tensor, captions: Sequence[str]) -> list[Image.Image]:
    """A grid of all images in each of their states."""
    columns = max(1, round((SQUARE * len(states)) ** 0.5))
    return [grid(states[:, i], columns, title=caption) for i, caption in enumerate(captions)]
