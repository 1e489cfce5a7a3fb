"""A full disk: whoever writes and however much fits, a command ends in one line, and leaves nothing that is
half written.
"""

from __future__ import annotations

import contextlib
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.fuzz.ending import told_by
from tests.helpers.fuzz.grammar import CACHE, EXPORT, RUN

COMMANDS = [
    "pack work/photos out/pack",
    "index work/shards",
    CACHE,
    "statistics work/run.yaml work/shards out/statistics.npz",
    "train work/run.yaml",
    "train work/run.yaml output_dir=work/runs training.max_steps=3 training.sample_every=1",
    "train work/run.yaml checkpoint.asynchronous=true checkpoint.on_error=continue name=other",
    "run work/pipeline.yaml",
    "init out/my_lab",
    "convert work/checkpoint-last.pth out/converted --autoencoder work/autoencoder --num-heads 2",
    "convert work/autoencoder out/kl16.ckpt",
    f"export {RUN} --output out/export",
    f"sample --checkpoint {RUN} --per-class 2 --output out/drawn",
    f"evaluate --checkpoint {EXPORT} --output out --save-images both",
    "compare work/study --output out",
    "report work/study --output out/report.html",
    "sweep work/sweep.yaml --output out/sweep",
]


GROWING = ("lock", "metrics.csv", "environment.json", "config.yaml")  # of a run that goes on


@contextlib.contextmanager
def full_after(size: int) -> Iterator[None]:
    """No file of this process may become longer than ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder; one that is written anew with the same content is the same."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.split()[0])
def test_a_full_disk_is_one_line(world: Path, command: str) -> None:
    for size in (0, 300, 20_000):
        shutil.rmtree("work", ignore_errors=True)
        shutil.rmtree("out", ignore_errors=True)
        shutil.copytree("healthy", "work", symlinks=True)
        Path("out").mkdir()
        whole = contents_of(world / "work")
        with full_after(size):
            status, said = told_by(command.split(), patience=100)
        lines = [line for line in said.splitlines() if line.startswith("lit-transdiff:")]
        assert "Traceback" not in said and status in (0, 1), f"{size}: {status}\n{said}"
        assert len(lines) == (status == 1), f"{size}: {said}"
        if status:
            assert (
                "File too large" in lines[0]
                or "No space" in lines[0]
                or "trials" in lines[0]
                or "Make room" in lines[0]
            ), lines
        now = contents_of(world / "work")
        assert not {name for name in whole if now.get(name) != whole[name] and not name.endswith(GROWING)}, (
            f"{size}: {said}"
        )
        assert not list(Path().rglob("*.partial-*")), f"{size}: {said}"
