"""Lower bounds of a model's memory, by arithmetic on its settings, for refusing impossible sizes early.

All numbers are bytes and far below the real use (``planning.memory`` computes that), so only impossible sizes
are refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_transdiff.base.files import format_bytes
from lit_transdiff.base.hardware import memory_here
from lit_transdiff.config import AutoencoderTraining, DataConfig, RunConfig
from lit_transdiff.models.paradigm import network_class

FLOAT_BYTES = 4


@dataclass(frozen=True)
class Room:
    """The memory of a device, and its description."""

    size: float
    whose: str

    def require(self, needed: float, **settings: object) -> None:
        """Raise ``ValueError`` if ``settings`` (dotted names with ``__`` for dots) need more memory."""
        if needed > self.size:
            listed = ", ".join(f"{name.replace('__', '.')}={value}" for name, value in settings.items())
            allowed = f"what fits into the {format_bytes(int(self.size))} of {self.whose}"
            raise ValueError(
                f"{listed}: got what takes {format_bytes(int(needed))} of memory or more; allowed: {allowed}."
            )

    def times(self, number: int) -> Room:
        """The memory of several devices."""
        return Room(number * self.size, f"{number} times {self.whose}")


def room_here(device: str) -> Room:
    """The memory of this machine: ``device`` is "cuda" ("gpu") or "cpu"."""
    return Room(memory_here(device), "this machine" if device == "cpu" else "a GPU here")


def least_of_autoencoder(training: AutoencoderTraining) -> int:
    """A lower bound of an autoencoder's parameters: the convolutions of its levels."""
    return 2 * training.layers_per_block * sum(9 * channels**2 for channels in training.block_channels)


def bytes_of_images(data: DataConfig, number: int) -> int:
    """The size in bytes of float images."""
    return number * data.image_channels * data.image_size**2 * FLOAT_BYTES


def least_of_row(run: RunConfig, head_alone: bool) -> float:
    """A lower bound of a row's activations in training, in bfloat16 if that is possible."""
    kind, training = network_class(run.model), run.training
    number = FLOAT_BYTES if training.precision == "fp32" else 2
    return number * run.model.least_kept(
        run.flow.num_noise_draws, training.recomputed(kind.stacks), head_alone
    )


def least_of_drawing(run: RunConfig, num_rows: int) -> int:
    """A lower bound of the memory for sampling rows at once, in bfloat16 if possible, and their images."""
    return 2 * num_rows * run.model.least_drawn() + bytes_of_images(run.data, num_rows)
