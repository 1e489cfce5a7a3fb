"""DeepSpeed's ZeRO 1, 2 and 3 through Lightning, on GPUs and, for tests, on CPUs over gloo.

Weights are float32 and bfloat16 is autocast, as under the other strategies, so that the numbers are the same.
"""

from __future__ import annotations

import atexit
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy

from lit_transdiff.checkpoints.averages import Holder, Piece
from lit_transdiff.config import DistributedConfig, require
from lit_transdiff.distributed.sharding import Sharding

CPU_BUCKET = 1_000_000  # elements; DeepSpeed's default allocates gigabytes at once


def check_nvme(config: DistributedConfig, on_cpu: bool) -> None:
    """Raise ``ValueError`` unless DeepSpeed can read and write files asynchronously in ``nvme_path``."""
    folder = Path(config.nvme_path or "").absolute()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    allowed = f"a folder that can be written, which {existing} is not"
    require(writable, "distributed.nvme_path", config.nvme_path, allowed)
    if on_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.accelerator import get_accelerator

    needs = "it needs a C++ compiler and libaio-dev; see ds_report"
    allowed = f"'none' or 'cpu', as DeepSpeed's async_io cannot be built ({needs})"
    builder = get_accelerator().get_op_builder("AsyncIOBuilder")()
    require(builder.is_compatible(verbose=False), "distributed.offload", config.offload, allowed)


