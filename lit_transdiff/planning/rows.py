"""The memory per GPU and the communication of each strategy and micro-batch size.

All sizes are in bytes. Weights, gradients, moments and averages are float32, and only the passes are in
bfloat16 (with precision bf16-true only the averages are float32).
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_transdiff.base.hardware import GB, Device
from lit_transdiff.config import RunConfig
from lit_transdiff.distributed.strategies import STRATEGIES
from lit_transdiff.models.sizes import FLOAT_BYTES
from lit_transdiff.planning.memory import ModelCost, PassCost

AUTOENCODER_BYTES = 66_456_019 * FLOAT_BYTES  # the released KL autoencoder (kl16), in runs on images only
OVERHEAD = 1.5 * GB  # the CUDA context, the communication library and workspaces
USABLE = 0.92  # the usable fraction of the memory, because of fragmentation


@dataclass(frozen=True)
class MemoryUse:
    """Bytes per GPU, by part."""

    weights: float
    gradients: float
    optimizer: float
    averages: float
    activations: float
    autoencoder: float
    buffers: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory_of(
    run: RunConfig, strategy: str, gpus: int, rows: int, model: ModelCost, cost: PassCost, images: bool
) -> MemoryUse:
    """The peak memory of one of ``gpus`` GPUs with micro-batches of ``rows`` rows."""
    kind = STRATEGIES[strategy]
    number = 2 if run.training.precision == "bf16-true" and kind.whole else FLOAT_BYTES
    weights, trained = model.parameters * number, model.trained * number
    averages = model.trained * FLOAT_BYTES * run.optimizer.num_averages
    offloaded = run.distributed.offload != "none" and len(kind.offloads) > 1

    def part(size: float, cut: bool) -> float:
        return size / gpus if cut else size

    # The current block and the prefetched next one.
    gathered = 2 * model.largest_unit * FLOAT_BYTES if kind.cuts_weights else 0
    master = trained / gpus if kind.has_master and not offloaded else 0
    reduced = trained / gpus if kind.keeps_reduced else 0
    return MemoryUse(
        weights=part(weights, kind.cuts_weights) + gathered + master,
        gradients=part(trained, kind.cuts_gradients) + reduced,
        optimizer=0 if offloaded else part(model.moments * number, kind.cuts_optimizer),
        averages=0 if offloaded else part(averages, kind.cuts_optimizer),
        activations=cost.under(strategy).kept(rows),
        autoencoder=AUTOENCODER_BYTES + rows * image_bytes(run) if images else 0,
        buffers=kind.buffers,
    )


def image_bytes(run: RunConfig) -> float:
    """The autoencoder's peak for one row: three float32 tensors of 128 channels at full resolution."""
    return 3 * 128 * run.data.image_size**2 * FLOAT_BYTES * run.model.num_references


def communication(strategy: str, gpus: int, accumulation: int, model: ModelCost) -> float:
    """The bytes that one GPU sends per step with ring collectives."""
    ring = (gpus - 1) / gpus
    weights, gradients = model.parameters * FLOAT_BYTES * ring, model.trained * FLOAT_BYTES * ring
    return STRATEGIES[strategy].traffic(weights, gradients, accumulation)


def micro_batches(run: RunConfig, gpus: int) -> list[int]:
    """Micro-batch sizes: a GPU's share of the global batch, and the powers of two that divide it."""
    per_gpu = run.training.global_batch_size // gpus
    sizes = {2**k for k in range(per_gpu.bit_length()) if per_gpu % 2**k == 0} | {per_gpu}
    return sorted(sizes)


@dataclass(frozen=True)
class PlanRow:
    """The estimate for one strategy and micro-batch size."""

    strategy: str
    rows: int
    fits: bool
    memory: MemoryUse
    sent: float


def plan_rows(
    run: RunConfig, gpus: int, device: Device, model: ModelCost, cost: PassCost, images: bool
) -> list[PlanRow]:
    """The estimates for every strategy and micro-batch size."""
    table = []
    for strategy, kind in STRATEGIES.items():
        if kind.alone != (gpus == 1):
            continue
        for rows in micro_batches(run, gpus):
            memory = memory_of(run, strategy, gpus, rows, model, cost, images)
            passes = run.training.global_batch_size // (gpus * rows)
            fits = memory.total + OVERHEAD <= USABLE * device.memory
            table.append(PlanRow(strategy, rows, fits, memory, communication(strategy, gpus, passes, model)))
    return table
