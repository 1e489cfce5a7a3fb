"""The fastest number of rows per pass and the fastest recomputation, by counts of operations and bytes.

A pass costs its operations, those of recomputed blocks again, and once, whatever its rows, the bytes of
weights and gradients that are read and written for it. More rows save these; recomputation makes room for
more rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lit_transdiff.base.hardware import Device
from lit_transdiff.config import RunConfig
from lit_transdiff.models.paradigm import network_class, stacks_of
from lit_transdiff.planning.memory import Counts, ModelCost, PassCost, pass_cost
from lit_transdiff.planning.rows import PlanRow, plan_rows
from lit_transdiff.stages import STAGES

# Bytes of a weight in a pass: it is read and rounded to bfloat16; its gradient is rounded up and added up.
PASS_BYTES = 4 + 2 + 2 + 3 * 4
HIDDEN_SHARE = 0.6  # the share of the compute time behind which a GPU sends


@dataclass(frozen=True)
class Choice:
    """A way to compute a step, and its time."""

    recomputed: str
    row: PlanRow
    passes: int
    seconds: float

    def __str__(self) -> str:
        what = "nothing" if self.recomputed == "none" else self.recomputed
        passes = f"{self.passes} pass{'es' * (self.passes > 1)}"
        return f"{self.row.strategy}, {self.row.rows} rows, {passes}, {what} recomputed: {self.seconds:.3f} s"


def recomputations(run: RunConfig) -> list[str]:
    """The values of training.activation_checkpointing that the run's stage allows."""
    stacks = list(stacks_of(run.model))
    if not STAGES[run.stage].head_alone:
        return ["none", *stacks, "all"]
    kind = network_class(run.model)
    return ["none", *(name for name in stacks if kind.stacks[name].path.startswith(kind.head_prefixes))]


def seconds_of_step(
    run: RunConfig, gpus: int, device: Device, mfu: float, model: ModelCost, cost: PassCost, row: PlanRow
) -> float:
    """The time of a step without its update, which is the same for all choices."""
    operations = (cost.row_flops + cost.recomputed_flops) * run.training.global_batch_size / gpus
    compute = operations / (device.flops * mfu)
    passes = passes_of(run, gpus, row)
    fixed = passes * PASS_BYTES * model.trained / device.bandwidth
    sent = row.sent / device.collective_rate(gpus)
    return compute + fixed + max(0.0, sent - HIDDEN_SHARE * compute)


def passes_of(run: RunConfig, gpus: int, row: PlanRow) -> int:
    return run.training.global_batch_size // (gpus * row.rows)


def choices(
    run: RunConfig, gpus: int, device: Device, mfu: float, model: ModelCost, counts: Counts, images: bool
) -> Iterator[Choice]:
    """All that fit into memory."""
    bf16 = run.training.precision != "fp32"
    for recomputed in recomputations(run):
        training = replace(
            run.training,
            activation_checkpointing=recomputed,
            activation_checkpointing_every=1,
            cuda_graphs="auto",
        )
        other = replace(run, training=training)
        cost = pass_cost(other, bf16, counts)
        for row in plan_rows(other, gpus, device, model, cost, images):
            if row.fits:
                seconds = seconds_of_step(other, gpus, device, mfu, model, cost, row)
                yield Choice(recomputed, row, passes_of(run, gpus, row), seconds)


def advice(
    run: RunConfig, gpus: int, device: Device, mfu: float, model: ModelCost, counts: Counts, images: bool
) -> list[str]:
    """Lines on the fastest step, and on the fastest one with recomputation."""
    found = sorted(choices(run, gpus, device, mfu, model, counts, images), key=lambda one: one.seconds)
    if not found:
        return ["fastest        nothing fits, even with all blocks recomputed"]
    lines = [f"fastest        {found[0]} a step, by counts, without the update"]
    again = next((one for one in found if one.recomputed != "none"), None)
    if again is not None and again is not found[0]:
        more = again.seconds / found[0].seconds - 1
        lines.append(f"               {again} ({more:+.1%})")
    return lines
