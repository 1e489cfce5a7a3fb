"""Refusal of impossible sizes of a run, by arithmetic, before memory is allocated."""

from __future__ import annotations

from lit_transdiff.base.hardware import DEVICES
from lit_transdiff.config import RunConfig, require
from lit_transdiff.data.processes import most_processes
from lit_transdiff.distributed.strategies import STRATEGIES, strategy_name
from lit_transdiff.distributed.world import (
    accelerator_and_devices,
    launched,
    micro_batch_size,
    num_nodes,
    world_size,
)
from lit_transdiff.models.sizes import (
    FLOAT_BYTES,
    Room,
    bytes_of_images,
    least_of_autoencoder,
    least_of_drawing,
    least_of_row,
    room_here,
)
from lit_transdiff.stages import PREPARATORY, STAGES

LARGEST_GPU = max(device.memory for device in DEVICES.values())
NODE, CLUSTER = 8, 1024  # GPUs assumed to share weights, or a batch, when a run is only outlined


def check_sizes(run: RunConfig, outline: bool = False) -> None:
    """Refuse sizes that do not fit into memory, and more processes than this machine can run.

    With ``outline`` the run is not started here: without configured devices it may be meant for the largest
    machines.
    """
    devices, most = accelerator_and_devices(run), most_processes()
    allowed = f"at most {most} on this machine"
    require(run.data.num_workers <= most, "data.num_workers", run.data.num_workers, allowed)
    if devices[0] == "cpu":
        allowed = f"at most {most} processes on this machine"
        require(devices[1] <= most, "distributed.devices", devices[1], allowed)
    elsewhere = outline and run.distributed.devices is None and num_nodes(run) == 1 and launched() == (1, 0)
    room = room_here(devices[0])
    if elsewhere:
        room = max(room, Room(LARGEST_GPU, "the largest GPUs"), key=lambda each: each.size)
    check_weights(run, room.times(NODE) if elsewhere else room)
    shared = elsewhere and run.training.micro_batch_size is None
    rows = micro_batch_size(run)
    check_batch(run, max(1, rows // CLUSTER) if shared else rows, room)
    if run.stage in STAGES:
        check_drawing(run, room)


def check_weights(run: RunConfig, room: Room) -> None:
    """Check the weights, gradients and averages of a device."""
    model, training = run.model, run.autoencoder_training
    if run.stage in STAGES:
        copies = 1 + (not STAGES[run.stage].head_alone) * (1 + run.optimizer.num_averages)
        parts = 1 if STRATEGIES[strategy_name(run)].whole else world_size(run)
        for names, least in model.least_parameters().items():
            shape = {f"model__{name}": getattr(model, name) for name in names}
            room.require(FLOAT_BYTES * copies / parts * least, **shape)
    elif run.stage == "autoencoder":
        shape = {
            f"autoencoder_training__{name}": getattr(training, name)
            for name in ("block_channels", "layers_per_block")
        }
        room.require(2 * FLOAT_BYTES * least_of_autoencoder(training), **shape)


def check_batch(run: RunConfig, rows: int, room: Room) -> None:
    """Check the images of a pass and their activations."""
    training = run.training
    batch = {
        f"training__{name}": getattr(training, name) for name in ("global_batch_size", "micro_batch_size")
    }
    if run.stage in PREPARATORY:
        room.require(bytes_of_images(run.data, rows), **batch, data__image_size=run.data.image_size)
        return
    shape = {f"model__{name}": getattr(run.model, name) for name in run.model.of_a_row}
    least = least_of_row(run, STAGES[run.stage].head_alone)
    room.require(rows * least, **batch, flow__num_noise_draws=run.flow.num_noise_draws, **shape)


def check_drawing(run: RunConfig, room: Room) -> None:
    """Check the images that are sampled together for a score."""
    settings = run.evaluation
    rows = min(settings.batch_size, settings.num_images)
    room.require(
        least_of_drawing(run, rows),
        evaluation__batch_size=settings.batch_size,
        data__image_size=run.data.image_size,
    )
