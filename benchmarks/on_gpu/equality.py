"""Whether steps that are computed in other ways have the same losses and weights."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.on_gpu.bench import Bench
from benchmarks.on_gpu.steps import STREAM, Case, Steps
from lit_transdiff.config import TrainingConfig


def equality(bench: Bench) -> None:
    """Losses of 50 steps of a small model, relative to the same steps computed in another way."""
    size, steps, rows = ("test", 2, 2) if bench.tiny else ("small", 50, 8)
    on_gpu = bench.device.type == "cuda"
    kernels = TrainingConfig(compile=False)
    plain = replace(kernels, kernels=False)
    bench.table(
        "compared", "against", "references", "dropout", "largest difference of losses", "of the last weights"
    )
    for references in (4, 1):
        case = partial(Case, size, references, rows)
        graph = case(training=kernels, graphs=on_gpu)
        exact = case(0.0, plain, False, False)
        found: dict[str, tuple[list[float], Tensor]] = {}
        for name, against, one, other in (
            ("kernels, graph", "kernels", graph, replace(graph, graphs=False)),
            ("kernels, graph", "the same with torch's update", graph, replace(graph, one_pass=False)),
            ("kernels", "plain, torch's update", case(0.0, kernels, False), exact),
            ("kernels, bf16 stream", "plain, torch's update", case(0.0, STREAM, False), exact),
        ):
            for each in (one, other):
                if str(each) not in found:
                    found[str(each)] = losses_of(each, bench.device, steps)
            (first, weights), (second, others) = found[str(one)], found[str(other)]
            error = max(abs(a - b) / abs(b) for a, b in zip(first, second, strict=True))
            distance = float((weights - others).norm() / others.norm())
            bench.row(name, against, references, one.dropout, f"{error:.1e}", f"{distance:.1e}")


def losses_of(case: Case, device: torch.device, steps: int) -> tuple[list[float], Tensor]:
    """The losses of the first steps of a case, and its weights after them."""
    step = Steps(case, device)
    losses = [float(step()) for _ in range(steps)]
    return losses, torch.cat([p.detach().flatten() for p in step.stage.model.parameters()])
