"""The last collectives of a rank, as its watchdog tells them. (NCCL's own dump needs several GPUs.)"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lit_transdiff.distributed import flight_recorder
from lit_transdiff.distributed.flight_recorder import (
    collective_in_words,
    last_collectives,
    record_collectives,
)
from lit_transdiff.training import watchdog
from lit_transdiff.training.watchdog import Watchdog


@pytest.fixture
def group() -> Iterator[None]:
    if not hasattr(torch._C._distributed_c10d, "_dump_fr_trace_json"):
        pytest.skip("this PyTorch records the collectives of NCCL alone")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_last_collectives_are_told_and_written(group: None, tmp_path: Path) -> None:
    for size in range(1, 9):
        dist.all_reduce(torch.ones(3, size))
    told = last_collectives(tmp_path, 0)
    file = tmp_path / "collectives" / "last-0.json"
    entries = json.loads(file.read_text())["entries"]
    assert "all_reduce #8 3x8 completed. All are in" in told and str(file) in told and "3x3" not in told
    assert [entry["input_sizes"] for entry in entries[-8:]] == [[[3, size]] for size in range(1, 9)]


def test_a_folder_that_cannot_be_written_to_is_told(group: None, tmp_path: Path) -> None:
    dist.barrier()
    (tmp_path / "collectives").write_text("")
    assert "could not be written (File exists)" in last_collectives(tmp_path, 0)


def test_the_tool_of_pytorch_reads_the_dumps_beside_them(group: None, tmp_path: Path) -> None:
    loader = pytest.importorskip("torch.distributed.flight_recorder.components.loader")
    dist.all_reduce(torch.ones(2))
    last_collectives(tmp_path, 0)
    folder = tmp_path / "collectives"
    (folder / "rank-0").write_bytes(torch._C._distributed_c10d._dump_fr_trace())  # as NCCL writes it
    details, _ = loader.read_dir(argparse.Namespace(trace_dir=str(folder), prefix=None))
    assert [*details] == ["rank-0"] and details["rank-0"]["entries"][-1]["profiling_name"].endswith("reduce")


def test_the_watchdog_tells_them(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Trainer:
        global_rank, accumulate_grad_batches, datamodule = 0, 1, None

    dist.all_reduce(torch.ones(2))
    guard = Watchdog(0.02, tmp_path)
    monkeypatch.setattr(watchdog.os, "_exit", lambda code: guard.stop.set())
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda all_threads: None)
    monkeypatch.setattr(watchdog, "planned_names", lambda *_: "unknown")
    guard.watch("computing", 3)
    guard.look(Trainer())  # type: ignore[arg-type]
    told = capsys.readouterr().err
    assert "stalled for 0 s" in told and "lit-transdiff: The last collectives of this rank: " in told
    guard.on_exception(Trainer(), None, dist.DistBackendError("time-out"))  # type: ignore[arg-type]
    assert "The last collectives of this rank" in capsys.readouterr().err


def test_without_a_group_there_is_nothing_to_tell(tmp_path: Path) -> None:
    assert last_collectives(tmp_path, 0) == "" and not list(tmp_path.iterdir())


def test_nccl_is_told_where_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = (*flight_recorder.BUFFER_SIZES, *flight_recorder.DUMP_FILES, "TORCH_NCCL_DUMP_ON_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "7")  # the user's own
    monkeypatch.setattr(os, "environ", dict(os.environ))
    record_collectives(tmp_path)
    assert [os.environ[name] for name in names] == ["2000", "7", *[f"{tmp_path}/collectives/rank-"] * 2, "1"]
    assert (tmp_path / "collectives").is_dir()


def test_a_collective_under_way_is_told_as_such() -> None:
    entry = {"profiling_name": "nccl:all_gather", "collective_seq_id": 4, "input_sizes": [[], [8, 2]]}
    assert collective_in_words(entry | {"state": "started"}) == "nccl:all_gather #4 scalar 8x2 started"
