"""The same sweep files with the real ``wandb sweep`` and ``wandb agent``, against a server of our own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_transdiff.study.runs import runs
from tests.helpers.processes import free_port
from tests.helpers.slurm_stub import Slurm
from tests.helpers.small import ROOT
from tests.helpers.sweeps import TINY, train_command, write_recipe
from tests.helpers.wandb_stub import Stub

pytestmark = pytest.mark.slow


@pytest.fixture
def stub() -> Iterator[Stub]:
    with Stub() as server:
        yield server
        assert server.state.unknown == []


def wandb_command(stub: Stub, folder: Path, *words: str) -> str:
    environment = {**os.environ, **stub.environment, "PYTHONPATH": str(ROOT), "WANDB_DIR": str(folder)}
    environment |= {
        "WANDB_SILENT": "false",
        "WANDB_AGENT_DISABLE_FLAPPING": "true",
        # seconds; by default a short run ends before the server hears of it
        "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "1",
        # the agent's ${interpreter} is "python"
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, "-m", "wandb", *words]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def sweep_and_agent(stub: Stub, folder: Path, **settings: Any) -> list[dict[str, Any]]:
    """Register a sweep and let one agent work until it is done; the runs at the server."""
    file = folder / "sweep.yaml"
    file.write_text(
        yaml.safe_dump({"project": "p", "metric": {"name": "val/loss", "goal": "minimize"}, **settings})
    )
    told = wandb_command(stub, folder, "sweep", str(file))
    sweep = re.findall(r"wandb agent (\S+)", told)[-1]
    print(wandb_command(stub, folder, "agent", sweep))  # shown when the test fails
    return stub.state.runs_of_sweep(sweep.split("/")[-1])


def test_an_agent_trains_with_nested_settings_and_none(stub: Stub, tmp_path: Path) -> None:
    command = train_command(write_recipe(tmp_path), *TINY)
    parameters = {
        "optimizer": {"parameters": {"lr": {"values": [0.001, 0.01]}}},
        "training.micro_batch_size": {"value": None},
    }
    made = sweep_and_agent(stub, tmp_path, method="grid", parameters=parameters, command=command)
    assert [run["state"] for run in made] == ["finished"] * 2
    assert {run["args"]["optimizer"]["value"]["lr"] for run in made} == {0.001, 0.01}
    for run in made:
        assert run["config"]["optimizer"]["value"]["lr"] == run["args"]["optimizer"]["value"]["lr"]
        # the whole configuration, not the swept settings alone
        assert run["config"]["model"]["value"]["width"] == 32
        assert len([row for row in run["history"] if "val/loss" in row]) == 2
    local = runs(tmp_path / "runs" / "sweeps")
    assert {run.id for run in local} == {run["name"] for run in made}
    assert {run.config["optimizer"]["lr"] for run in local} == {0.001, 0.01}


def test_an_agent_starts_torchrun_and_two_ranks_are_one_run(stub: Stub, tmp_path: Path) -> None:
    launch = ["${env}", "torchrun", "--standalone", "--nproc_per_node", "2", "-m", "lit_transdiff", "train"]
    launch[1] = str(Path(sys.executable).with_name("torchrun"))
    command = [*launch, str(write_recipe(tmp_path)), *TINY, "${args_no_hyphens}"]
    (run,) = sweep_and_agent(
        stub, tmp_path, method="grid", parameters={"seed": {"values": [1]}}, command=command
    )
    assert run["state"] == "finished" and len([row for row in run["history"] if "val/loss" in row]) == 2


# Imported by the recipe: rank 0 is preempted once, at step 2.
ONCE = """
import os, pathlib, signal
from lit_transdiff.stages.base import TransDiffStage
objective, flag = TransDiffStage.objective, pathlib.Path(__file__).with_name("preempted")
def preempted(self, batch, normal):
    now = self.global_step == 2 and self.trainer.training and os.environ["SLURM_PROCID"] == "0"
    if now and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGTERM)
    return objective(self, batch, normal)
TransDiffStage.objective = preempted
"""


def test_an_agent_in_an_allocation_continues_a_preempted_trial_on_all_nodes(
    stub: Stub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``lit-transdiff srun`` starts two ranks; after a signal W&B puts the trial back into its queue."""
    (tmp_path / "once.py").write_text(ONCE)
    job = dict(JOB_ID="7", JOB_NAME="x", NTASKS="2", NNODES="2", NTASKS_PER_NODE="1")
    job |= dict(NODELIST="localhost", JOB_NODELIST="localhost")
    for name, value in {**Slurm(tmp_path).environment, "MASTER_PORT": free_port()}.items():
        monkeypatch.setenv(name, value)
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    command = [
        *train_command(write_recipe(tmp_path), *TINY, "training.max_steps=12"),
        "tracking.every_node=false",
    ]
    command[2:2] = ["-m", "lit_transdiff", "srun", "env", f"PYTHONPATH={ROOT}:{tmp_path}", "${interpreter}"]
    parameters = {"seed": {"values": [1]}, "imports": {"value": ["once"]}}
    (run,) = sweep_and_agent(stub, tmp_path, method="grid", parameters=parameters, command=command)
    assert (tmp_path / "preempted").exists() and run["state"] == "finished"
    assert [row["trainer/global_step"] for row in run["history"] if "val/loss" in row] == [2, 4, 6, 8, 10, 12]
    (folder,) = (tmp_path / "runs" / "sweeps").glob("*/*")
    starts = json.loads((folder / "environment.json").read_text())
    assert len(starts["starts"] if isinstance(starts, dict) else starts) == 2


def test_hyperband_at_the_server_ends_a_run(stub: Stub, tmp_path: Path) -> None:
    """The second trial is worse at the first band: its agent ends it."""
    long = [word for word in TINY if "max_steps" not in word and "validate_every" not in word]
    long += ["training.max_steps=200", "training.validate_every=4"]
    command = train_command(write_recipe(tmp_path), *long)
    parameters = {"training.max_steps": {"value": 400}, "optimizer.lr": {"values": [0.001, 1e-9]}}
    early = {"type": "hyperband", "min_iter": 2, "eta": 3}
    made = sweep_and_agent(
        stub, tmp_path, method="grid", command=command, parameters=parameters, early_terminate=early
    )
    assert made[0]["state"] == "finished" and made[1]["stopped"]
    assert len(made[1]["history"]) < len(made[0]["history"])
