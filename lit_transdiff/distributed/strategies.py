"""Strategies on one device, with whole copies (DDP), and with shards (FSDP2). ZeRO is in ``zero``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import cast

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from lit_transdiff.distributed.sharding import Holder, Piece, Sharding
from lit_transdiff.models.layers import CrossAttention
from lit_transdiff.models.transdiff import TransDiff


class Single(Sharding, SingleDeviceStrategy):
    """One device."""


class DDP(Sharding, DDPStrategy):
    """Whole copies on every device; gradients are averaged."""


class FSDP(Sharding, ModelParallelStrategy):
    """FSDP2: parameters, gradients, optimizer and averages are cut by rows; each block is gathered when it is needed."""

    def holders(self) -> Iterator[Holder]:
        for i, (name, p) in enumerate(self.stage.named_parameters()):
            if isinstance(p, DTensor):
                yield Holder(p, (shard_piece(name, p, self.global_rank, self.world_size),))
            else:
                yield Holder(p, (Piece(name, 0, 0, p.numel()),), owned=i % self.world_size == self.global_rank)

    def shard(self, model: nn.Module) -> None:
        """One unit a block, one for all keys and values of the decoder (they are made together), one for the rest."""
        assert isinstance(model, TransDiff)
        attentions = [cast(CrossAttention, block.cross_attention) for block in model.decoder.blocks]
        projections = [layer for attention in attentions for layer in (attention.key, attention.value)]
        cut = partial(fully_shard, mesh=self.device_mesh["data_parallel"], reshard_after_forward=True)
        cut([model.decoder.context_projection, *projections])
        for block in [*model.encoder.blocks, *model.decoder.blocks]:
            cut(block)
        cut(model)
        for method in ("encode", "memory", "velocity"):
            register_fsdp_forward_method(model, method)


def shard_piece(name: str, p: DTensor, rank: int, world: int) -> Piece:
    """Which elements of a parameter cut by rows this rank holds; the first ranks have ceil(rows / world) rows each."""
    rows, row = p.shape[0], p.numel() // p.shape[0]
    each = -(-rows // world)
    return Piece(name, min(rank * each, rows) * row, 0, p.to_local().numel())
