"""Two nodes: two torchrun agents of one process each on this machine, started by the shipped script."""

import contextlib
import os
import platform
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
from tests.helpers.buckets import Bucket, upload
from tests.helpers.forks import PROGRAM, run_forked
from tests.helpers.processes import (
    assert_same_weights,
    background,
    children,
    free_port,
    run_in,
    steps_logged,
    until,
    values,
)
from tests.helpers.small import FASHION, ROOT
from tests.helpers.wandb_stub import Stub

SHARD_BY_SHARD = "data.shuffle_block=1"


def two_nodes(folder: Path, file: str, *words: str, **environment: str) -> list[subprocess.Popen]:
    """The same command on both nodes; the first one to start is the host."""
    line = ["bash", str(ROOT / "experiments/launch/torchrun.sh"), file, *words]
    environment |= {"NODES": "2", "GPUS": "1", "HOST": f"127.0.0.1:{free_port()}", "JOB": "test"}
    return [background(line, folder / f"node-{node}.log", **environment) for node in range(2)]


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The same run in two processes of one node."""
    folder = tmp_path_factory.mktemp("one")
    run, file = run_in(folder, "one")
    run_forked(2, PROGRAM, "train", file, SHARD_BY_SHARD)
    return run


def has_continued(logs: list[Path], times: int) -> bool:
    """Whether the first rank, wherever it is, has started so often from a checkpoint."""
    return sum(log.read_text().count("continuing from") for log in logs) >= times


# A module of the user's own, under which the first passes take longer on one rank.
SLOW = """
import os, time
from lit_transdiff.stages.base import TransDiffStage
objective = TransDiffStage.objective
def delayed(self, batch, normal):
    slow = os.environ["RANK"] == "1" and self.trainer.training and self.global_step < 25
    time.sleep(0.3 if slow else 0.0)
    return objective(self, batch, normal)
TransDiffStage.objective = delayed
"""


@pytest.mark.slow
def test_two_nodes_train_as_one(tmp_path: Path, one_node: RunConfig):
    """W&B shows one run with the system metrics of both nodes, and the rank that makes the other wait."""
    (tmp_path / "slow_second.py").write_text(SLOW)
    run, file = run_in(tmp_path, "two")
    quick = {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1", "WANDB_X_STATS_SAMPLING_INTERVAL": "1"}
    with Stub() as stub:
        environment = {**stub.environment, **quick, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
        words = (SHARD_BY_SHARD, "tracking.wandb=true", "tracking.project=p", "imports=[slow_second]")
        agents = two_nodes(tmp_path, file, *words, **environment)
        assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "node-0.log").read_text()
    assert values(run.folder) == values(one_node.folder)
    assert_same_weights(run, one_node)
    seen = stub.state.only_run()
    labels = {key.rpartition("/l:")[2] for row in seen["events"] for key in row if "/l:" in key}
    assert labels == {"node-0", "node-1"} and seen["state"] == "finished" and stub.state.unknown == []
    assert seen["displayName"] == "two" and seen["config"]["name"]["value"] == "two"
    named = [row["throughput/slowest_rank"] for row in seen["history"] if "throughput/slowest_rank" in row]
    assert named[:5].count(1) >= 4
    logs = "".join((tmp_path / f"node-{node}.log").read_text() for node in range(2))
    assert "makes the others wait" in logs and f"rank 1 on {platform.node()}" in logs
    assert any("a slow rank" in alert["title"] for alert in stub.state.alerts)


@pytest.mark.slow
def test_a_rank_lost_on_one_node_restarts_both(tmp_path: Path, one_node: RunConfig, network: Bucket):
    """Each node counts its own restarts; the ranks still meet, continue from the checkpoint and end bit for
    bit equal, although their shards come from a bucket, through one cache for two of eight.
    """
    run, file = run_in(tmp_path, "two")
    cache, place = tmp_path / "cache", upload(FASHION / "train", "s3://lab/fashion/train")
    words = (SHARD_BY_SHARD, f"data.train={place}", f"data.cache_dir={cache}", "data.cache_gb=0.0025")
    network.requests.clear()
    agents = two_nodes(tmp_path, file, *words, **network.environment())
    logs = [tmp_path / f"node-{node}.log" for node in range(2)]
    for restarts, node in enumerate((1, 0), start=1):
        until(steps_logged(run, 4 + 4 * restarts), agents[node])
        (rank,) = children(agents[node].pid)
        os.kill(rank, signal.SIGKILL)
        lost = time.monotonic()
        until(partial(has_continued, logs, restarts), agents[node])
        assert time.monotonic() - lost < 60
    assert [agent.wait(200) for agent in agents] == [0, 0], (tmp_path / "node-0.log").read_text()
    assert values(run.folder) == values(one_node.folder)
    assert_same_weights(run, one_node)
    assert "exitcode: -9" in (tmp_path / "node-1.log").read_text()
    read = {path.partition("?")[0] for method, path in network.requests if method == "GET" and "tar" in path}
    assert len(read) >= 2 and sum(shard.stat().st_size for shard in cache.glob("*.tar")) <= 2.5e6


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
