"""Checkpoints on disk: whole or not there, kept as the policy says, readable in any pieces."""

import errno
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from lit_transdiff.__main__ import main
from lit_transdiff.base.endings import CheckpointError
from lit_transdiff.base.files import NoSpaceError
from lit_transdiff.checkpoints import format as disk
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.checkpoints.format import (
    MARKER,
    Checkpoint,
    complete_checkpoints,
    finish_checkpoint,
    open_checkpoint,
    retained,
    slice_key,
    write_rank_file,
)
from lit_transdiff.checkpoints.run_folder import last_checkpoint
from lit_transdiff.config import CheckpointConfig
from lit_transdiff.training import trainer
from lit_transdiff.training.build import check_run
from lit_transdiff.training.trainer import train
from tests.helpers.small import ROOT, small_run

VALUES = torch.arange(12.0)


def write(checkpoints: Path, step: int, cuts: tuple[int, ...] = (5,), **manifest: object) -> Checkpoint:
    """A checkpoint of one parameter [3, 4], cut into one slice a rank."""
    partial = checkpoints / f"step-{step:08d}.partial"
    partial.mkdir(parents=True)
    edges = [0, *cuts, 12]
    for rank, (start, end) in enumerate(itertools.pairwise(edges)):
        step_of_adam = {slice_key("p", "step", start): torch.tensor([7.0])}
        write_rank_file(
            partial, rank, {slice_key("p", "weight", start): VALUES[start:end].clone(), **step_of_adam}
        )
    return finish_checkpoint(
        partial,
        len(edges) - 1,
        {"buffers": {}},
        {"step": step, "shapes": {"p": [3, 4]}, **manifest},
        timeout=5,
    )


def silent(text: str) -> None:
    pass


@pytest.mark.parametrize("most", [1, disk.MAX_OPEN])
def test_a_file_is_opened_once_however_much_is_read_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
):
    opened: list[Path] = []

    def counted(file: Path, framework: str) -> object:
        opened.append(file)
        return safe_open(file, framework)

    monkeypatch.setattr(disk, "safe_open", counted)
    monkeypatch.setattr(disk, "MAX_OPEN", most)
    checkpoint = open_checkpoint(write(tmp_path, 1, (5,)).folder)
    for _ in range(3):
        assert (
            torch.equal(checkpoint.tensor("p", "weight"), VALUES.view(3, 4))
            and checkpoint.scalar("p", "step") == 7
        )
    assert len(opened) == 2 or most == 1
    assert len(checkpoint.contents) <= most


@pytest.mark.parametrize("cuts", [(), (5,), (1, 6, 7)])
def test_any_part_is_read_from_any_cut(tmp_path: Path, cuts: tuple[int, ...]):
    checkpoint = open_checkpoint(write(tmp_path, 1, cuts).folder)
    assert torch.equal(checkpoint.tensor("p", "weight"), VALUES.view(3, 4))
    for start in range(12):
        for length in range(12 - start):
            assert torch.equal(checkpoint.read("p", "weight", start, length), VALUES[start : start + length])
    assert checkpoint.scalar("p", "step") == 7


