"""Shared by all tests: OMP_NUM_THREADS threads, or one (machines are small and shared); no network, no W&B
account.
"""

from __future__ import annotations

import os
import signal
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
# seconds; a busy machine may need more than the 30 that are usual
os.environ.setdefault("WANDB_X_SERVICE_WAIT", "120")

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.buckets import Bucket
    from tests.helpers.wandb_stub import Stub

# Tests that are started in the background, or under nohup, inherit ignored signals, which the program leaves
# ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config: pytest.Config) -> None:
    """Where tests run; the process that hands them out to others imports nothing of theirs."""
    if config.getoption("numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ:
        return
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if not torch.cuda.is_available():  # read when triton is imported
        os.environ.setdefault("TRITON_INTERPRET", "1")


# The files that take longest. Processes begin with them, because one of them begun last leaves the others
# without work.
LONGEST = (
    "distributed/test_killed.py",
    "distributed/test_strategies.py",
    "test_notebooks.py",
    "fuzz/test_full_disk.py",
    "fuzz/test_fuzz.py",
    "distributed/test_interrupted.py",
    "distributed/test_schedulers.py",
    "sweep/test_agents.py",
    "tracking/test_wandb_trouble.py",
    "test_end_to_end.py",
    "cli/test_own_package.py",
    "models/test_execution.py",
    "tracking/test_wandb.py",
    "sweep/test_controller.py",
    "test_imagenet.py",
    "training/test_training.py",
    "distributed/test_evaluation.py",
    "evaluation/test_evaluate.py",
    "evaluation/test_statistics.py",
    "data/test_packing_at_scale.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order the files for pytest-xdist: the longest, then those with most tests."""
    tests, folder = Counter(item.path for item in items), Path(__file__).parent
    names = {path: path.relative_to(folder).as_posix() for path in tests}
    places = {path: LONGEST.index(name) if name in LONGEST else len(LONGEST) for path, name in names.items()}
    items.sort(key=lambda item: (places[item.path], -tests[item.path]))


@pytest.fixture(autouse=True)
def seeded() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A server that the client of this process uses; every operation that it was asked for must be known to
    it.
    """
    import wandb

    from tests.helpers.wandb_stub import Stub

    with Stub() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        wandb.teardown()
        yield server
        assert server.state.unknown == []
    wandb.teardown()


@pytest.fixture(scope="session")
def bucket() -> Bucket:
    """The S3 server of this process, with an empty bucket ``lab``."""
    from tests.helpers.buckets import Bucket

    made = Bucket()
    made.make("lab")
    return made


@pytest.fixture
def network(bucket: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The server, which clients find and which has no faults yet; attempts follow each other quickly."""
    from lit_transdiff.base import remote

    for name, value in bucket.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "REQUEST_PAUSE", 0.001)
    bucket.faults.clear()
    bucket.requests.clear()
    return bucket


@pytest.fixture
def fresh_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Remove a test's additions to the tables, and the modules that it imported from its folder, after it."""
    import lit_transdiff

    monkeypatch.setattr(sys, "path", [*sys.path])
    tables = [getattr(lit_transdiff, name) for name in lit_transdiff.TABLES]
    before = [{**table} for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)
    for name, module in [*sys.modules.items()]:
        if (getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def float64() -> Iterator[None]:
    """Make float64 the default dtype, whose rounding is far below the tolerance of
    ``assert_close`` (1e-7).
    """
    import torch

    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
