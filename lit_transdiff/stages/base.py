"""The base class of the stages that train a generator: objective, optimizer, averaged weights and export.

Shapes: B images (rows) of a batch, R references per row, M noise draws, K parts, latents of C h w.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor

from lit_transdiff.base.randomness import GlobalBatchNormal, Normal, PerImageNormal, mix
from lit_transdiff.checkpoints.averages import EMA
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.loading import run_from, to_dict
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.flow.processes import process_class
from lit_transdiff.models.autoencoder import Autoencoder, IdentityAutoencoder, check_latents, load_autoencoder
from lit_transdiff.models.kernel_blocks import HAS_TRITON
from lit_transdiff.models.paradigm import Paradigm, build_model, network_class, stacks_of
from lit_transdiff.stages.adamw import AveragedAdamW
from lit_transdiff.stages.blocks import arrange_blocks
from lit_transdiff.stages.contract import check_family_class
from lit_transdiff.stages.graph import GraphedObjective
from lit_transdiff.stages.holders import averages_of
from lit_transdiff.stages.objective import losses_of
from lit_transdiff.stages.optim import build_optimizer, check_optimizer, lr_factor

PREFIX = "model."  # the beginning of the model's parameter names in the stage


def log_now(trainer: pl.Trainer, metrics: dict[str, float]) -> None:
    """Log ``metrics`` to all loggers at the current step; Lightning's own logging repeats old values."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=trainer.global_step)
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


class Stage(pl.LightningModule):
    """The base of all stages: settings as ``hparams``, for ``load_from_checkpoint``, and the loss's log.

    ``run`` is a ``RunConfig`` or, from a checkpoint, its plain settings.
    """

    logs_itself = True  # False when a callback of the trainer logs instead

    def __init__(self, run: RunConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.run = run if isinstance(run, RunConfig) else run_from(dict(run), source="hparams")
        self.check(self.run)
        self.save_hyperparameters(to_dict(self.run))

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse invalid settings before anything expensive starts."""
        check_optimizer(run.optimizer)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Tell Lightning to which argument the settings belong."""
        checkpoint[self.CHECKPOINT_HYPER_PARAMS_NAME] = "run"

    def on_train_epoch_end(self) -> None:
        if self.logs_itself:  # the last step, whatever the logging interval
            self.log("train/loss", self.trainer.callback_metrics["train/loss"])

    def scheduled(self, optimizer: torch.optim.Optimizer) -> Any:
        """An optimizer with the run's learning-rate schedule, in Lightning's form."""
        config, steps = self.run.optimizer, self.run.training.max_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, steps, config))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def log_loss(self, loss: Tensor, batch_size: int) -> None:
        """Log ``train/loss`` of a pass, unless a callback does so."""
        if self.logs_itself:
            self.log("train/loss", loss.detach(), prog_bar=True, sync_dist=True, batch_size=batch_size)


def conditions_of(batch: Batch) -> Tensor:
    """Labels [B], or the conditions that replace them."""
    return batch.labels if batch.conditions is None else batch.conditions