class ZeRO(Sharding, DeepSpeedStrategy):
    """ZeRO ``stage`` 1 (optimizer and averages sharded), 2 (and gradients), 3 (and parameters)."""

    def __init__(
        self,
        stage: int,
        config: DistributedConfig,
        *,
        micro_batch: int,
        on_cpu: bool,
        bf16: bool,
        timeout: timedelta,
    ) -> None:
        buckets: dict[str, Any] = (
            {} if not on_cpu else dict(reduce_bucket_size=CPU_BUCKET, allgather_bucket_size=CPU_BUCKET)
        )
        offload = config.offload != "none"
        super().__init__(
            stage=stage,
            overlap_comm=not on_cpu,
            offload_optimizer=offload,
            offload_optimizer_device=config.offload if offload else "cpu",
            offload_parameters=config.offload_parameters,
            offload_params_device=config.offload if offload else "cpu",
            nvme_path=config.nvme_path or "",
            logging_batch_size_per_gpu=micro_batch,
            timeout=timeout,
            **buckets,
        )
        assert isinstance(self.config, dict)
        self.zero_stage = stage
        self.config["zero_force_ds_cpu_optimizer"] = False  # ours keeps the averages
        if on_cpu:
            # Shard even the smallest parameters, so that tests on small models cover sharding.
            self.config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        if bf16:
            # Reduce gradients in float32, as DDP does.
            self.config["torch_autocast"] = {
                "enabled": True,
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],
            }

    # --- tensors -------------------------------------------------------------------------------------------

    def holders(self) -> Iterator[Holder]:
        names = {p: name for name, p in self.stage.named_parameters()}
        for i, (p, name) in enumerate(names.items()):
            if not p.requires_grad:
                yield self.frozen_holder(i, p, name)
        yield from self.whole_partitions(names) if self.zero_stage == 3 else self.flat_partitions(names)

    def frozen_holder(self, i: int, p: torch.nn.Parameter, name: str) -> Holder:
        """A frozen parameter: whole below stage 3, a slice in stage 3."""
        if self.zero_stage < 3:
            return Holder(p, (Piece(name, 0, 0, p.numel()),), owned=i % self.world_size == self.global_rank)
        return Holder(p.ds_tensor, (self.slice_of(p, name, 0),))  # type: ignore[attr-defined]

    def flat_partitions(self, names: dict[torch.nn.Parameter, str]) -> Iterator[Holder]:
        """Stages 1 and 2: one flat partition of each parameter group."""
        zero = self.optimizers[0]
        for tensor, group in zip(zero.single_partition_of_fp32_groups, zero.bit16_groups, strict=True):  # type: ignore[attr-defined]
            pieces = []
            for p in group:
                if p._hp_mapping is not None:  # this rank has a part of it
                    here, there = p._hp_mapping.lp_fragment_address, p._hp_mapping.hp_fragment_address
                    pieces.append(Piece(names[p], here.start, there.start, here.numel))
            yield Holder(tensor, tuple(pieces))

    def whole_partitions(self, names: dict[torch.nn.Parameter, str]) -> Iterator[Holder]:
        """Stage 3: equal slices of each parameter, concatenated by sub-group (read in turn from NVMe)."""
        zero: Any = self.optimizers[0]
        for i, group in enumerate(zero.fp16_groups):
            on_disk = zero._swappable_optimizer_subgroup(i)
            if on_disk:
                zero._optimizer_states_and_gradient_swap_in(i)
            offsets = [zero.grad_position[zero.get_param_id(p)][1] for p in group]
            pieces = tuple(
                self.slice_of(p, names[p], offset) for p, offset in zip(group, offsets, strict=True)
            )
            yield Holder(zero.fp32_partitioned_groups_flat[i], pieces)
            if on_disk:
                zero._optimizer_states_and_gradient_swap_out(i)

    def slice_of(self, p: Any, name: str, offset: int) -> Piece:
        """This rank's slice; the last ranks' slices may be padded or empty."""
        start = min(self.global_rank * p.ds_tensor.numel(), p.ds_numel)
        return Piece(name, start, offset, min(p.ds_tensor.numel(), p.ds_numel - start))

    def refresh(self) -> None:
        """Update the model's copies of the float32 partitions on all ranks."""
        zero: Any = self.optimizers[0]
        if self.zero_stage < 3:
            zero.update_lp_params()
            return
        zero._partition_all_parameters()  # otherwise gathered copies would be reused
        for i in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(i)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)

    def gradient_norm(self) -> torch.Tensor | None:
        """None, because DeepSpeed knows it only after the step."""
        return None

    def gradient_norm_of_step(self) -> torch.Tensor | None:
        """Norm of the last step's gradients before clipping."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(norm, dtype=torch.float32)

    # --- gradient accumulation: Lightning's boundary, scaled once (both libraries divide by the number of
    # passes)

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Do nothing: ``backward`` sets the boundary."""
        yield

    def backward(self, closure_loss: torch.Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        last = not self.stage.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(last)
        return super().backward(closure_loss, optimizer, *args, scale_wrt_gas=False, **kwargs)

    # --- CPUs ----------------------------------------------------------------------------------------------

    @property
    def on_cpu(self) -> bool:
        return isinstance(self.accelerator, CPUAccelerator)

    def setup_environment(self) -> None:
        """Set up as Lightning does, whose check would refuse CPUs."""
        if not self.on_cpu:
            return super().setup_environment()
        os.environ["DS_ACCELERATOR"] = "cpu"
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        """Set up as Lightning does, without its check of GPU numbers."""
        if not self.on_cpu:
            return super().setup_distributed()
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def _init_deepspeed_distributed(self) -> None:
        if self.on_cpu:
            # Avoids compiling an inference operation for a minute; the package shadows the module's name.
            communication: Any = importlib.import_module("deepspeed.comm.torch")
            communication.build_shm_op = lambda: None
        super()._init_deepspeed_distributed()
        if self.on_cpu:
            atexit.register(_destroy_dist_connection)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        with self.numbered_root():
            return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @contextmanager
    def numbered_root(self) -> Iterator[None]:
        """Give the root CPU device a number within the block, which the engine requires."""
        self._numbered = self.on_cpu
        try:
            yield
        finally:
            self._numbered = False

    @property
    def root_device(self) -> torch.device:
        """This rank's device."""
        return (
            torch.device("cpu", self.local_rank) if getattr(self, "_numbered", False) else super().root_device
        )