def test_missing_elements_are_named(tmp_path: Path):
    checkpoint = write(tmp_path, 1, (5,))
    (checkpoint.folder / "rank-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"p: 7 of 12 elements of 'weight' are missing"):
        checkpoint.index().read("p", "weight")
    checkpoint.manifest["shapes"] = {"p": [10**6, 10**9]}  # refused before memory is taken
    with pytest.raises(ValueError, match=r"p: 9{12}\d+ of 10{15} elements of 'weight' are missing"):
        checkpoint.index().read("p", "weight")
    with pytest.raises(FileNotFoundError, match="is not a complete checkpoint"):
        open_checkpoint(checkpoint.folder)


@pytest.mark.parametrize("damage", ["no marker", "shorter file", "lost file", "other name"])
def test_what_is_not_whole_is_not_found(tmp_path: Path, damage: str):
    write(tmp_path, 1)
    broken = write(tmp_path, 2).folder
    file = broken / "rank-00000.safetensors"
    if damage == "no marker":
        (broken / MARKER).unlink()
    elif damage == "shorter file":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "lost file":
        file.unlink()
    else:
        broken.rename(broken.with_name(broken.name + ".partial"))
    assert [checkpoint.step for checkpoint in complete_checkpoints(tmp_path)] == [1]


def test_a_rank_that_never_writes_is_waited_for_so_long(tmp_path: Path):
    partial = tmp_path / "step-00000001.partial"
    partial.mkdir()
    with pytest.raises(CheckpointError, match="not all 2 ranks wrote within 0 s"):
        finish_checkpoint(partial, 2, {}, {}, timeout=0.2)


def test_a_rank_that_failed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    partial = tmp_path / "step-00000001.partial"
    partial.mkdir()

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(disk, "save_tensors", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_rank_file(partial, 1, {"x": torch.zeros(1)})
    monkeypatch.setattr(disk, "save_tensors", save_file)
    write_rank_file(partial, 0, {"x": torch.zeros(1)})
    with pytest.raises(CheckpointError, match="rank-00001 failed"):
        finish_checkpoint(partial, 2, {}, {}, timeout=5)
    assert not list(partial.glob("*.partial-*"))


def test_space_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lit_transdiff.base.files.free_bytes", lambda folder: 3999)
    monkeypatch.setattr(disk, "save_tensors", lambda *_: pytest.fail("something was written"))
    with pytest.raises(CheckpointError, match=r"4 kB are to be written, but only 4 kB are free") as error:
        write_rank_file(tmp_path, 0, {"x": torch.zeros(1000)})
    assert error.value.errno == errno.ENOSPC and [path.name for path in tmp_path.iterdir()] == [
        "rank-00000.failed"
    ]


def manifests(*entries: tuple[int, float | None, bool]) -> list[Checkpoint]:
    return [
        Checkpoint(
            Path(f"{step}"),
            {"step": step, "metrics": {} if value is None else {"val/loss": value}, "milestone": mark},
        )
        for step, value, mark in entries
    ]


def test_the_policy_keeps_last_best_and_milestones():
    found = manifests((1, 0.3, True), (2, 0.1, False), (3, None, False), (4, 0.2, False), (5, 0.4, False))
    names = {"last": {"5"}, "two": {"4", "5"}, "best": {"2", "5"}, "worst": {"5"}}
    policies = {
        "last": CheckpointConfig(),
        "two": CheckpointConfig(keep_last=2),
        "best": CheckpointConfig(keep_best="val/loss"),
        "worst": CheckpointConfig(keep_best="val/loss", best_is="highest"),
    }
    for name, policy in policies.items():
        assert {str(path) for path in retained(found, policy)} == names[name] | {"1"}, name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_value_that_is_not_finite_is_never_the_best(bad: float):
    for best_is, best in (("lowest", "2"), ("highest", "3")):
        found = manifests((1, bad, False), (2, 0.1, False), (3, 0.3, False), (4, bad, False))
        assert {
            str(path) for path in retained(found, CheckpointConfig(keep_best="val/loss", best_is=best_is))
        } == {best, "4"}


@pytest.mark.parametrize("metric", ["val/los", "train/loss"])
def test_the_best_by_a_metric_that_no_validation_logs_is_refused(tmp_path: Path, metric: str):
    """At the first validation, not after the night."""
    run = small_run(tmp_path, checkpoint={"keep_best": metric}, training={"validate_every": 2})
    with pytest.raises(
        ValueError, match=rf"checkpoint\.keep_best: '{metric}' is not known.*Did you mean 'val/loss'"
    ):
        train(run, silent)
    unvalidated = {"validate_every": 2, "num_validation_samples": 0}
    run = small_run(tmp_path, name="unvalidated", checkpoint={"keep_best": "val/loss"}, training=unvalidated)
    with pytest.raises(ValueError, match=r"'val/loss' is not known.* Allowed: "):
        train(run, silent)


def test_a_run_keeps_what_its_policy_says(tmp_path: Path):
    """48 images; milestones at the first checkpoint from 20 and from 40 images on; the best validation among
    steps 2, 4, 6.
    """
    policy = {"keep_every_images": 20, "keep_best": "val/loss"}
    run = small_run(tmp_path, checkpoint=policy, training={"validate_every": 2})
    train(run, silent)
    found = {c.step: c for c in complete_checkpoints(run.folder / "checkpoints")}
    assert {step for step, c in found.items() if c.manifest["milestone"]} == {4, 6}
    losses = {step: c.manifest["metrics"]["val/loss"] for step, c in found.items()}
    assert min(losses, key=losses.__getitem__) in found and 6 in found
    assert all(c.manifest["images_seen"] == 8 * step for step, c in found.items())


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_full_disk_stops_with_the_reason_and_leaves_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
):
    run = small_run(tmp_path, checkpoint={"asynchronous": asynchronous})
    monkeypatch.setattr(disk, "require_space", full_from_step(4))
    with pytest.raises(
        CheckpointError,
        match=r"step 4: no checkpoint could be written: .*GB are free on that disk.*step-00000002",
    ):
        train(run, silent)
    assert [c.step for c in complete_checkpoints(run.folder / "checkpoints")] == [2]
    monkeypatch.undo()
    assert train(run, silent).step == 6


def test_a_full_disk_need_not_stop_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    run = small_run(tmp_path, checkpoint={"on_error": "continue"})
    monkeypatch.setattr(disk, "require_space", full_from_step(4, until=5))
    train(run, silent)
    assert "step 4: no checkpoint could be written, training goes on" in caplog.text
    assert [c.step for c in complete_checkpoints(run.folder / "checkpoints")] == [6]


def test_a_full_disk_costs_pictures_and_the_best_model_but_no_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def no_picture(self: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    def no_weights(tensors: object, path: Path) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("PIL.Image.Image.save", no_picture)
    monkeypatch.setattr(trainer, "write_generator", no_weights)
    often = {"sample_every": 2, "validate_every": 2}
    run = small_run(tmp_path, checkpoint={"on_error": "continue"}, training=often)
    assert train(run, silent).step == 6
    assert caplog.text.count(".png is left out") == 3 and caplog.text.count("best is left out") == 2
    assert not list(run.folder.glob("samples/*")) and not list(run.folder.glob("best*"))
    with pytest.raises(OSError, match="Disk quota exceeded"):
        train(small_run(tmp_path, name="strict", training={"sample_every": 2}), silent)


def full_from_step(first: int, until: int = 99):
    def check(folder: Path, needed: int) -> None:
        if first <= int(folder.name[5:13]) < until:
            raise NoSpaceError(
                errno.ENOSPC, f"{folder}: 1 GB are to be written, but only 0 GB are free on that disk."
            )

    return check


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path):
    train(small_run(tmp_path), silent)
    run = small_run(tmp_path, training={"max_steps": 8})
    checkpoint = last_checkpoint(run)
    assert checkpoint is not None
    shapes = {**checkpoint.manifest["shapes"], "model.encoder.norm.weight": [31]}
    manifest = {**checkpoint.manifest, "shapes": shapes}
    (checkpoint.folder / MARKER).write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"model\.encoder\.norm\.weight: \[31\] there, \[32\] here"):
        train(run, silent)


