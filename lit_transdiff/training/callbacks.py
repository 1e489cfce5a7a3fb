"""Callbacks of a run: non-finite losses, numbers, provenance, progress and sample grids."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from einops import rearrange
from lightning.pytorch.callbacks import DeviceStatsMonitor, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from PIL import Image
from torch import Tensor

from lit_transdiff.base.files import unless_full
from lit_transdiff.base.hardware import GB, peak_flops, peak_memory
from lit_transdiff.checkpoints.run_folder import environment, inputs
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import to_dict
from lit_transdiff.data.datamodule import Batch
from lit_transdiff.data.names import sample_names
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.models.autoencoder import Autoencoder
from lit_transdiff.models.flops import row_cost
from lit_transdiff.models.tokens import token_similarity
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.pictures import grid, save_picture
from lit_transdiff.sampling.pictures import picture as as_picture
from lit_transdiff.stages.base import TransDiffStage, log_now
from lit_transdiff.stages.holders import averages_of
from lit_transdiff.training.rhythm import StepCallback
from lit_transdiff.training.window import TIME_BINS, Window

# Callbacks that a recipe can name (training.callbacks); an entry creates one for a run.
CALLBACKS: dict[str, Callable[[RunConfig], pl.Callback]] = {
    "device_stats": lambda run: DeviceStatsMonitor(),  # memory and load of the device
}


PER_CLASS = 6  # images of a sample grid


class NonFiniteLoss(FloatingPointError):
    """A training loss was NaN or infinite."""


class StopOnNonFinite(StepCallback):
    """End training at a non-finite loss and name the step and its samples; the last checkpoint remains.

    Losses stay on the device and are checked when numbers are logged and before each checkpoint, so that no
    step waits for them. All ranks stop together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recent: deque[tuple[int, Tensor, Tensor]] = deque()

    def after_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch) -> None:
        self.recent.append((self.rhythm.step, outputs["loss"].detach(), batch.samples))

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.due("numbers") or self.rhythm.saves:
            self.look(trainer)

    def between_steps(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.saves:
            self.look(trainer)

    def look(self, trainer: pl.Trainer) -> None:
        """Stop if one of the recent losses is not finite. All ranks call this together."""
        if not self.recent:
            return
        step = self.recent[-1][0]
        finite = torch.stack([loss for _, loss, _ in self.recent]).isfinite().tolist()
        message = next(
            (self.describe(trainer, *self.recent[i]) for i, ok in enumerate(finite) if not ok), None
        )
        self.recent.clear()
        if message is not None or not trainer.strategy.reduce_boolean_decision(message is None):
            raise NonFiniteLoss(message or f"step {step}: another rank met a loss that is not finite.")

    def describe(self, trainer: pl.Trainer, step: int, loss: Tensor, samples: Tensor) -> str:
        shown = sample_names(trainer.datamodule, samples)  # type: ignore[attr-defined]
        return (
            f"the loss is {loss.item()} at step {step} on rank {trainer.global_rank}. Samples of that batch: "
            f"{shown}. Training has stopped; the last checkpoint in {self.folder} is from before."
        )


class LogTraining(StepCallback):
    """Log loss (also by time bin, over all ranks), learning rate, gradient norm, throughput and data wait.

    Sums stay on the device and are reduced when they are logged. Checkpoints contain them, so that a resumed
    run logs the same values as an uninterrupted one. MFU relates to the device's peak in ``dtype``, which is
    logged as well.
    """

    def __init__(self, run: RunConfig, dtype: torch.dtype) -> None:
        self.run = run
        self.dtype = dtype
        self.images_per_step = run.images_per_step
        self.earlier: dict[str, Any] | None = None  # the window in the checkpoint that training resumes from

    def on_save_checkpoint(
        self, trainer: pl.Trainer, stage: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["window"] = self.window.state(trainer)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, stage: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.earlier = checkpoint.get("window")  # None in checkpoints of earlier versions

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.logs_itself = False  # type: ignore[assignment]  # only our stages read this

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        pl_module.logs_itself = True  # type: ignore[assignment]

    def on_train_start(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if isinstance(stage, TransDiffStage):
            self.peak = peak_flops(stage.device, self.dtype)
            peak = f"{self.peak.flops / 1e12:.4g} TFLOP/s a device: {self.peak.source}"
            rank_zero_info(f"throughput/mfu is a share of {peak}")
        self.reset(stage)
        if self.earlier is not None:
            self.window.go_on(self.earlier, trainer)
        self.batch_end = time.perf_counter()

    def reset(self, stage: pl.LightningModule) -> None:
        self.window = Window(stage.device)
        self.norm: Tensor | None = None

    def before_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Batch) -> None:
        self.window.waited += time.perf_counter() - self.batch_end

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, stage: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.rhythm.due("numbers"):
            self.norm = averages_of(trainer).gradient_norm()

    def after_pass(self, trainer: pl.Trainer, stage: pl.LightningModule, outputs: Any, batch: Batch) -> None:
        if "rows" in outputs:
            self.window.add_rows(outputs["rows"], outputs["t"])
        else:
            # Lightning has divided it
            self.window.add(outputs["loss"].detach() * trainer.accumulate_grad_batches)
        self.batch_end = time.perf_counter()

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.due("numbers"):
            log_now(trainer, self.metrics(trainer))
            self.reset(stage)
        self.batch_end = time.perf_counter()

    def metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        elapsed = self.window.seconds()
        images = self.window.passes / trainer.accumulate_grad_batches * self.images_per_step
        loss, by_time = self.window.means(trainer)
        result = {
            "train/loss": loss,
            "train/lr": trainer.optimizers[0].param_groups[0]["lr"],
            "train/images_seen": float(trainer.global_step * self.images_per_step),
            "throughput/images_per_second": images / elapsed,
            "throughput/data_wait_fraction": self.window.waited / elapsed,
            # on the first rank
            "throughput/peak_memory_gb": peak_memory(trainer.lightning_module.device) / GB,
        }
        if isinstance(trainer.lightning_module, TransDiffStage):
            result |= self.rates(trainer.lightning_module, trainer.world_size, images / elapsed)
            squares = averages_of(trainer).average_distance()
            apart, size = trainer.strategy.reduce(squares, reduce_op="mean").tolist()
            # before the first step there is no average
            result["train/ema_distance"] = (apart / size) ** 0.5 if size else 0.0
        norm = self.norm if self.norm is not None else averages_of(trainer).gradient_norm_of_step()
        if norm is not None:
            result["train/gradient_norm"] = norm.item()
        return result | {f"train/loss_t{b / TIME_BINS:.1f}": by_time[b] for b in by_time}

    def rates(self, stage: TransDiffStage, devices: int, images_per_second: float) -> dict[str, float]:
        """Tokens per second through the blocks, and model FLOPs utilisation (MFU)."""
        rows = images_per_second / self.run.model.num_references
        cost = row_cost(self.run.model, self.run.flow.num_noise_draws, stage.head_alone)
        return {
            "throughput/tokens_per_second": rows * cost.tokens,
            "throughput/mfu": rows * cost.flops / (devices * self.peak.flops),
            "throughput/peak_tflops": self.peak.flops / 1e12,
            "throughput/peak_is_measured": float(self.peak.measured),
        }


class SaveOrigin(pl.Callback):
    """Store the origin of each checkpoint: configuration, ``inputs``, versions and ``export.json``."""

    def __init__(self, run: RunConfig, info: dict[str, Any]) -> None:
        self.run = run
        self.info = info
        self.environment = environment()
        self.inputs = rank_zero_only(inputs)(run) or {}  # read by one rank only

    def on_save_checkpoint(
        self, trainer: pl.Trainer, stage: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["run"] = to_dict(self.run)
        checkpoint["inputs"] = self.inputs
        checkpoint["environment"] = self.environment
        checkpoint["info"] = self.info


class Progress(TQDMProgressBar):
    """Lightning's progress bar over optimizer steps, with the last loss; in a log every ten seconds."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.train_progress_bar = Tqdm(disable=True)  # replaced when training starts

    def init_train_tqdm(self) -> Tqdm:
        rare = {} if sys.stderr.isatty() else {"mininterval": 10.0}
        total, done = self.trainer.max_steps, self.trainer.global_step
        shown = dict(desc=self.name, total=total, initial=done, unit="step", disable=self.is_disabled)
        return Tqdm(**shown, dynamic_ncols=True, **rare)

    def init_validation_tqdm(self) -> Tqdm:
        return Tqdm(disable=True)

    def get_metrics(self, trainer: pl.Trainer, stage: pl.LightningModule) -> dict[str, Any]:
        loss = trainer.callback_metrics.get("train/loss")
        return {} if loss is None else {"loss": f"{loss:.4f}"}

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """The run is one epoch, whose length the bar knows."""

    def on_train_batch_end(self, trainer: pl.Trainer, stage: pl.LightningModule, *_: Any) -> None:
        self.train_progress_bar.set_postfix(self.get_metrics(trainer, stage), refresh=False)
        self.train_progress_bar.update(trainer.global_step - self.train_progress_bar.n)

    def on_exception(self, trainer: pl.Trainer, stage: pl.LightningModule, exception: BaseException) -> None:
        self.train_progress_bar.close()


class SampleLog(Protocol):
    """A further receiver of the images sampled during training, beside the run folder."""

    def log_picture(self, key: str, picture: Image.Image, step: int) -> None: ...

    def log_table(
        self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None: ...


class SampleGrids(StepCallback):
    """Save labelled grids ``samples/step-*.png`` from the averaged weights, always with the same seeds.

    ``tracker`` receives the same grids and, at the last step, a table of single images. The similarity of the
    semantic features (``feature_diversity``, arXiv 2506.09482) of these classes is logged with each grid.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        class_names: Sequence[str],
        folder: Path,
        tracker: SampleLog | None,
        despite_full_disk: bool,
    ) -> None:
        self.autoencoder = autoencoder
        self.folder = folder
        self.tracker = tracker
        self.class_names = list(class_names[:10])
        self.despite_full_disk = despite_full_disk

    def after_step(self, trainer: pl.Trainer, stage: pl.LightningModule) -> None:
        if self.rhythm.due("samples"):
            with self.rhythm.resting():
                self.draw(trainer, stage, trainer.global_step)

    def draw(self, trainer: pl.Trainer, stage: pl.LightningModule, step: int) -> None:
        assert isinstance(stage, TransDiffStage)
        if stage.model.condition_shape is not None:
            return  # grids show classes
        classes = range(len(self.class_names))
        labels = torch.tensor([c for c in classes for _ in range(PER_CLASS)])
        model = stage.averaged_model()  # all ranks take part
        if not trainer.is_global_zero:
            return
        generator = Generator(model, self.autoencoder.to(stage.device), stage.run, self.class_names)
        images = generator.images(labels, list(range(len(labels))))[:, -1]
        if model.has_features:
            similarity = token_similarity(generator.features(list(classes))).mean().item()
            log_now(trainer, {"val/feature_diversity": similarity})
        picture = grid(images, PER_CLASS, row_labels=self.class_names, title=f"step {step}")
        file = self.folder / f"step-{step:08d}.png"
        with unless_full(file, self.despite_full_disk):
            self.folder.mkdir(parents=True, exist_ok=True)
            save_picture(picture, file)
        if self.tracker is not None:
            self.tracker.log_picture("samples", picture, step)
            if step == trainer.max_steps:
                columns = ["class", "name", "seed", "image"]
                self.tracker.log_table("samples_table", columns, self.rows(labels, images), step)

    def rows(self, labels: Tensor, images: Tensor) -> list[list[Any]]:
        """One table row per image: class, class name, seed, picture."""
        tiles = rearrange(to_bytes(images.cpu()), "n c h w -> n h w c")
        return [
            [c, self.class_names[c], seed, as_picture(tiles[seed])] for seed, c in enumerate(labels.tolist())
        ]
