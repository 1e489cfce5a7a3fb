"""Folders of earlier versions of this program are read; those of newer ones are
refused and left unchanged.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_transdiff.__main__ import main
from lit_transdiff.base.files import read_json, sealed, with_seal
from lit_transdiff.checkpoints.export import export_run
from lit_transdiff.checkpoints.format import MARKER
from lit_transdiff.checkpoints.version import KEY, VERSION
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.study.runs import runs
from lit_transdiff.training.trainer import train
from tests.helpers.small import small_run

LAST = f"checkpoints/step-00000006/{MARKER}"
FILES = ("environment.json", "export/export.json", LAST)


def silent(text: str) -> None:
    pass


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = small_run(tmp_path_factory.mktemp("trained"), optimizer={"schedule": "constant"})
    train(run, silent)
    return run.folder


@pytest.fixture
def folder(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "small"))


def run_in(folder: Path, steps: int = 6) -> RunConfig:
    run = load_run(folder / "config.yaml")
    return dataclasses.replace(
        run, output_dir=str(folder.parent), training=dataclasses.replace(run.training, max_steps=steps)
    )


def rewrite(file: Path, change: Any, seal: bool = True) -> None:
    """Each object in a JSON file changed in place by ``change``."""
    content = read_json(file)
    for part in content if isinstance(content, list) else [content]:
        change(part)
    if isinstance(content, list):
        file.write_text(json.dumps([with_seal(part) if seal else part for part in content]))
    else:
        file.write_bytes(sealed(content) if seal else json.dumps(content).encode())


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "lock"
    }


def test_what_is_written_says_its_version(folder: Path) -> None:
    assert [part[KEY] for part in read_json(folder / FILES[0])] == [VERSION]
    assert [read_json(folder / name)[KEY] for name in FILES[1:]] == [VERSION, VERSION]


def test_files_without_a_version_are_read_and_gone_on_with(folder: Path, trained: Path) -> None:
    def as_at_first(part: dict[str, Any]) -> None:
        for key in (KEY, "crc32", "paths", "config_crc32"):
            part.pop(key, None)
        if "autoencoder" in part:
            del part["files"]  # of an export; a checkpoint has had them from the first

    for name in FILES:
        rewrite(folder / name, as_at_first, seal=False)
    assert torch.equal(
        load_generator(folder).images([1, 2], [3, 4]), load_generator(trained).images([1, 2], [3, 4])
    )
    assert [run.state for run in runs(folder)] == ["finished"]
    assert (export_run(folder, 6, "last", None) / "model.safetensors").is_file()
    assert train(run_in(folder, steps=8), silent).step == 8
    assert [part.get(KEY) for part in read_json(folder / FILES[0])] == [None, VERSION]
    assert read_json(folder / FILES[1])[KEY] == VERSION


@pytest.mark.parametrize("name", FILES)
def test_a_newer_folder_is_refused_and_stays_as_it_is(
    folder: Path, name: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder / name, lambda part: part.update({KEY: VERSION + 1, "of tomorrow": 1}))
    before = content(folder)
    message = (
        f"{folder / name}: {KEY}: got {VERSION + 1}; allowed: up to {VERSION}, the newest that this "
        "lit-transdiff knows. "
    )
    commands = {
        "environment.json": [lambda: train(run_in(folder), silent), lambda: train(run_in(folder, 8), silent)],
        "export/export.json": [lambda: train(run_in(folder), silent), lambda: load_generator(folder)],
        LAST: [lambda: train(run_in(folder, 8), silent), lambda: export_run(folder, None, "ema", None)],
    }
    for command in commands[name]:
        with pytest.raises(ValueError) as refused:
            command()
        assert str(refused.value) == message + "Use the one that wrote it, or a newer one."
    if name == LAST:
        assert main(["export", str(folder)]) == 2
        assert capsys.readouterr().err.strip().endswith("or a newer one.")
    else:
        with caplog.at_level(logging.WARNING), pytest.raises(FileNotFoundError, match="contains no run"):
            runs(folder)
        assert f"{message}Use the one that wrote it, or a newer one. Skipped." in caplog.text
    assert content(folder) == before


@pytest.mark.parametrize("version", ["2", 0, True, None])
def test_a_version_that_is_no_number_is_damage(folder: Path, version: Any) -> None:
    rewrite(folder / "export/export.json", lambda part: part.update({KEY: version}))
    with pytest.raises(ValueError, match=r"export\.json is damaged: format_version is"):
        load_generator(folder)
