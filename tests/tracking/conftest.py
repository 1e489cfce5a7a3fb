"""A W&B server of the test's own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import wandb

from tests.wandb_stub import Stub


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
