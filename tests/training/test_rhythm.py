"""The steps of a run: what is called when, in which order, and when the watchdog rests."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_transdiff.base.endings import Preempted
from lit_transdiff.training.callbacks import CALLBACKS
from lit_transdiff.training.checkpointing import Checkpoints
from lit_transdiff.training.preemption import PATIENCE, StopRequest
from lit_transdiff.training.rhythm import Rhythm, StepCallback
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_end",
    "on_train_end",
)


class Recorder(StepCallback):
    """Records each call with its step."""

    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def before_pass(self, trainer: Any, stage: Any, batch: Any) -> None:
        self.told.append(f"{self.name} pass")

    def between_steps(self, trainer: Any, stage: Any) -> None:
        self.told.append(f"{self.name} between {self.rhythm.step}{' saves' if self.rhythm.saves else ''}")

    def finish(self, trainer: Any) -> None:
        self.told.append(f"{self.name} finishes")

    def after_pass(self, trainer: Any, stage: Any, outputs: Any, batch: Any) -> None:
        self.told.append(f"{self.name} passed {self.rhythm.step}")

    def after_step(self, trainer: Any, stage: Any) -> None:
        events = [event for event in self.rhythm.times if self.rhythm.due(event)]
        self.told.append(f"{self.name} over {self.rhythm.step} {' '.join(events)}".strip())


def play(rhythm: Rhythm, passes: int, accumulation: int) -> SimpleNamespace:
    """Call the hooks as a Trainer does."""
    one_rank = SimpleNamespace(reduce=lambda number, reduce_op: number)
    trainer: Any = SimpleNamespace(
        global_step=0, world_size=1, strategy=one_rank, accumulate_grad_batches=accumulation
    )
    stage: Any = SimpleNamespace(device="cpu")
    rhythm.on_train_start(trainer, stage)
    for i in range(passes):
        rhythm.on_train_batch_start(trainer, stage, None, i)  # type: ignore[arg-type]
        trainer.global_step += (i + 1) % accumulation == 0
        rhythm.on_train_batch_end(trainer, stage, None, None, i)  # type: ignore[arg-type]
    return trainer


def test_passes_become_steps_in_the_stated_order(tmp_path: Path) -> None:
    training = {"max_steps": 3, "log_every": 2, "checkpoint_every": 2, "sample_every": 0, "validate_every": 1}
    told: list[str] = []
    rhythm = Rhythm(small_run(tmp_path, training=training), [Recorder("a", told), Recorder("b", told)])
    trainer = play(rhythm, passes=6, accumulation=2)
    rhythm.on_train_end(trainer, None)  # type: ignore[arg-type]
    due = {1: "validation", 2: "numbers checkpoint validation", 3: "checkpoint validation samples"}
    expected = []
    for step in (1, 2, 3):
        saves = " saves" if step - 1 == 2 else ""
        expected += ["a pass", "b pass", f"a between {step - 1}{saves}", f"b between {step - 1}{saves}"]
        expected += [
            f"a passed {step}",
            f"b passed {step}",
            "a pass",
            "b pass",
            f"a passed {step}",
            f"b passed {step}",
        ]
        expected += [f"a over {step} {due[step]}", f"b over {step} {due[step]}"]
    assert told == [*expected, "a between 3 saves", "b between 3 saves", "a finishes", "b finishes"]


def test_a_run_that_is_asked_to_stop_saves_between_two_steps_and_leaves(tmp_path: Path) -> None:
    told: list[str] = []
    request = StopRequest()
    rhythm = Rhythm(small_run(tmp_path, training={"checkpoint_every": 9}), [Recorder("a", told)], request)
    trainer = play(rhythm, passes=3, accumulation=2)  # in the middle of the second step
    request.received = "SIGTERM"
    rhythm.on_train_batch_start(trainer, None, None, 3)  # type: ignore[arg-type]
    assert not rhythm.leaving and not rhythm.saves
    trainer.global_step += 1
    rhythm.on_train_batch_end(trainer, None, None, None, 3)  # type: ignore[arg-type]
    with pytest.raises(Preempted, match=r"SIGTERM.* step 2 is complete"):
        rhythm.on_train_batch_start(trainer, SimpleNamespace(device="cpu"), None, 4)  # type: ignore[arg-type]
    assert told[-2:] == ["a between 2 saves", "a finishes"]


def test_a_step_of_many_passes_that_does_not_end_in_time_is_broken_off(tmp_path: Path) -> None:
    told: list[str] = []
    request = StopRequest()
    rhythm = Rhythm(small_run(tmp_path), [Recorder("a", told)], request)
    trainer = play(rhythm, passes=3, accumulation=2)
    request.received, request.since = "SIGTERM", time.monotonic() - PATIENCE - 1
    with pytest.raises(Preempted, match="step 2 did not end"):
        rhythm.on_train_batch_start(trainer, None, None, 3)  # type: ignore[arg-type]
    assert told[-2:] == ["a pass", "a finishes"]  # the step is not saved


def test_the_watchdog_rests_inside_and_goes_on_with_what_it_watched(tmp_path: Path) -> None:
    rhythm = Rhythm(small_run(tmp_path), [])
    rhythm.watchdog.watch("finishing", 3)
    with rhythm.resting():
        assert rhythm.watchdog.busy_with is None
        with rhythm.resting():
            pass
        assert rhythm.watchdog.busy_with is None
    assert rhythm.watchdog.busy_with == ("finishing", 3)


class Patient(pl.Callback):
    """The user's own: what the watchdog watches in each of its hooks."""

    def __init__(self, told: dict[str, set[Any]]) -> None:
        for hook in HOOKS:
            setattr(self, hook, self.recorder(hook, told))

    def recorder(self, hook: str, told: dict[str, set[Any]]) -> Any:
        def record(trainer: Any, *arguments: Any, **named: Any) -> None:
            told.setdefault(f"{type(self).__name__} {hook}", set()).add(trainer.callbacks[-1].busy_with)

        return record


class PatientSaver(Patient, ModelCheckpoint):
    """One that Lightning puts behind all others."""

    def __init__(self, told: dict[str, set[Any]]) -> None:
        ModelCheckpoint.__init__(self)
        Patient.__init__(self, told)


class PatientByName(Patient):
    """One that a recipe names."""


def test_the_watchdog_rests_in_the_users_own_callbacks_and_in_every_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, set[Any]] = {}
    monkeypatch.setitem(CALLBACKS, "patient", lambda run: PatientByName(told))
    save = Checkpoints.save

    def watched_save(self: Checkpoints, trainer: Any) -> None:
        told.setdefault("save", set()).add(trainer.callbacks[-1].busy_with)
        save(self, trainer)

    monkeypatch.setattr(Checkpoints, "save", watched_save)
    training = {"max_steps": 3, "checkpoint_every": 2, "validate_every": 2, "callbacks": ["patient"]}
    train(
        small_run(tmp_path, training=training),
        lambda text: None,
        callbacks=[PatientSaver(told), Patient(told)],
    )
    kinds = [kind.__name__ for kind in (Patient, PatientSaver, PatientByName)]
    assert told == {"save": {None}} | {f"{kind} {hook}": {None} for kind in kinds for hook in HOOKS}
