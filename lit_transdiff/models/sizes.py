"""What a model takes at the very least, by arithmetic on its settings: sizes that cannot work are refused before they are made.

All numbers are bytes and far below the truth (``planning.memory`` counts), so that only what certainly cannot work is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

from lit_transdiff.base.files import format_bytes
from lit_transdiff.base.hardware import memory_here
from lit_transdiff.config import AutoencoderTraining, DataConfig, ModelConfig, RunConfig

FLOAT_BYTES = 4
OF_A_TOKEN = 6  # times the width: what a block keeps of a token (its input, queries, keys, values, two norms) and more


@dataclass(frozen=True)
class Room:
    """The memory of a device, and in words whose."""

    size: float
    whose: str

    def require(self, needed: float, **settings: object) -> None:
        """Raise ``ValueError`` when ``settings``, dotted names with ``__`` for the dot, need more than there is."""
        if needed > self.size:
            given = ", ".join(f"{name.replace('__', '.')}={value}" for name, value in settings.items())
            allowed = f"what fits into the {format_bytes(int(self.size))} of {self.whose}"
            raise ValueError(f"{given}: got what takes {format_bytes(int(needed))} of memory or more; allowed: {allowed}.")

    def times(self, number: int) -> Room:
        """That of several."""
        return Room(number * self.size, f"{number} times {self.whose}")


def room_here(device: str) -> Room:
    """That of this machine: ``device`` is "cuda" ("gpu") or "cpu"."""
    return Room(memory_here(device), "this machine" if device == "cpu" else "a GPU here")


def least_in_blocks(model: ModelConfig) -> int:
    """Fewer parameters than the blocks of a model have: those of matrices that all blocks have."""
    hidden = int(model.mlp_ratio * model.width)
    return (model.encoder_blocks + model.decoder_blocks) * (4 * model.width**2 + 2 * model.width * hidden)


def least_in_tables(model: ModelConfig) -> int:
    """Parameters of the tables of classes and positions."""
    tokens = model.num_class_tokens + model.num_context_tokens + model.num_decoder_tokens
    return model.width * (model.num_classes + tokens)


def least_of_autoencoder(training: AutoencoderTraining) -> int:
    """The same of an autoencoder: the convolutions of its levels."""
    return 2 * training.layers_per_block * sum(9 * channels**2 for channels in training.block_channels)


def bytes_of_images(data: DataConfig, number: int) -> int:
    """Images as numbers."""
    return number * data.image_channels * data.image_size**2 * FLOAT_BYTES


def least_of_row(run: RunConfig, trains_encoder: bool) -> float:
    """What a row of a batch leaves in a training pass until the backward pass, in bfloat16 where it may be."""
    model, training = run.model, run.training
    views, tokens = model.num_references * run.flow.num_noise_draws, model.num_class_tokens + model.num_context_tokens
    number = FLOAT_BYTES if training.precision == "fp32" else 2
    kept = {part: 1 if part in training.checkpointed_parts else OF_A_TOKEN for part in ("encoder", "decoder")}
    encoder = model.encoder_blocks * tokens * kept["encoder"] if trains_encoder else 0
    decoder = model.decoder_blocks * views * model.num_decoder_tokens * kept["decoder"]
    return number * model.width * (encoder + decoder)


def least_of_drawing(run: RunConfig, num_rows: int) -> int:
    """What drawing so many rows at once holds: tokens in the decoder, before and after a norm, and the images."""
    tokens = num_rows * run.model.num_decoder_tokens
    return 2 * 2 * tokens * run.model.width + bytes_of_images(run.data, num_rows)  # in bfloat16 where it may be
