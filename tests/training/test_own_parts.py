"""The user's own data module, stage, callbacks and loggers in our trainer."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import Logger
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_transdiff import Batch, RunConfig, load_generator, train
from lit_transdiff.base.endings import EXIT_STALLED
from lit_transdiff.stages.ar_pretrain import ARPretrain
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.watchdog import Watchdog
from tests.helpers.small import small_run

STEPS, ROWS = 6, 8


class Stripes(pl.LightningDataModule):
    """Images of two classes, made of their position alone; ``broken`` is the step whose images are not
    numbers.
    """

    def __init__(self, broken: int | None = None, batches: int = STEPS) -> None:
        super().__init__()
        self.broken, self.batches = broken, batches

    def batch(self, step: int) -> Batch:
        positions = torch.arange(step * ROWS, (step + 1) * ROWS)
        labels = positions % 2
        images = torch.linspace(-1, 1, 32).repeat(ROWS, 1, 1, 32, 1)
        images = torch.where(labels.view(-1, 1, 1, 1, 1) == 1, images, images.mT).clone()
        if step == self.broken:
            images[0, 0, 0, 0, 0] = float("nan")
        return Batch(images, labels, positions[:, None], positions)

    def train_dataloader(self) -> DataLoader:
        assert self.trainer is not None
        first = self.trainer.global_step
        return DataLoader([self.batch(step) for step in range(first, first + self.batches)], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.batch(0)], batch_size=None)


class Counting(pl.Callback):
    def __init__(self) -> None:
        self.steps = 0

    def on_train_batch_end(self, *args: Any) -> None:
        self.steps += 1

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Remembering(Logger):
    name, version = "mine", "0"

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, dict[int, float]] = {}
        self.settings: dict[str, Any] = {}

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.settings = dict(params)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.values.setdefault(name, {})[step or 0] = value


class Brighter(ARPretrain):
    """A stage of the family with an objective of its own."""

    def objective(self, batch: Batch, normal: Any) -> tuple[Tensor, Tensor]:
        rows, t = super().objective(batch, normal)
        return 2 * rows, t


class Mean(pl.LightningModule):
    """A stage that has nothing to do with the family: the mean image of each class."""

    def __init__(self) -> None:
        super().__init__()
        self.means = nn.Parameter(torch.zeros(2, 1, 32, 32))

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return (batch.values[:, 0] - self.means[batch.labels]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=100.0)


def silent(text: str) -> None: ...


def own_run(folder: Path, **changes: Any) -> RunConfig:
    changes.setdefault(
        "training", {"max_steps": STEPS, "validate_every": 3, "log_every": 1, "checkpoint_every": 3}
    )
    return small_run(
        folder, **{"data": {"train": "", "evaluation": None}, "model": {"num_classes": 2}, **changes}
    )


def test_own_data_callback_and_logger(tmp_path: Path) -> None:
    """They see every step; the run is exported, sampled from, and continued exactly."""
    counting, logger = Counting(), Remembering()
    whole = train(own_run(tmp_path / "whole"), silent, callbacks=[counting], loggers=[logger], data=Stripes())
    assert whole.step == STEPS == counting.steps
    assert [*logger.values["train/loss"]] == [1, 2, 3, 4, 5, 6] and [*logger.values["val/loss"]] == [3, 6]
    assert logger.settings["model"]["num_classes"] == 2
    generator = load_generator(whole.folder)
    assert generator.class_names == ["0", "1"] and generator.images([1], seeds=[0]).shape == (1, 1, 1, 32, 32)

    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == 4:
                raise KeyError("pulled the plug")

    again = Counting()
    with pytest.raises(KeyError):
        train(own_run(tmp_path / "part"), silent, callbacks=[again, Stop()], data=Stripes())
    part = train(own_run(tmp_path / "part"), silent, callbacks=[again], data=Stripes())
    assert again.steps == STEPS
    one, other = (load_file(folder / "export/model.safetensors") for folder in (whole.folder, part.folder))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_bar_is_one_line_of_the_log_or_the_users_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(own_run(tmp_path / "ours"), silent, data=Stripes())
    shown = [
        text for text in re.split(r"[\r\n]+", capsys.readouterr().err) if "step/s" in text or "s/step" in text
    ]
    # begin, validations, end
    assert len(shown) <= 6 and re.search(rf"100%.* {STEPS}/{STEPS} .*loss=\d\.\d{{4}}", shown[-1])
    train(own_run(tmp_path / "own"), silent, callbacks=[TQDMProgressBar()], data=Stripes())
    both = capsys.readouterr()
    assert "Epoch 0: 100%" in both.out and "/step" not in both.err and "step/s" not in both.err


def test_short_epochs_of_own_data(tmp_path: Path) -> None:
    """A loader that ends before the run does is begun again."""
    counting = Counting()
    assert (
        train(own_run(tmp_path), silent, callbacks=[counting], data=Stripes(batches=2)).step
        == STEPS
        == counting.steps
    )


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_a_loss_that_is_no_number_is_said_so(
    tmp_path: Path, policy: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Once ended in an AttributeError: the data module has no names for its samples."""
    run = own_run(tmp_path, safety={"on_bad_step": policy})
    if policy == "stop":
        with pytest.raises(
            NonFiniteLoss, match=r"the loss is nan at step 3 .*Samples of that batch: unknown\."
        ):
            train(run, silent, data=Stripes(broken=2))
    else:
        assert train(run, silent, data=Stripes(broken=2)).step == STEPS
        assert "bad step 3" in caplog.text and "Samples of that batch: unknown." in caplog.text


