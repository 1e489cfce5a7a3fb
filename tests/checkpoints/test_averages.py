"""Power-function averages whose length is chosen after training: against averages that were kept from the
start.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.averages import (
    combination,
    constant_state,
    power_decay,
    power_of,
    power_state,
    width_of,
)
from lit_transdiff.checkpoints.export import combined, read_export
from lit_transdiff.checkpoints.format import complete_checkpoints
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

WIDTHS = (0.05, 0.1)


def test_exponents_are_those_of_the_paper():
    """arXiv 2312.02696, table 3: EMA lengths of 5% and 10% are gamma = 16.97 and 6.94."""
    assert [round(power_of(width), 2) for width in WIDTHS] == [16.97, 6.94]
    for width in (0.01, 0.07, 0.25):
        power = power_of(width)
        assert (power + 1) ** 0.5 / (power + 2) / (power + 3) ** 0.5 == pytest.approx(width, rel=1e-9)


def test_names_give_back_their_width():
    assert [width_of(power_state(width)) for width in WIDTHS] == list(WIDTHS)
    assert width_of(constant_state(0.9999)) is width_of("ema") is width_of("ema_power_wide") is None
    assert constant_state(0.9999999) != constant_state(0.99999951)


@pytest.mark.numeric
@pytest.mark.parametrize("width", [0.05, 0.07, 0.1, 0.15])
def test_snapshots_of_two_averages_give_a_third(width: float):
    """Of a smooth path of weights with noise on it."""
    rng, every, updates = np.random.default_rng(0), 50, 1000
    path = (
        np.sin(np.arange(1, updates + 1)[:, None] / np.array([150, 400, 900]))
        + rng.normal(size=(updates, 3)) * 0.3
    )
    kept = {w: np.zeros(3) for w in {*WIDTHS, width}}
    values, snapshots = [], []
    for update in range(1, updates + 1):
        for w in kept:
            kept[w] = path[update - 1] + power_decay(update, w) * (kept[w] - path[update - 1])
        if update % every == 0:
            snapshots += [(update, w) for w in WIDTHS]
            values += [kept[w] for w in WIDTHS]
    factors, distance = combination(snapshots, updates, width)
    assert distance < 0.02 and (distance < 1e-4) == (width in WIDTHS)
    np.testing.assert_allclose(
        factors @ np.array(values), kept[width], atol=5e-3 if width not in WIDTHS else 1e-6
    )


def test_a_width_is_chosen_after_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    training = {"max_steps": 100, "checkpoint_every": 10, "global_batch_size": 2}
    shallow = {"encoder_blocks": 1, "decoder_blocks": 1}
    run = small_run(
        tmp_path,
        model=shallow,
        training=training,
        checkpoint={"keep_last": 10},
        optimizer={"power_widths": [0.05, 0.07, 0.1]},
    )
    train(run, lambda text: None)
    checkpoints = [checkpoint.index() for checkpoint in complete_checkpoints(run.folder / "checkpoints")]
    kept, shorter, longer = (checkpoints[-1].weights(power_state(width)) for width in (0.07, 0.05, 0.1))
    without = [
        replace(c, slices={key: v for key, v in c.slices.items() if key[1] != power_state(0.07)})
        for c in checkpoints
    ]
    found, distance = combined(without, 0.07)
    away, *others = (
        torch.cat([(x[name] - kept[name]).flatten() for name in kept]).norm()
        for x in (found, shorter, longer)
    )
    # the profiles are of continuous time, and these updates are few
    assert 0 < distance < 0.02 and away < 0.2 * min(others)

    def export(width: float, folder: str = "x") -> int:
        return main(
            ["export", str(run.folder), "--average", f"ema_power_{width}", "--output", str(tmp_path / folder)]
        )

    assert export(0.06) == export(0.07, "y") == 0
    assert (
        read_export(tmp_path / "x")
        .info["weights"]
        .startswith("power-function average of width 0.06 (profile within ")
    )
    assert all(
        torch.equal(value, kept[f"model.{name}"]) for name, value in read_export(tmp_path / "y").state.items()
    )
    assert export(0.28, "z") == 2 and not (tmp_path / "z").exists()
    assert (
        "allowed: widths near [0.05, 0.07, 0.1]; more checkpoints kept reach farther"
        in capsys.readouterr().err
    )
    earlier = checkpoints[0].folder / "rank-00000.safetensors"
    earlier.write_bytes(earlier.read_bytes()[:-64] + bytes(64))
    assert export(0.06, "z") == 2 and f"{earlier} is damaged" in capsys.readouterr().err
    # which needs no other checkpoint
    assert main(["export", str(run.folder), "--output", str(tmp_path / "last")]) == 0


def test_without_such_averages_there_is_none_to_choose(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = small_run(tmp_path)
    train(run, lambda text: None)
    assert main(["export", str(run.folder), "--average", "ema_power_0.1"]) == 2
    assert "a run with optimizer.power_widths" in capsys.readouterr().err


def test_an_export_in_float16_takes_half_the_space_and_loads_as_float32(tmp_path: Path):
    run = small_run(tmp_path)
    train(run, lambda text: None)
    assert main(["export", str(run.folder), "--output", str(tmp_path / "half"), "--half"]) == 0
    whole, half = (load_generator(folder).model.state_dict() for folder in (run.folder, tmp_path / "half"))
    assert all(
        torch.equal(value.half(), half[name].half())
        for name, value in whole.items()
        if value.is_floating_point()
    )
    assert {name: value.dtype for name, value in whole.items()} == {
        name: value.dtype for name, value in half.items()
    }
    sizes = [
        (folder / "model.safetensors").stat().st_size for folder in (run.folder / "export", tmp_path / "half")
    ]
    assert sizes[1] < 0.6 * sizes[0]
