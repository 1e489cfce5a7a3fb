"""What a forward pass of a stage keeps in memory for its backward pass, counted without doing it.

The stage runs once on fake tensors (shapes without values), so any size is counted in seconds on any machine. Counted are the
tensors that autograd keeps, with the precision of the run. Attention is counted as the fused kernels do it: without its matrix
of weights.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_transdiff.config import RunConfig
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.flops import decoder_flops, encoder_flops, training_flops
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.base import TransDiffStage


@dataclass(frozen=True)
class PassCost:
    """A forward and backward pass of a micro-batch: bytes that stay until the backward pass, and model operations.

    ``fixed_bytes`` (copies of the weights in bfloat16) and ``row_bytes`` for each row; of recomputed blocks only the inputs stay.
    ``work_bytes`` a row are held for a moment on top. ``recomputed_flops`` a row come on top of ``row_flops``.
    """

    fixed_bytes: float
    row_bytes: float
    work_bytes: float
    row_flops: float
    recomputed_flops: float

    def kept(self, rows: int) -> float:
        """Bytes at the worst moment."""
        return self.fixed_bytes + rows * (self.row_bytes + self.work_bytes)


@dataclass(frozen=True)
class ModelCost:
    """Parameters of a stage's model."""

    parameters: int
    trained: int
    encoder: int
    decoder: int
    largest_unit: int  # parameters of the largest block, or of what is outside of the blocks: gathered at once by ZeRO-3 and FSDP


def fake_stage(run: RunConfig) -> TransDiffStage:
    """The run's stage without values; call inside a ``FakeTensorMode``. Dropout of attention weights lives inside the kernel."""
    model = replace(run.model, attention_dropout=0.0)
    training = replace(
        run.training, compile=False, activation_checkpointing="none", activation_checkpointing_every=1, precision="fp32"
    )
    return STAGES[run.stage](replace(run, model=model, training=training), IdentityAutoencoder(model.latent_channels))


def model_cost(run: RunConfig) -> ModelCost:
    """Count the parameters."""
    with torch.device("meta"):
        model = fake_stage(run).model
    count = {name: p.numel() for name, p in model.named_parameters()}
    in_blocks: dict[str, int] = defaultdict(int)
    for name, number in count.items():
        part, word, *rest = name.split(".")
        in_blocks[f"{part}.{word}.{rest[0]}" if word == "blocks" else "outside"] += number
    return ModelCost(
        parameters=sum(count.values()),
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        encoder=sum(number for name, number in count.items() if name.startswith("encoder.")),
        decoder=sum(number for name, number in count.items() if name.startswith("decoder.")),
        largest_unit=max(in_blocks.values()),
    )


def pass_cost(run: RunConfig, bf16: bool) -> PassCost:
    """Count a pass of one and of two rows, with one and two blocks; everything is linear in both."""
    model, draws, frozen = run.model, run.flow.num_noise_draws, not STAGES[run.stage].trains_encoder
    counts = {
        blocks: [count_pass(with_blocks(run, *blocks), rows, bf16) for rows in (1, 2)] for blocks in ((1, 1), (2, 1), (1, 2))
    }
    base, encoder, decoder = (torch.stack(counts[blocks]) for blocks in ((1, 1), (2, 1), (1, 2)))  # rows of the batch x counts
    each = {"encoder": encoder - base, "decoder": decoder - base}  # of one block more
    number = {"encoder": model.encoder_blocks, "decoder": model.decoder_blocks}
    kept = base[:, 0] + sum((number[part] - 1) * each[part][:, 0] for part in each)
    training, operations, again = run.training, {"encoder": encoder_flops(model), "decoder": decoder_flops(model, draws)}, 0.0
    blocks: list[tuple[float, float]] = []  # bytes a row that a block keeps, and that it makes in the backward pass
    for part, count in each.items():
        _, whole, inputs = (count[1] - count[0]).tolist()
        chosen = range(0, number[part] if part in training.checkpointed_parts else 0, training.activation_checkpointing_every)
        blocks += [(inputs, whole) if i in chosen else (whole, whole / 8) for i in range(number[part])]
        kept = kept - len(chosen) * (count[:, 1] - count[:, 2])
        again += operations[part] * len(chosen) / number[part]
    row = float(kept[1] - kept[0])
    return PassCost(float(kept[0]) - row, row, worst_moment(blocks), training_flops(model, draws, frozen_encoder=frozen), again)


def worst_moment(blocks: Sequence[tuple[float, float]]) -> float:
    """What the backward pass holds at its worst moment beyond everything that ``blocks`` keep: (bytes kept, bytes made) each.

    A block makes its activations again, or gradients of them (an eighth of the activations, more than was measured), when what
    the blocks after it kept is no longer there.
    """
    behind, worst = 0.0, 0.0
    for kept, made in reversed(blocks):
        worst = max(worst, made - behind)
        behind += kept
    return worst


def with_blocks(run: RunConfig, encoder_blocks: int, decoder_blocks: int) -> RunConfig:
    return replace(run, model=replace(run.model, encoder_blocks=encoder_blocks, decoder_blocks=decoder_blocks))


def count_pass(run: RunConfig, rows: int, bf16: bool) -> Tensor:
    """[3] float64: bytes kept, of these in blocks, bytes of the blocks' inputs."""
    with FakeTensorMode():
        stage = fake_stage(run)
        stage.train()
        config = run.model
        values = torch.zeros(rows, config.num_references, config.latent_channels, config.latent_size, config.latent_size)
        numbers = torch.zeros(rows, dtype=torch.int64)
        batch = Batch(values, numbers, torch.zeros(rows, config.num_references, dtype=torch.int64), numbers)
        with kept_tensors(stage.model) as kept, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            stage.objective(batch, lambda *shape: torch.randn(rows, *shape))
    in_blocks = sum(size for name, size in kept.bytes.items() if name)
    return torch.tensor([sum(kept.bytes.values()), in_blocks, sum(kept.inputs.values())], dtype=torch.float64)


class Kept:
    """Bytes that autograd keeps, by block ("" outside of blocks), and the size of each block's input."""

    def __init__(self, parameters: set[int]) -> None:
        self.bytes: dict[str, int] = defaultdict(int)
        self.inputs: dict[str, int] = {}
        self.block = ""
        self.seen: dict[int, Any] = {}  # storages are kept alive, so that no number is given twice
        self.parameters = parameters

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen and storage._cdata not in self.parameters:
            self.seen[storage._cdata] = storage
            self.bytes[self.block] += storage.nbytes()
        return tensor


@contextmanager
def kept_tensors(model: nn.Module) -> Iterator[Kept]:
    """Counts what is saved for the backward pass inside."""
    kept = Kept({p.untyped_storage()._cdata for p in model.parameters()})
    handles = []
    for name, block in model.named_modules():
        if ".blocks." in f".{name}" and name.rsplit(".", 1)[-1].isdigit() and name.count(".") == 2:

            def enter(module: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                kept.block = name
                kept.inputs[name] = inputs[0].numel() * inputs[0].element_size()

            def leave(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
                kept.block = ""

            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
        yield kept
    for handle in handles:
        handle.remove()