def test_names_that_fail_do_not_hide_the_message(tmp_path: Path) -> None:
    class Failing(Stripes):
        class_names = ("left", "right")

        def keys(self, samples: Tensor) -> list[str]:
            raise OSError("no index today")

    with pytest.raises(NonFiniteLoss, match=r"the loss is nan at step 2 .*unknown"):
        train(own_run(tmp_path), silent, data=Failing(broken=1))


def test_an_own_stage_of_the_family(tmp_path: Path) -> None:
    plain, logger = Remembering(), Remembering()
    train(own_run(tmp_path / "plain"), silent, data=Stripes(), loggers=[plain])
    run = own_run(tmp_path / "own")
    pl.seed_everything(run.seed, verbose=False)
    result = train(run, silent, data=Stripes(), stage=Brighter(run), loggers=[logger])
    assert logger.values["train/loss"][1] == pytest.approx(2 * plain.values["train/loss"][1], rel=1e-6)
    assert load_generator(result.folder).images([0], seeds=[0]).isfinite().all()
    other = own_run(tmp_path / "own", optimizer={"lr": 0.5}, name="other")
    with pytest.raises(ValueError, match="stage: its run: got 'small'; allowed: the run that is trained"):
        train(other, silent, data=Stripes(), stage=Brighter(run))


def test_an_own_stage_of_another_kind(tmp_path: Path) -> None:
    run, stage, data = own_run(tmp_path), Mean(), Stripes()
    result = train(run, silent, data=data, stage=stage)
    assert result.step == STEPS and result.metrics["train/loss"] < 0.3
    assert torch.equal(load_file(result.folder / "export/model.safetensors")["means"], stage.means.detach())
    assert train(run, silent, data=data, stage=Mean()).step == STEPS


def test_lightning_s_callbacks(tmp_path: Path) -> None:
    """An early stop is a result, exported; the same call goes on.

    ModelCheckpoint writes beside the run's own checkpoints.
    """
    said: list[str] = []
    stop = EarlyStopping("val/loss", patience=0, min_delta=100.0)
    saves = ModelCheckpoint(tmp_path / "mine", every_n_train_steps=2)
    run = own_run(tmp_path, training={"max_steps": 8, "validate_every": 2, "checkpoint_every": 2})
    result = train(run, said.append, callbacks=[stop, saves], data=Stripes(batches=8))
    assert result.step == 4 and "a callback ended training at step 4 of 8" in said[-1]
    assert (result.folder / "export/model.safetensors").is_file()
    (saved,) = (tmp_path / "mine").glob("*.ckpt")
    assert len(torch.load(saved, weights_only=True)["state_dict"]) == len(Brighter(run).state_dict())
    assert train(run, silent, data=Stripes(batches=8)).step == 8


def test_a_watchdog_whose_message_fails_still_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once its thread died of the message, and the stalled job ran on."""
    watchdog, ended = Watchdog(0.02, Path()), []

    def leave(code: int) -> None:
        ended.append(code)
        watchdog.stop.set()

    monkeypatch.setattr(os, "_exit", leave)
    watchdog.watch("computing", 3)
    with pytest.raises(AttributeError):  # of a trainer that cannot even be described
        watchdog.look(object())  # type: ignore[arg-type]
    assert ended == [EXIT_STALLED]


def test_a_stall_with_own_data_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = SimpleNamespace(datamodule=Stripes(), accumulate_grad_batches=1, global_rank=0)
    text = Watchdog(1.0, Path()).describe(trainer, "stalled for 1 s", "computing", 3)  # type: ignore[arg-type]
    assert "stalled for 1 s while computing in step 4. Samples of that batch: unknown." in text
