"""Steps that go wrong are named, skipped or undone, up to a limit; a skipped step leaves no trace in weights
and averages.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.base.files import sealed
from lit_transdiff.training.callbacks import NonFiniteLoss
from lit_transdiff.training.guard import steps_in
from lit_transdiff.training.trainer import train
from tests.helpers.bad_steps import spoil
from tests.helpers.small import small_run

STEPS = {"max_steps": 30, "checkpoint_every": 4, "log_every": 5}
LONGER = {**STEPS, "micro_batch_size": 4}  # two passes a step


def silent(text: str) -> None:
    pass


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "export" / "model.safetensors")


@pytest.mark.parametrize("policy", ["skip", "roll_back"])
def test_a_bad_step_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, policy: str
):
    """Steps 6 and 9 (from 1) are bad.

    Skipped or undone, what is left is the same: their batches were never used.
    """
    run = small_run(tmp_path, name="run", training=LONGER, safety={"on_bad_step": policy})
    spoil(monkeypatch, 5, 8)
    train(run, silent)
    assert all(value.isfinite().all() for value in weights(run.folder).values())
    assert (
        "bad step 6 (1 so far): the loss on rank 0 is nan" in caplog.text
        and "bad step 9 (2 so far)" in caplog.text
    )
    assert "fashion-train-0" in caplog.text
    if policy == "roll_back":
        assert steps_in(run.folder / "bad_steps.json") == {6, 9}
        monkeypatch.undo()
        other = small_run(tmp_path, name="other", training=LONGER, safety={"on_bad_step": "skip"})
        spoil(monkeypatch, 5, 8)
        train(other, silent)
        a, b = weights(run.folder), weights(other.folder)
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_spike_is_a_bad_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = small_run(tmp_path, training=STEPS, safety={"on_bad_step": "skip", "spike_factor": 3.0})
    spoil(monkeypatch, 24, factor=10.0)
    train(run, silent)
    assert "bad step 25 (1 so far)" in caplog.text and "median before" in caplog.text
    assert "(2 so far)" not in caplog.text


def test_too_many_bad_steps_stop_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = small_run(tmp_path, training=STEPS, safety={"on_bad_step": "skip", "max_bad_steps": 2})
    spoil(monkeypatch, 5, 6, 7, 8)
    with pytest.raises(NonFiniteLoss, match=r"bad step 8 \(3 so far\)"):
        train(run, silent)


def test_the_count_of_bad_steps_outlives_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = {"safety": {"on_bad_step": "skip", "max_bad_steps": 1}}
    spoil(monkeypatch, 1, 9)
    train(small_run(tmp_path, training={**STEPS, "max_steps": 8}, **settings), silent)
    with pytest.raises(NonFiniteLoss, match=r"bad step 10 \(2 so far\)"):
        train(small_run(tmp_path, training=STEPS, **settings), silent)


def test_a_damaged_list_of_steps_is_named(tmp_path):
    file = tmp_path / "bad_steps.json"
    file.write_text("[3, 5]")  # of an earlier version
    assert steps_in(file) == {3, 5}
    sound = sealed({"steps": [6, 9]})
    for content in (sound.replace(b"6", b"7", 1), sound[:-9], b'{"a": 1}', b'["6"]'):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"bad_steps\.json"):
            steps_in(file)
