"""Resource estimates of a run: memory by part, communication, FLOPs, time and file sizes for every strategy.

All sizes are in bytes and all rates per second.
"""

from __future__ import annotations

from pathlib import Path

from lit_transdiff.base.hardware import DEVICES, GB, Device
from lit_transdiff.base.remote import is_remote
from lit_transdiff.config import ModelSettings, RunConfig, require, require_known
from lit_transdiff.data.index import read_index
from lit_transdiff.distributed.strategies import EVERYWHERE, STRATEGIES, whole_strategies
from lit_transdiff.models.autoencoder import autoencoder_kind
from lit_transdiff.models.sizes import FLOAT_BYTES
from lit_transdiff.planning.advice import HIDDEN_SHARE, advice
from lit_transdiff.planning.memory import (
    ModelCost,
    PassCost,
    counts_kernels,
    counts_of,
    model_cost,
    pass_cost,
)
from lit_transdiff.planning.rows import OVERHEAD, USABLE, PlanRow, communication, plan_rows
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.blocks import wants_kernels


def data_of(run: RunConfig) -> tuple[bool, str]:
    """Whether the run reads images (and so has the autoencoder on each GPU), and a line about its data."""
    has_weights = autoencoder_kind(run.autoencoder.kind, run.autoencoder.path).has_folder
    if is_remote(run.data.train) or (Path(run.data.train) / "index.json").is_file():
        index = read_index(run.data.train, check_files=False)
        size = int(index.size.sum())
        images = index.kind == "images" and has_weights
        return images, f"data           {run.data.train}: {len(index):,} {index.kind}, {size / GB:.2f} GB"
    images = has_weights and "latents" not in run.data.train
    kind = "images" if images else "latents"
    return images, f"data           {run.data.train or 'none'} is not on this machine; counted as {kind}"


def plan(run: RunConfig, gpus: int, gpu: str, mfu: float) -> str:
    """The whole plan as text."""
    require_known("--gpu", gpu, DEVICES)
    if run.stage not in STAGES:
        raise ValueError(
            f"stage: got {run.stage!r}; a plan is made of {', '.join(STAGES)}; the others are small."
        )
    size = run.training.global_batch_size
    require(gpus >= 1 and size % gpus == 0, "--gpus", gpus, f"a divisor of training.global_batch_size={size}")
    require(0 < mfu <= 1, "--mfu", mfu, "above 0 and at most 1")
    bf16 = run.training.precision != "fp32"
    counts, device = counts_of(run, bf16), DEVICES[gpu]
    model, cost = model_cost(run), pass_cost(run, bf16, counts)
    images, data = data_of(run)
    table = plan_rows(run, gpus, device, model, cost, images)
    wanted = run.training.micro_batch_size
    return "\n".join(
        [
            *describe_model(run, model, cost, bf16),
            data,
            "",
            *describe_time(run, gpus, gpu, device, cost, mfu, model),
            *advice(run, gpus, device, mfu, model, counts, images),
            "",
            f"Memory per GPU in GB ({gpu}: {USABLE:.0%} of {device.memory / GB:.0f} GB, less "
            f"{OVERHEAD / GB:.1f} GB):",
            *memory_table(table, device, wanted),
            *about_kernels(run, bf16),
            *refusals(run),
        ]
    )


def about_kernels(run: RunConfig, bf16: bool) -> list[str]:
    """A note on the activations of runs with Triton kernels."""
    if not bf16 or not wants_kernels(run):
        return []
    if not counts_kernels(run):
        return [
            "Activations are counted without Triton kernels, as Triton is not installed here; blocks that "
            "have some keep about 0.65 of them, except with zero3."
        ]
    return ["Activations are counted with the Triton kernels of the blocks that have some, except for zero3."]


def refusals(run: RunConfig) -> list[str]:
    """A note on strategies that refuse the run's precision, and the precision of their estimates."""
    precision = run.training.precision
    others = [name for name, kind in STRATEGIES.items() if not kind.whole]
    if precision in EVERYWHERE:
        return []
    return [f"{', '.join(others)} refuse training.precision={precision}; they are counted with bf16-mixed."]


