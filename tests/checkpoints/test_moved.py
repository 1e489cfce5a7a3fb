"""Folders that were moved together are found again, and a stage accepts settings that it does not read."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from lit_transdiff.checkpoints.export import read_export, write_export
from lit_transdiff.checkpoints.run_folder import check_folder
from lit_transdiff.config import AutoencoderConfig, EvaluationConfig, RunConfig
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.config.targets import save_tensors

INFO = {"autoencoder": "0123", "class_names": ["a"], "step": 1}


def pipeline(root: Path) -> RunConfig:
    (root / "autoencoder" / "export").mkdir(parents=True)
    (root / "reference.npz").write_text("")
    return RunConfig(
        name="one",
        output_dir=str(root),
        autoencoder=AutoencoderConfig("kl", str(root / "autoencoder" / "export")),
        evaluation=EvaluationConfig(reference=str(root / "reference.npz")),
    )


def export_to(folder: Path, run: RunConfig) -> None:
    write_export(
        folder, run, INFO, lambda made: save_tensors({"w": torch.zeros(1)}, made / "model.safetensors")
    )


@pytest.mark.parametrize("place", ["one/export", "elsewhere/model"])
@pytest.mark.parametrize("earlier", [False, True], ids=["now", "earlier version"])
def test_a_moved_export_finds_what_was_moved_with_it(tmp_path: Path, place: str, earlier: bool):
    run = pipeline(tmp_path / "old")
    export_to(tmp_path / "old" / place, run)
    assert read_export(tmp_path / "old" / place).run == run
    if earlier:
        if place == "elsewhere/model":
            pytest.skip("of an earlier version only the run's own export says where it was")
        file = tmp_path / "old" / place / "export.json"
        info = json.loads(file.read_text())
        file.write_text(json.dumps({name: info[name] for name in INFO}))
    (tmp_path / "storage").mkdir()
    (tmp_path / "old").rename(tmp_path / "storage" / "new")
    found = read_export(tmp_path / "storage" / "new" / place).run
    assert found.autoencoder.path == str(tmp_path / "storage" / "new" / "autoencoder" / "export")
    assert found.evaluation.reference == str(tmp_path / "storage" / "new" / "reference.npz")
    shutil.copytree(tmp_path / "storage" / "new", tmp_path / "old")  # what is where the run had it is taken
    assert read_export(tmp_path / "storage" / "new" / place).run == run


@pytest.mark.parametrize(
    ("stage", "refused"),
    [("autoencoder", False), ("classifier", False), ("ar_pretrain", True), ("mrar_finetune", True)],
)
def test_a_stage_refuses_no_setting_that_it_does_not_read(tmp_path: Path, stage: str, refused: bool):
    run = dataclasses.replace(RunConfig(name="one", output_dir=str(tmp_path)), stage=stage)
    run.folder.mkdir()
    save_yaml(run, run.folder / "config.yaml")
    other = dataclasses.replace(
        run,
        autoencoder=AutoencoderConfig("kl", str(tmp_path)),
        model=dataclasses.replace(run.model, width=192),
    )
    if refused:
        with pytest.raises(ValueError, match="other settings"):
            check_folder(other)
    else:
        check_folder(other)
    classes = dataclasses.replace(run, model=dataclasses.replace(run.model, num_classes=7))
    with pytest.raises(ValueError, match=r"model\.num_classes"):
        check_folder(classes)
