"""The stages in Lightning's own Trainer, with its own callbacks, loggers, checkpoints and strategies."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lit_transdiff.checkpoints.averages import EMA
from lit_transdiff.config.loading import run_from, to_dict
from lit_transdiff.distributed.strategies import FSDP, Single
from lit_transdiff.distributed.zero import ZeRO
from lit_transdiff.models.autoencoder import Autoencoder
from lit_transdiff.stages.adamw import AveragedAdamW
from lit_transdiff.stages.ar_pretrain import ARPretrain
from lit_transdiff.stages.holders import averages_of
from lit_transdiff.stages.mrar_finetune import MRARFinetune
from lit_transdiff.training.build import Parts, build
from tests.helpers.small import STEADY, small_run

QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}
pytestmark = pytest.mark.filterwarnings("ignore")


def parts_of(folder: Path, steps: int, **changes: Any) -> Parts:
    changes["training"] = {"max_steps": steps, "num_validation_samples": 20, **changes.get("training", {})}
    pl.seed_everything(0, verbose=False)
    return build(small_run(folder, **changes))


def fitted(parts: Parts, ckpt_path: Path | None = None, **settings: Any) -> pl.Trainer:
    trainer = pl.Trainer(**{**QUIET, "max_steps": parts.run.training.max_steps, **settings})
    trainer.fit(parts.stage, datamodule=parts.data, ckpt_path=ckpt_path)
    return trainer


def saving(folder: Path, every: int) -> dict[str, Any]:
    callback = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    return {"callbacks": [callback], "enable_checkpointing": True}


def assert_same(a: pl.Trainer, b: pl.Trainer) -> None:
    """The same weights, optimizer states, averages and validation loss, to the bit."""
    assert a.global_step == b.global_step
    for mine, other in zip(a.lightning_module.parameters(), b.lightning_module.parameters(), strict=True):
        assert torch.equal(mine, other)
        states, others = a.optimizers[0].state.get(mine, {}), b.optimizers[0].state.get(other, {})
        assert states.keys() == others.keys() and all(
            torch.equal(states[name], others[name]) for name in states
        )
        assert {state.dtype for state in (states.get(EMA), others.get(EMA)) if state is not None} <= {
            torch.float32
        }
    assert a.callback_metrics["val/loss"] == b.callback_metrics["val/loss"]


def test_ten_lines_train_validate_log_and_save(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 20)
    best = ModelCheckpoint(tmp_path / "saved", monitor="val/loss")
    trainer = pl.Trainer(
        max_steps=20,
        callbacks=[best, LearningRateMonitor()],
        logger=CSVLogger(tmp_path),
        **{
            k: v
            for k, v in QUIET.items()
            if k.startswith("enable_p") or k in ("enable_model_summary", "accelerator")
        },
    )
    trainer.fit(parts.stage, datamodule=parts.data)

    rows = list(csv.DictReader(next(tmp_path.rglob("metrics.csv")).open()))
    logged = {name: float(row[name]) for row in rows for name in ("train/loss", "val/loss") if row.get(name)}
    assert logged == {
        name: pytest.approx(float(trainer.callback_metrics[name])) for name in ("train/loss", "val/loss")
    }
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["state_dict"].keys() == parts.stage.state_dict().keys()
    assert len(saved["optimizer_states"][0]["state"]) == len(list(parts.stage.parameters()))
    assert not any(name.startswith("autoencoder") for name in saved["state_dict"])

    again = ARPretrain.load_from_checkpoint(best.best_model_path)
    assert again.run == parts.run and type(again.hparams["model"]) is dict
    assert run_from(dict(again.hparams)) == parts.run and dict(parts.stage.hparams) == to_dict(parts.run)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), parts.stage.parameters(), strict=True))


def test_validation_is_of_the_averages(tmp_path: Path) -> None:
    """Against the same loss of a model that holds them; the weights are afterwards what they were."""
    parts = parts_of(tmp_path, 4)
    trainer = fitted(parts, **saving(tmp_path, 4))
    weights = {name: value.clone() for name, value in parts.stage.state_dict().items()}
    other = parts_of(tmp_path, 4)
    other.stage.load_state_dict(averages_of(trainer).averaged_state())
    (expected,) = pl.Trainer(**QUIET).validate(other.stage, datamodule=other.data, verbose=False)
    (untrained,) = pl.Trainer(**QUIET).validate(
        parts_of(tmp_path, 4).stage, datamodule=other.data, verbose=False
    )
    assert float(trainer.callback_metrics["val/loss"]) == pytest.approx(expected["val/loss"], rel=1e-6)
    assert expected["val/loss"] != pytest.approx(untrained["val/loss"], rel=1e-3)
    assert all(torch.equal(value, weights[name]) for name, value in parts.stage.state_dict().items())
    fresh = parts_of(tmp_path, 4)
    (found,) = pl.Trainer(**QUIET).validate(
        fresh.stage, datamodule=fresh.data, verbose=False, ckpt_path=tmp_path / "step=4.ckpt"
    )
    assert found == expected


@pytest.mark.parametrize("changes", [{}, {"training": {"precision": "bf16-true"}}], ids=["fp32", "bf16-true"])
def test_resumed_is_uninterrupted(tmp_path: Path, changes: dict[str, Any]) -> None:
    precision = {"precision": "bf16-mixed"} if changes else {}
    whole = fitted(parts_of(tmp_path, 7, **changes), **saving(tmp_path, 3), **precision)
    again = fitted(parts_of(tmp_path, 7, **changes), tmp_path / "step=3.ckpt", **precision)
    assert_same(whole, again)


def test_a_trainer_that_stopped_early_is_continued_by_a_longer_one(tmp_path: Path) -> None:
    whole = fitted(parts_of(tmp_path, 6))
    first = fitted(parts_of(tmp_path, 6), max_steps=4, **saving(tmp_path, 4))
    assert "val/loss" in first.callback_metrics
    assert_same(whole, fitted(parts_of(tmp_path, 6), tmp_path / "step=4.ckpt"))


def test_our_single_strategy_saves_and_loads_what_lightning_s_does(tmp_path: Path) -> None:
    ours = {"strategy": Single(torch.device("cpu"))}
    whole = fitted(parts_of(tmp_path, 6), **saving(tmp_path, 3), **ours)
    saved = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    assert (
        len(saved["state_dict"])
        == len(saved["optimizer_states"][0]["state"])
        == len(whole.lightning_module.state_dict())
    )
    for strategy in ({"strategy": Single(torch.device("cpu"))}, {}):
        assert_same(whole, fitted(parts_of(tmp_path, 6), tmp_path / "step=3.ckpt", **strategy))


@pytest.mark.parametrize("kind", [FSDP, ZeRO])
def test_strategies_that_hold_parts_refuse_to_write_without_them(kind: type) -> None:
    strategy = kind.__new__(kind)
    for ask in (strategy.lightning_module_state_dict, lambda: strategy.optimizer_state(SimpleNamespace())):
        with pytest.raises(ValueError, match=rf"strategy {kind.__name__} holds tensors in parts.*allowed: "):
            ask()


@pytest.mark.parametrize("kind", [DeepSpeedStrategy, FSDPStrategy])
def test_strategies_that_hide_the_averages_are_refused(kind: type) -> None:
    with pytest.raises(ValueError, match=rf"Trainer\(strategy\): got {kind.__name__}.*allowed: "):
        averages_of(SimpleNamespace(strategy=kind.__new__(kind)))  # type: ignore[arg-type]


class Seen(pl.Callback):
    """The samples of each training batch."""

    def __init__(self) -> None:
        self.samples: list[list[int]] = []

    def on_train_batch_start(
        self, trainer: pl.Trainer, stage: pl.LightningModule, batch: Any, i: int
    ) -> None:
        self.samples.append(batch.samples.flatten().tolist())


def test_fast_dev_run_overfit_batches_and_limits(tmp_path: Path) -> None:
    parts = parts_of(tmp_path, 6)
    assert fitted(parts, fast_dev_run=True).global_step == 1
    seen = Seen()
    trainer = fitted(parts_of(tmp_path, 6), max_steps=-1, max_epochs=3, overfit_batches=2, callbacks=[seen])
    assert trainer.global_step == 6 and seen.samples[:2] == seen.samples[2:4] == seen.samples[4:]
    assert seen.samples[0] != seen.samples[1]
    seen = Seen()
    trainer = fitted(
        parts_of(tmp_path, 4),
        max_steps=-1,
        max_epochs=2,
        limit_train_batches=2,
        limit_val_batches=1,
        callbacks=[seen],
    )
    assert trainer.global_step == 4 and len({tuple(samples) for samples in seen.samples}) == 4
    assert "val/loss" not in fitted(parts_of(tmp_path, 2), limit_val_batches=0).callback_metrics


def test_early_stopping(tmp_path: Path) -> None:
    stop = EarlyStopping("val/loss", patience=0, min_delta=100.0)
    assert fitted(parts_of(tmp_path, 8), callbacks=[stop], val_check_interval=2).global_step == 4


def test_accumulated_passes_are_one_batch(tmp_path: Path) -> None:
    """In the Trainer as in the run; dropout alone draws other masks."""
    plain = {
        "model": {**small_run(tmp_path).model.__dict__, "attention_dropout": 0.0, "projection_dropout": 0.0}
    }
    whole = fitted(parts_of(tmp_path, 3, **plain))
    cut = fitted(parts_of(tmp_path, 3, **plain), accumulate_grad_batches=2)
    assert cut.global_step == 3
    assert float(cut.callback_metrics["val/loss"]) == pytest.approx(
        float(whole.callback_metrics["val/loss"]), rel=1e-5
    )
    with pytest.raises(
        ValueError, match=r"Trainer\(accumulate_grad_batches\): got 3; allowed: a divisor of .*=8"
    ):
        fitted(parts_of(tmp_path, 3), accumulate_grad_batches=3)


@pytest.mark.parametrize("name", ["autoencoder", "classifier"])
def test_preparatory_stages_are_at_home_too(tmp_path: Path, name: str) -> None:
    small = {"stage": name, "autoencoder_training": {"block_channels": [8, 8], "latent_channels": 2}}
    whole = fitted(parts_of(tmp_path, 4, **small), limit_val_batches=1, **saving(tmp_path, 2))
    again = fitted(parts_of(tmp_path, 4, **small), tmp_path / "step=2.ckpt", limit_val_batches=1)
    assert {"train/loss"} < whole.callback_metrics.keys()
    assert whole.callback_metrics == again.callback_metrics
    (found,) = whole.validate(whole.lightning_module, datamodule=whole.datamodule, verbose=False)  # type: ignore[attr-defined]
    assert (
        found
        == {name: float(value) for name, value in whole.callback_metrics.items() if name.startswith("val/")}
        != {}
    )
    loaded = type(whole.lightning_module).load_from_checkpoint(tmp_path / "step=4.ckpt")
    assert loaded.run == whole.lightning_module.run


class Halving(Autoencoder):
    """Images [.., 1, 32, 32] -> moments of latents [.., 1, 4, 4], with a parameter; counts how often it moves
    and encodes.
    """

    def __init__(self) -> None:
        super().__init__(torch.zeros(1), torch.ones(1), downsampling=8)
        self.scale = torch.nn.Parameter(torch.tensor(2.0))
        self.moves = self.encoded = 0

    def to(self, *args: Any, **kwargs: Any) -> Any:
        self.moves += 1
        return super().to(*args, **kwargs)

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        self.encoded += 1
        mean = self.scale * (
            0.5 + torch.nn.functional.avg_pool2d(images.flatten(0, 1), 8).unflatten(0, images.shape[:2])
        )
        return torch.cat([mean, torch.full_like(mean, -30.0)], dim=-3)

    def reconstruct(self, latents: torch.Tensor) -> torch.Tensor:
        return latents


def test_images_are_encoded_once_a_batch_by_a_network_that_stays_where_it_is(tmp_path: Path) -> None:
    shape = {"latent_channels": 1, "latent_size": 4, "patch_size": 1, "num_references": 4}
    run = small_run(
        tmp_path, stage="mrar_finetune", model={**shape, "num_classes": 10}, training={"max_steps": 4}
    )
    data = build(
        small_run(tmp_path, stage="mrar_finetune", model={"num_references": 4}, training={"max_steps": 4})
    ).data
    autoencoder = Halving().freeze()
    stage = MRARFinetune(run, autoencoder)
    trainer = pl.Trainer(**QUIET, max_steps=4, limit_val_batches=0)
    trainer.fit(stage, datamodule=data)
    assert autoencoder.encoded == 4 and autoencoder.moves == 1
    assert not any(p is autoencoder.scale for p in stage.parameters()) and autoencoder.scale == 2.0

    wrong = MRARFinetune(
        small_run(tmp_path, stage="mrar_finetune", model={**shape, "latent_size": 8}), autoencoder
    )
    with pytest.raises(
        ValueError, match=r"values of a batch: got \(\d, 4, 2, 4, 4\); allowed: .*\(2, 8, 8\) \(moments\)"
    ):
        pl.Trainer(**QUIET, max_steps=4).fit(wrong, datamodule=data)


CLIP = 0.05  # below the norm of every step of small runs


@pytest.fixture
def norms(monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    """Let the plain form of the kernels do the steps, as a stand-in; their maximal norms."""
    adamw = pytest.importorskip("lit_transdiff.kernels.adamw")
    from tests.helpers.plain_kernels import plain_adamw

    found: list[float | None] = []

    def step(groups, settings, shares, max_norm):
        found.append(max_norm)
        plain_adamw(groups, settings, shares, max_norm)

    monkeypatch.setattr(adamw, "Tables", lambda groups: groups)
    monkeypatch.setattr(adamw, "adamw_step", step)
    monkeypatch.setattr("lit_transdiff.stages.adamw.adamw_works", lambda device: True)
    return found


def clipped_run(
    folder: Path, steps: int, kernels: bool, monkeypatch: pytest.MonkeyPatch, **settings
) -> pl.Trainer:
    monkeypatch.setattr(AveragedAdamW, "kernels", kernels)
    optimizer = {**STEADY, "more_ema_decays": [0.5]}
    return fitted(parts_of(folder, steps, optimizer=optimizer), gradient_clip_val=CLIP, **settings)


def test_clipping_within_the_step_gives_the_same_run_which_goes_on_from_a_checkpoint(
    tmp_path: Path, norms: list[float | None], monkeypatch: pytest.MonkeyPatch
):
    plain = clipped_run(tmp_path / "plain", 4, False, monkeypatch)
    assert not norms
    mine = clipped_run(tmp_path / "mine", 4, True, monkeypatch, **saving(tmp_path / "of_mine", 2))
    assert norms == [CLIP] * 3  # the first step, in which the states begin, is torch's
    again = clipped_run(
        tmp_path / "again", 4, True, monkeypatch, ckpt_path=tmp_path / "of_mine" / "step=2.ckpt"
    )
    for other, exact in ((again, True), (plain, False)):
        for p, q in zip(mine.lightning_module.parameters(), other.lightning_module.parameters(), strict=True):
            states, others = mine.optimizers[0].state[p], other.optimizers[0].state[q]
            tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-4, "atol": 1e-6}
            torch.testing.assert_close(p, q, **tolerance)
            torch.testing.assert_close(dict(states), dict(others), **tolerance)