def describe_model(run: RunConfig, model: ModelCost, cost: PassCost, bf16: bool) -> list[str]:
    checkpoint = (model.parameters + model.moments + model.trained * run.optimizer.num_averages) * FLOAT_BYTES
    parts = ", ".join(f"{name} {size:,}" for name, size in model.parts.items())
    halves = f"bfloat16 ({' and '.join(whole_strategies())} only)"
    moments = halves if run.training.precision == "bf16-true" else "float32"
    recomputed = f" ({run.training.activation_checkpointing}: recomputed in the backward pass)"
    step_flops = cost.row_flops * run.training.global_batch_size
    return [
        f"run            {run.name}, stage {run.stage}, {described(run.model)}",
        f"parameters     {model.parameters:,} ({model.trained:,} trained): {parts}",
        f"precision      {'bfloat16' if bf16 else 'float32'} passes; averages float32, weights, gradients "
        f"and moments {moments}",
        f"operations     {cost.row_flops / 1e9:,.0f} GFLOP per row of {run.model.num_references}, forward "
        f"and backward; {step_flops / 1e15:,.2f} PFLOP per step of {run.training.global_batch_size} rows",
        f"activations    {cost.row_bytes / GB:.3f} GB per row, {cost.fixed_bytes / GB:.2f} GB once"
        f"{recomputed if cost.recomputed_flops else ''}",
        f"checkpoint     {checkpoint / GB:.2f} GB; export {model.parameters * FLOAT_BYTES / GB:.2f} GB",
    ]


def described(model: ModelSettings) -> str:
    """A short description of a model: its family, its named size if any, and the images per row."""
    size = f", size {name}" if (name := getattr(model, "size", None)) else ""
    return f"{model.paradigm}{size}, R = {model.num_references}"


def describe_time(
    run: RunConfig, gpus: int, gpu: str, device: Device, cost: PassCost, mfu: float, model: ModelCost
) -> list[str]:
    """Lines on steps, hours and network traffic at the given fraction of the peak."""
    training = run.training
    operations = (cost.row_flops + cost.recomputed_flops) * training.global_batch_size / gpus
    seconds = operations / (device.flops * mfu)
    images = training.global_batch_size * run.model.num_references / seconds
    hours = seconds * training.max_steps / 3600
    sent = communication("ddp" if gpus > 1 else "single", gpus, 1, model) / device.collective_rate(gpus)
    fate = (
        "hidden behind the backward pass"
        if sent < HIDDEN_SHARE * seconds
        else "MORE than the backward pass hides"
    )
    return [
        f"{gpus} x {gpu} at {mfu:.0%} of {device.flops / 1e12:,.0f} TFLOP/s: {seconds:.3f} s per step, "
        f"{images:,.0f} images/s",
        f"{training.max_steps:,} steps: {hours:,.1f} hours, {hours * gpus:,.0f} GPU-hours (without "
        "validation, grids and saves)",
        f"network        {device.collective_rate(gpus) / GB:g} GB/s: gradients of ddp take {sent:.3f} s a "
        f"step, {fate}",
    ]


def memory_table(table: list[PlanRow], device: Device, micro_batch: int | None) -> list[str]:
    """One line per strategy and micro-batch: the sizes around the largest that fits, and the run's own."""
    head = f"{'strategy':9}{'rows':>5}{'passes':>8}" + "".join(
        f"{name:>13}" for name in (*vars(table[0].memory), "total")
    )
    lines = [head + f"{'GB sent':>10}"]
    for strategy in dict.fromkeys(row.strategy for row in table):
        mine = [row for row in table if row.strategy == strategy]
        largest = max((i for i, row in enumerate(mine) if row.fits), default=-1)
        shown = {0, largest, largest + 1} | {i for i, row in enumerate(mine) if row.rows == micro_batch}
        whole = mine[-1].rows
        for i, row in enumerate(mine):
            if i not in shown:
                continue
            numbers = "".join(
                f"{value / GB:13.2f}" for value in (*vars(row.memory).values(), row.memory.total)
            )
            note = ("  <- the run's" if row.rows == micro_batch else "") if row.fits else "  does not fit"
            lines.append(f"{strategy:9}{row.rows:5}{whole // row.rows:8}{numbers}{row.sent / GB:10.2f}{note}")
        if largest < 0:
            lines.append(f"{strategy} does not fit, whatever the micro-batch.")
    return lines