def test_another_layout_is_told(tmp_path: Path):
    train(small_run(tmp_path, training={"max_steps": 4}), silent)
    said: list[str] = []
    train(small_run(tmp_path, training={"micro_batch_size": 4, "precision": "bf16-mixed"}), said.append)
    text = "\n".join(said)
    assert "micro_batch_size 8 -> 4" in text and "precision 32-true -> bf16-mixed" in text
    assert "Dropout draws other masks" in text and "not bit for bit" in text


def test_a_checkpoint_is_exported_by_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = small_run(tmp_path, checkpoint={"keep_last": 2}, optimizer={"more_ema_decays": [0.5]})
    train(run, silent)
    assert main(["export", str(run.folder)]) == 0
    folder = Path(capsys.readouterr().out.strip())
    plain, again = (
        load_file(run.folder / "export" / "model.safetensors"),
        load_file(folder / "model.safetensors"),
    )
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    assert (
        main(
            [
                "export",
                str(run.folder),
                "--step",
                "4",
                "--average",
                "ema_0.5",
                "--output",
                str(tmp_path / "x"),
            ]
        )
        == 0
    )
    assert (
        read_export(tmp_path / "x").info["step"] == 4
        and read_export(tmp_path / "x").info["weights"] == "ema 0.5"
    )
    assert main(["export", str(run.folder), "--average", "ema_0.6"]) == 2
    assert "Did you mean 'ema_0.5'" in capsys.readouterr().err
    assert main(["export", str(run.folder), "--step", "2"]) == 2 and "[4, 6]" in capsys.readouterr().err


