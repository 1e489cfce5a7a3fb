"""What the three stages of TransDiff share: the objective, the optimizer, the average of the weights, the export.

Shapes: B images of the batch, G of the global batch, R references of an image, M noise draws, C h w a latent; rows of the decoder
are ordered (reference, draw, image).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol, cast

import lightning.pytorch as pl
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from lit_transdiff.base.randomness import GlobalBatchNormal, PerImageNormal, mix
from lit_transdiff.config import RunConfig, require
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.flow.loss import check_flow, draw_times, flow_matching_loss
from lit_transdiff.models.execution import compile_blocks, recompute_blocks
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.stages.optim import build_optimizer, check_optimizer, lr_factor

# Normal numbers of a shape, one row for each image of the batch: [B, *shape].
Normal = Callable[..., Tensor]
# (values of a Batch, posterior noise [B, R, c, h, w]) -> normalised latents [B, R, c, h, w]
ToLatents = Callable[[Tensor, Tensor], Tensor]


PREFIX = "model."  # of the model's names in the stage


class Averages(Protocol):
    """What a stage asks of its strategy (see ``distributed.sharding``)."""

    def shard(self, model: nn.Module) -> None: ...
    def swap_averages(self) -> None: ...
    def averaged_state(self) -> dict[str, Tensor]: ...
    def average_distance(self) -> Tensor: ...
    def gradient_norm(self) -> Tensor | None: ...
    def gradient_norm_of_step(self) -> Tensor | None: ...


def sharding(trainer: pl.Trainer) -> Averages:
    """The trainer's strategy, which is one of ours."""
    return cast(Averages, trainer.strategy)


def log_now(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Give ``metrics`` to all loggers at the number of optimizer steps done (Lightning's own logging repeats old values)."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


class TransDiffStage(pl.LightningModule):
    """One stage of training. A subclass says what it trains (``trains_encoder``, ``prepare``) and what it needs (``check``)."""

    trains_encoder: ClassVar[bool] = True  # else there is no backward pass through it

    def __init__(self, run: RunConfig, to_latents: ToLatents) -> None:
        super().__init__()
        self.check(run)
        self.run = run
        self.to_latents = to_latents
        self.model = TransDiff(run.model)
        blocks = {"encoder": self.model.encoder.blocks, "decoder": self.model.decoder.blocks}
        if run.training.compile:
            compile_blocks([*blocks["encoder"], *blocks["decoder"]])
        for part in run.training.checkpointed_parts:
            recompute_blocks(blocks[part], run.training.activation_checkpointing_every)
        if run.training.precision == "bf16-true":
            self.model.to(torch.bfloat16)
        self.prepare()

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse settings that cannot work, before anything expensive starts."""
        check_flow(run.flow)
        check_optimizer(run.optimizer)
        frozen, again = run.training.frozen_dropout, run.training.activation_checkpointing
        allowed = f"false in stage {run.stage}, which freezes nothing"
        require(not frozen or not cls.trains_encoder, "training.frozen_dropout", frozen, allowed)
        allowed = f"'none' or 'decoder' in stage {run.stage}, which has no backward pass through the encoder"
        possible = cls.trains_encoder or "encoder" not in run.training.checkpointed_parts
        require(possible, "training.activation_checkpointing", again, allowed)

    def prepare(self) -> None:
        """Freeze what the stage does not train."""

    def context(self, labels: Tensor, references: Tensor, drop: Tensor) -> Tensor:
        return self.model.encode(labels, references, drop)

    def objective(self, batch: Batch, normal: Normal) -> tuple[Tensor, Tensor]:
        """Flow-matching loss of every decoder row and its time, both [R M B] (arXiv 2506.09482, eqs. 8 and 9).

        The context of a row of references is made once; image r sees its prefix; all R images, each with M draws of noise
        and time, pass the decoder together.
        """
        flow, model = self.run.flow, self.run.model
        shape = (model.latent_channels, model.latent_size, model.latent_size)
        num_references, draws = model.num_references, flow.num_noise_draws
        x = self.to_latents(batch.values, normal(num_references, *shape))
        drop = torch.special.ndtr(normal()) < flow.label_drop_prob
        t = rearrange(draw_times(normal(num_references, draws), flow), "b r m -> (r m b)")
        noise = rearrange(normal(num_references, draws, *shape), "b r m c h w -> (r m b) c h w")
        memory = self.model.memory(self.context(batch.labels, x[:, :-1], drop), every_reference=True)
        rows = repeat(x, "b r c h w -> (r m b) c h w", m=draws)
        return flow_matching_loss(lambda x_t, t: self.model.velocity(x_t, t, memory), rows, noise, t, flow), t

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        step, size = self.global_step, self.run.training.global_batch_size
        # Dropout is the one thing that reads the global generator: seeded here, it too is a function of the step.
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix(self.run.seed, "dropout", step, micro_step, self.global_rank))
        normal = GlobalBatchNormal(mix(self.run.seed, "training", step), size, batch.positions % size)
        rows, t = self.objective(batch, normal)
        return {"loss": rows.mean() * self.run.optimizer.gradient_scale, "rows": rows.detach(), "t": t}

    def on_validation_epoch_start(self) -> None:
        self.swap_average()
        self._validation = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss of the averaged weights; noise and times of a sample are the same at every validation."""
        seeds = [mix(self.run.seed, "validation", position) for position in batch.positions.tolist()]
        rows, _ = self.objective(batch, PerImageNormal(seeds, self.device))
        self._validation += torch.tensor([rows.double().sum().item(), rows.numel()], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._validation.float().to(self.device), reduce_op="sum")
        self.swap_average()
        log_now(self.trainer, {"val/loss": (total[0] / total[1]).item()})

    def swap_average(self) -> None:
        """Exchange the weights and their averages; nothing happens before an optimizer exists."""
        if self.trainer.optimizers:
            sharding(self.trainer).swap_averages()

    def averaged_model(self) -> TransDiff:
        """A plain whole copy of the model with the averaged weights, in evaluation mode. All ranks call it together."""
        state = sharding(self.trainer).averaged_state()
        with self.device:
            model = TransDiff(self.run.model).eval().requires_grad_(False)
        model.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})
        return model

    def configure_model(self) -> None:
        """Let the strategy cut the model."""
        sharding(self.trainer).shard(self.model)

    def configure_optimizers(self) -> Any:
        config, steps = self.run.optimizer, self.run.training.max_steps
        optimizer = build_optimizer(self.model, config)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