class TransDiffStage(Stage):
    """The base of stages that train a generator; subclasses define ``prepare``, ``head_alone`` and ``check``.

    Images are encoded by the run's frozen ``autoencoder``, which is not a submodule: it is neither trained
    nor saved.
    """

    # True: no gradient reaches the networks that compute an image's memory
    head_alone: ClassVar[bool] = False
    autoencoder: Autoencoder | None
    graphs: GraphedObjective | None

    def __init__(self, run: RunConfig | Mapping[str, Any], autoencoder: Autoencoder | None = None) -> None:
        super().__init__(run)
        run = self.run
        self.keep(autoencoder)
        self.latents_are_checked = False
        self.model = build_model(run.model)
        process, prediction = self.model.process_of(run.model)
        self.process = process_class(process)(run.flow, prediction)
        arrange_blocks(self.model, run)
        if run.training.precision == "bf16-true":
            self.model.to(torch.bfloat16)
        vars(self)["graphs"] = None  # the objective's graphs, made when training starts
        self.prepare()

    @classmethod
    def check(cls, run: RunConfig) -> None:
        """Refuse invalid settings before anything expensive starts."""
        super().check(run)
        check_family_class(run.model)
        model, again = network_class(run.model), run.training.activation_checkpointing
        model.check(run.model)
        process_class(model.process_of(run.model)[0]).check(run.flow)
        frozen, allowed = run.training.frozen_dropout, f"false in stage {run.stage}, which freezes nothing"
        require(not frozen or cls.head_alone, "training.frozen_dropout", frozen, allowed)
        stacks = stacks_of(run.model)
        in_head = [name for name in stacks if model.stacks[name].path.startswith(model.head_prefixes)]
        names = ["none", *in_head] if cls.head_alone else ["none", "all", *stacks]
        allowed = (
            f"{' or '.join(map(repr, names))} in stage {run.stage} with model.paradigm {run.model.paradigm}"
        )
        require(again in names, "training.activation_checkpointing", again, allowed)

    def prepare(self) -> None:
        """Freeze the weights that the stage does not train."""

    # --- images and latents --------------------------------------------------------------------------------

    def keep(self, autoencoder: Autoencoder | None) -> None:
        """Store the autoencoder outside the submodules, hidden from checkpoints and strategies."""
        vars(self)["autoencoder"] = autoencoder

    def setup(self, stage: str) -> None:
        """Load the run's autoencoder unless one was given."""
        if self.autoencoder is None:
            settings = self.run.autoencoder
            self.keep(load_autoencoder(settings.kind, settings.path, self.run.data.image_channels))

    def on_fit_start(self) -> None:
        self.place_autoencoder()
        training = self.run.training
        whole = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if self.device.type != "cuda" or not whole:
            return
        for optimizer in self.trainer.optimizers:
            if isinstance(optimizer, AveragedAdamW):
                optimizer.kernels = HAS_TRITON and training.kernels is not False
        if training.takes_graphs:
            graphs = GraphedObjective(self.losses, self.model, required=training.cuda_graphs is True)
            vars(self)["graphs"] = graphs

    def on_validation_start(self) -> None:
        self.place_autoencoder()

    def place_autoencoder(self) -> None:
        """Move the autoencoder to the model's device."""
        assert self.autoencoder is not None
        self.autoencoder.to(self.device)

    @torch.no_grad()
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Encode images [B, R, C, H, W] to moments [B, R, 2c, h, w]; cached moments pass.

        The first batch is checked.
        """
        assert self.autoencoder is not None
        values, data = batch.values, self.run.data
        if tuple(values.shape[2:]) == (data.image_channels, data.image_size, data.image_size):
            with torch.autocast(values.device.type, enabled=False):
                values = self.autoencoder.encode(values)
        if not self.latents_are_checked:
            self.check_moments(values)
            self.latents_are_checked = True
        return replace(batch, values=values)

    def check_moments(self, moments: Tensor) -> None:
        """Refuse values that are not latents, and an autoencoder with another normalisation."""
        model, data = self.run.model, self.run.data
        latents = (model.latent_channels, model.latent_size, model.latent_size)
        several = 1 if isinstance(self.autoencoder, IdentityAutoencoder) else 2
        posterior = (several * latents[0], *latents[1:])
        images = (data.image_channels, data.image_size, data.image_size)
        sizes = f"{images} (images) or {posterior} (moments)"
        allowed = f"[B, R, C, H, W] with R = {model.num_references} and C, H, W = {sizes}"
        fits = moments.ndim == 5 and tuple(moments.shape[1:]) == (model.num_references, *posterior)
        require(fits, "values of a batch", tuple(moments.shape), allowed)
        noise = torch.Generator(moments.device).manual_seed(self.run.seed)  # independent of training
        shape = (*moments.shape[:2], *latents)
        check_latents(self.latents(moments, torch.randn(shape, generator=noise, device=moments.device)))

    @torch.no_grad()
    def latents(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Normalised latents [B, R, c, h, w], sampled from the posterior with ``noise``."""
        assert self.autoencoder is not None
        with torch.autocast(moments.device.type, enabled=False):
            return self.autoencoder.sample(moments.float(), noise)

    # --- training ------------------------------------------------------------------------------------------

    def objective(self, batch: Batch, normal: Normal) -> tuple[Tensor, Tensor]:
        """The loss of each part and draw, and its noise level, both [K M B] (see ``losses_of``)."""
        return self.losses(batch.values, conditions_of(batch), normal)

    def losses(self, moments: Tensor, conditions: Tensor, normal: Normal) -> tuple[Tensor, Tensor]:
        """``objective`` of moments [B, R, 2c, h, w], and of labels [B] or other conditions."""
        flow, model = self.run.flow, self.run.model
        size = model.latent_size
        x = self.latents(moments, normal(model.num_references, model.latent_channels, size, size))
        drop = torch.special.ndtr(normal()) < flow.label_drop_prob
        return losses_of(self.model, self.process, conditions, drop, x, normal, flow.num_noise_draws)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        step, size = self.global_step, self.run.training.global_batch_size
        # Only dropout reads the global generator; this seed makes it a function of the step as well.
        micro_step = batch_idx % self.trainer.accumulate_grad_batches
        torch.manual_seed(mix(self.run.seed, "dropout", step, micro_step, self.global_rank))
        numbers = partial(
            GlobalBatchNormal, mix(self.run.seed, "training", step), size, batch.positions % size
        )
        if self.graphs is None:
            rows, t = self.objective(batch, numbers())
        else:
            if micro_step == 1:
                self.graphs.keep_gradients()
            rows, t = self.graphs(batch.values, conditions_of(batch), numbers)
        self.log_loss(rows.mean(), len(batch.labels))
        return {"loss": rows.mean() * self.run.optimizer.gradient_scale, "rows": rows.detach(), "t": t}

    def on_validation_epoch_start(self) -> None:
        self.swap_average()
        self._validation = torch.zeros(2, dtype=torch.float64)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the loss of the averaged weights, with the same noise and times at every validation."""
        seeds = [mix(self.run.seed, "validation", position) for position in batch.positions.tolist()]
        rows, _ = self.objective(batch, PerImageNormal(seeds, self.device))
        self._validation += torch.tensor([rows.double().sum().item(), rows.numel()], dtype=torch.float64)

    def on_validation_epoch_end(self) -> None:
        total = self.trainer.strategy.reduce(self._validation.float().to(self.device), reduce_op="sum")
        self.swap_average()
        loss = (total[0] / total[1]).item()
        if self.logs_itself:
            self.log("val/loss", loss, prog_bar=True, rank_zero_only=False)
        else:
            log_now(self.trainer, {"val/loss": loss})

    def swap_average(self) -> None:
        """Exchange the weights and their averages. Without an optimizer this has no effect."""
        if self.trainer.optimizers:
            averages_of(self.trainer).swap_averages()

    def averaged_model(self) -> Paradigm:
        """An unsharded copy of the model with averaged weights, in eval mode. All ranks must call this."""
        state = averages_of(self.trainer).averaged_state()
        with self.device:
            model = build_model(self.run.model).eval().requires_grad_(False)
        model.load_state_dict({name.removeprefix(PREFIX): value for name, value in state.items()})
        return model

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Load the averages for ``Trainer.validate``, which then agrees with validation in training."""
        if self._trainer is None or not self.trainer.validating or not checkpoint.get("optimizer_states"):
            return
        names = {p: name for name, p in self.named_parameters()}
        states = checkpoint["optimizer_states"][0]["state"]
        groups = build_optimizer(self.model, self.run.optimizer).param_groups
        for i, name in enumerate(names[p] for group in groups for p in group["params"]):
            state = states.get(i, states.get(name, {}))  # by number, or under FSDP by name
            if EMA in state:
                checkpoint["state_dict"][name] = state[EMA]

    def configure_model(self) -> None:
        """Let the strategy shard the model, if there is a trainer."""
        if self._trainer is not None:
            averages_of(self.trainer).shard(self.model)

    def configure_gradient_clipping(self, optimizer: Any, **clipping: Any) -> None:  # type: ignore[override]
        """Clip the gradients, unless the optimizer does so within its step."""
        if not (isinstance(optimizer, AveragedAdamW) and optimizer.clips(**clipping)):
            self.clip_gradients(optimizer, **clipping)

    def configure_optimizers(self) -> Any:
        return self.scheduled(build_optimizer(self.model, self.run.optimizer))