def test_a_result_says_which_weights_were_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    judge = {
        "extractor": "classifier",
        "extractor_weights": str(ROOT / "data/fashion/classifier.safetensors"),
    }
    judge |= {"metrics": ["class_accuracy"], "num_images": 20, "batch_size": 10}
    run = small_run(tmp_path, evaluation=judge)
    train(run, silent)
    assert main(["export", str(run.folder), "--average", "last", "--output", str(tmp_path / "raw")]) == 0
    found = {}
    for model in (run.folder, tmp_path / "raw"):
        assert main(["evaluate", "--checkpoint", str(model)]) == 0
        file = Path(capsys.readouterr().out.splitlines()[-1])
        found[model.name] = json.loads(file.read_text())["manifest"]["weights"]
    assert found == {"small": "ema 0.9", "raw": "last"}
    assert main(["compare", str(tmp_path)]) == 0
    assert {"weights", "last"} <= set(capsys.readouterr().out.split())


def test_safety_that_cannot_act_is_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"safety\.on_bad_step: got 'skip'; allowed: 'stop' in stage autoencoder"
    ):
        check_run(small_run(tmp_path, stage="autoencoder", safety={"on_bad_step": "skip"}))


@pytest.mark.parametrize(
    ("setting", "strategy"), [("kernels", "zero3"), ("cuda_graphs", "zero1"), ("cuda_graphs", "fsdp")]
)
def test_what_a_sharding_strategy_cannot_do_is_refused(tmp_path: Path, setting: str, strategy: str):
    run = small_run(tmp_path, training={setting: True}, distributed={"strategy": strategy})
    with pytest.raises(ValueError, match=rf"training\.{setting}: got True; allowed: 'auto' or false with"):
        check_run(run)


def test_offload_to_disk_that_is_not_possible_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Before anything is built: another stage of ZeRO ignores it, and without
    asynchronous I/O it fails late.
    """
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(
        get_accelerator().get_op_builder("AsyncIOBuilder"), "is_compatible", lambda self, verbose: False
    )

    def offload(strategy: str, path: Path) -> None:
        settings = {"strategy": strategy, "offload": "nvme", "nvme_path": str(path)}
        check_run(small_run(tmp_path, distributed=settings))

    with pytest.raises(
        ValueError, match=r"distributed\.offload: got 'nvme'; allowed: 'none' or 'cpu' with strategy zero2"
    ):
        offload("zero2", tmp_path / "disk")
    with pytest.raises(ValueError, match=r"distributed\.offload: got 'nvme'; .* async_io cannot be built"):
        offload("zero3", tmp_path / "disk")
    (tmp_path / "file").touch()
    with pytest.raises(
        ValueError,
        match=r"distributed\.nvme_path: .* allowed: a folder that can be written, which .*file is not",
    ):
        offload("zero3", tmp_path / "file" / "disk")
    assert not (tmp_path / "disk").exists()


@pytest.mark.parametrize("strategy, named", [("zero2", "zero2"), ("auto", "single")])
def test_offloading_that_a_strategy_has_not_is_refused(tmp_path: Path, strategy: str, named: str):
    settings = {"strategy": strategy, "offload": "cpu", "offload_parameters": True}
    field = (
        "offload_parameters: got True; allowed: false"
        if strategy == "zero2"
        else "offload: got 'cpu'; allowed: 'none'"
    )
    with pytest.raises(ValueError, match=rf"distributed\.{field} with strategy {named}"):
        check_run(small_run(tmp_path, distributed=settings))
