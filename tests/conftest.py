"""Shared by all tests: OMP_NUM_THREADS threads, or one (machines are small and shared); no network, no W&B account."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

from collections.abc import Iterator

import pytest
import torch
import wandb

from tests.wandb_stub import Stub

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Tests that are started in the background, or under nohup, inherit ignored signals, which the program leaves ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stub]:
    """A server that the client of this process uses; every operation that it was asked for must be known to it."""
    with Stub() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WANDB_X_TRANSACTION_LOG_FLUSH_INTERVAL", "1")
        wandb.teardown()
        yield server
        assert server.state.unknown == []
    wandb.teardown()


@pytest.fixture
def float64() -> Iterator[None]:
    """What the test makes is float64, whose roundings are far below the tolerance of ``assert_close`` (1e-7)."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
