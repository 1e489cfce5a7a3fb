"""Two nodes: two torchrun agents of one process each on this machine, started by the shipped script."""

import contextlib
import os
import signal
import subprocess
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from torch.distributed import HashStore, Store

from lit_transdiff.config import RunConfig
from lit_transdiff.distributed.restarts import agree
from tests.helpers.forks import PROGRAM, run_forked
from tests.helpers.processes import (
    background,
    children,
    free_port,
    run_in,
    same_weights,
    steps_logged,
    until,
    values,
)
from tests.helpers.small import ROOT


def two_nodes(folder: Path, file: str) -> list[subprocess.Popen]:
    """The same command on both nodes; the first one to start is the host."""
    line = ["bash", str(ROOT / "experiments/launch/torchrun.sh"), file]
    environment = {"NODES": "2", "GPUS": "1", "HOST": f"127.0.0.1:{free_port()}", "JOB": "test"}
    return [background(line, folder / f"node-{node}.log", **environment) for node in range(2)]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same run in two processes of one node."""
    folder = tmp_path_factory.mktemp("one")
    run, file = run_in(folder, "one")
    run_forked(2, PROGRAM, "train", file)
    return run


def has_continued(logs: list[Path], times: int) -> bool:
    """Whether the first rank, wherever it is, has started so often from a checkpoint."""
    return sum(log.read_text().count("continuing from") for log in logs) >= times


@pytest.mark.slow
def test_two_nodes_train_as_one(tmp_path: Path, one_node: RunConfig):
    run, file = run_in(tmp_path, "two")
    agents = two_nodes(tmp_path, file)
    assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "node-0.log").read_text()
    assert values(run.folder) == values(one_node.folder) and same_weights(run, one_node)


@pytest.mark.slow
def test_a_rank_lost_on_one_node_restarts_both(tmp_path: Path, one_node: RunConfig):
    """Each node counts its own restarts; the ranks still meet, continue from the checkpoint and end bit for
    bit equal.
    """
    run, file = run_in(tmp_path, "two")
    agents = two_nodes(tmp_path, file)
    logs = [tmp_path / f"node-{node}.log" for node in range(2)]
    for restarts, node in enumerate((1, 0), start=1):
        until(steps_logged(run, 4 + 4 * restarts), agents[node])
        (rank,) = children(agents[node].pid)
        os.kill(rank, signal.SIGKILL)
        lost = time.monotonic()
        until(partial(has_continued, logs, restarts), agents[node])
        assert time.monotonic() - lost < 60
    assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "node-0.log").read_text()
    assert values(run.folder) == values(one_node.folder) and same_weights(run, one_node)
    assert "exitcode: -9" in (tmp_path / "node-1.log").read_text()


def meet(store: Store, world: int, ranks: range, seconds: float) -> dict[int, str]:
    """Rank -> the name that it went on with; ranks that met nobody are left out."""
    found: dict[int, str] = {}

    def rank_of(rank: int) -> None:
        with contextlib.suppress(TimeoutError, RuntimeError):
            found[rank] = agree(store, rank, world, timedelta(seconds=seconds))

    threads = [threading.Thread(target=rank_of, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    return found


def test_ranks_of_an_attempt_agree_on_a_name_that_no_earlier_attempt_had():
    """The store keeps all that whole and incomplete attempts before have left there."""
    store = HashStore()
    names = set()
    for order in (range(3), range(2, -1, -1), range(3)):
        # the first rank is lost before it can say anything
        assert meet(store, 3, range(1, 3), seconds=0.3) == {}
        found = meet(store, 3, order, seconds=20)
        assert set(found) == {0, 1, 2} and len(set(found.values())) == 1
        names |= set(found.values())
        assert meet(store, 3, range(2), seconds=0.3) == {}  # the last rank is lost
    assert len(names) == 3
