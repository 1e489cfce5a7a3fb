"""The shipped scheduler scripts, with stand-ins for the commands of a cluster: a job is stopped, restarted
and finished.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from lit_transdiff.checkpoints.format import complete_checkpoints
from tests.helpers.processes import background, children, free_port, run_in, steps_logged, until, values
from tests.helpers.small import ROOT

SRUN = f"""#!/bin/bash
# Starts the tasks of one node and ends with the highest of their codes.
while [[ "$1" == --* ]]; do shift; done
shift
highest=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task SLURM_LOCALID=$task {sys.executable} "$@" &
  tasks+=($!)
done
for task in "${{tasks[@]}}"; do
  wait "$task"
  code=$?
  ((code > highest)) && highest=$code
done
exit $highest
"""


def slurm(folder: Path, tasks: int) -> dict[str, str]:
    """The environment of an allocation of one node, with ``srun`` and a ``scontrol`` that writes down what it
    is asked for.
    """
    tools = folder / "bin"
    tools.mkdir()
    (tools / "srun").write_text(SRUN)
    (tools / "scontrol").write_text(f'#!/bin/bash\necho "$@" >> {folder}/scontrol.log\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    return {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(tasks),
        "SLURM_NTASKS_PER_NODE": str(tasks),
        "SLURM_NNODES": "1",
        "SLURM_NODEID": "0",
        "SLURM_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_ARRAY_JOB_ID": "5",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": free_port(),
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "script, tasks, requeued", [("slurm.sbatch", 2, "7"), ("slurm_array.sbatch", 1, "5_2")]
)
def test_slurm_requeues_until_the_run_is_done(tmp_path: Path, script: str, tasks: int, requeued: str):
    """Before the time limit SLURM signals every task; the job is put back, and once more started it does the
    rest.
    """
    run, file = run_in(tmp_path, "run", checkpoint_every=10_000)
    if script == "slurm_array.sbatch":
        (tmp_path / "list").write_text(f"nothing.yaml\n{file} training.sample_every=0\n")
        file = str(tmp_path / "list")
    environment = slurm(tmp_path, tasks)
    line = ["bash", str(ROOT / "experiments/launch" / script), file]
    job = background(line, tmp_path / "first.log", **environment)
    until(steps_logged(run), job)
    (srun,) = children(job.pid)
    for task in children(srun):
        os.kill(task, signal.SIGUSR1)
    assert job.wait(90) == 0, (tmp_path / "first.log").read_text()
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {requeued}\n"
    assert background(line, tmp_path / "second.log", **environment, SLURM_RESTART_COUNT="1").wait(200) == 0
    assert "continuing from" in (tmp_path / "second.log").read_text()
    assert json.loads((run.folder / "export" / "export.json").read_text())["step"] == 100
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {requeued}\n" and len(
        values(run.folder)
    ) == 20


@pytest.mark.slow
def test_slurm_is_given_an_error_as_it_is(tmp_path: Path):
    """A job that would fail again is not put back."""
    environment = slurm(tmp_path, 1)
    line = ["bash", str(ROOT / "experiments/launch/slurm.sbatch"), "nothing.yaml"]
    assert background(line, tmp_path / "log", **environment).wait(90) == 2
    assert (
        not (tmp_path / "scontrol.log").exists()
        and "nothing.yaml does not exist" in (tmp_path / "log").read_text()
    )


@pytest.mark.parametrize("script, job", [("slurm.sbatch", "7"), ("slurm_array.sbatch", "5_2")])
def test_slurm_counts_stalls_and_not_preemptions(tmp_path: Path, script: str, job: str):
    """Five stalls in a row are tried again, however often the job was preempted before or in between."""
    environment = slurm(tmp_path, 1) | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    (tmp_path / "list").write_text("a.yaml\nb.yaml\n")

    def start(code: int, restarts: int) -> int:
        (tmp_path / "bin" / "srun").write_text(f"#!/bin/bash\nexit {code}\n")
        line = ["bash", str(ROOT / "experiments/launch" / script), str(tmp_path / "list")]
        return background(line, tmp_path / "log", **environment, SLURM_RESTART_COUNT=str(restarts)).wait(30)

    codes = [75] * 7 + [76] * 4 + [75] + [76] * 5
    assert [start(code, restarts) for restarts, code in enumerate(codes)] == [0] * len(codes)
    assert (tmp_path / "scontrol.log").read_text().splitlines() == [f"requeue {job}"] * len(codes)
    assert (tmp_path / f".stalls-{job}").read_text() == "5\n"
    assert start(76, 99) == 76 and start(0, 99) == 0
    assert not (tmp_path / f".stalls-{job}").exists()
    assert (tmp_path / "scontrol.log").read_text().count("\n") == len(codes)


AGENT = """#!/bin/bash
# A wandb agent that waits for its run when it is asked to end.
echo "$@" >"$SLURM_SUBMIT_DIR/agent.log"
[[ $1 == agent && $2 == team/p/short ]] && exit 4
trap 'asked=1' TERM
touch "$SLURM_SUBMIT_DIR/ready"
while [[ -z $asked ]]; do sleep 0.05; done
"""


def test_an_agent_of_wandb_ends_with_its_job_and_returns(tmp_path: Path):
    """USR1 to the batch script: the agent ends, the ranks of its trial get USR1, and the job is requeued."""
    environment = slurm(tmp_path, 1) | {"SLURM_SUBMIT_DIR": str(tmp_path)}
    for name, text in (("wandb", AGENT), ("scancel", f'#!/bin/bash\necho "$@" >>{tmp_path}/scancel.log\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    line = ["bash", str(ROOT / "experiments/launch/wandb_agent.sbatch")]
    job = background([*line, "team/p/long"], tmp_path / "log", **environment)
    until((tmp_path / "ready").exists, job)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0 and (tmp_path / "agent.log").read_text() == "agent team/p/long\n"
    assert (tmp_path / "scancel.log").read_text() == "--signal=USR1 7\n"
    assert (tmp_path / "scontrol.log").read_text() == "requeue 7\n"
    assert background([*line, "team/p/short"], tmp_path / "log", **environment).wait(30) == 4


class Pods:
    """Two pods of one GPU each that run the shipped container's command; what fails is started again, as with
    OnFailure.
    """

    def __init__(self, folder: Path, file: str) -> None:
        job = yaml.safe_load((ROOT / "experiments/launch/kubernetes.yaml").read_text())["spec"]
        self.worker = job["pytorchReplicaSpecs"]["Worker"]
        assert (
            self.worker["restartPolicy"] == "OnFailure"
            and job["elasticPolicy"]["minReplicas"] == self.worker["replicas"]
        )
        (container,) = self.worker["template"]["spec"]["containers"]
        command = (
            " ".join(container["command"])
            .replace("--nnodes=4", "--nnodes=2")
            .replace("--nproc_per_node=8", "--nproc_per_node=1")
        )
        command = command.replace("experiments/imagenet256/ar_large.yaml", file).replace(
            "/data/runs", str(folder)
        )
        assert (
            command.startswith("torchrun --nnodes=2 --nproc_per_node=1 ")
            and file in command
            and str(folder) in command
        )
        self.line = [sys.executable, "-m", "torch.distributed.run", *command.split()[1:]]
        self.environment = {item["name"]: item["value"] for item in container["env"]}
        elastic = job["elasticPolicy"]  # the operator makes variables of it
        self.environment |= {
            "PET_RDZV_BACKEND": elastic["rdzvBackend"],
            "PET_RDZV_ENDPOINT": f"127.0.0.1:{free_port()}",
            "PET_RDZV_ID": "lit-transdiff",
            "PET_MAX_RESTARTS": str(elastic["maxRestarts"]),
        }
        self.folder, self.starts = folder, 0
        self.pods = [self.start(), self.start()]

    def start(self) -> subprocess.Popen:
        self.starts += 1
        return background(self.line, self.folder / f"pod-{self.starts}.log", **self.environment)

    def restart_failed(self) -> bool:
        """Whether all have succeeded."""
        self.pods = [self.start() if pod.poll() else pod for pod in self.pods]
        return all(pod.poll() == 0 for pod in self.pods)

    def logs(self) -> str:
        return "".join(log.read_text() for log in sorted(self.folder.glob("pod-*.log")))


@pytest.mark.slow
def test_kubernetes_evicts_a_pod_and_starts_it_again(tmp_path: Path):
    """SIGTERM to the first process of one pod: all save, the pod fails and is started again, and the run goes
    on to its end.
    """
    run, file = run_in(tmp_path, "run", checkpoint_every=10_000)
    pods = Pods(tmp_path, file)
    grace = pods.worker["template"]["spec"]["terminationGracePeriodSeconds"]
    assert int(pods.environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) < grace
    until(steps_logged(run), pods.pods[1])
    pods.pods[1].send_signal(signal.SIGTERM)
    assert pods.pods[1].wait(60) != 0
    (checkpoint,) = complete_checkpoints(run.folder / "checkpoints")
    end = time.monotonic() + 240
    while not pods.restart_failed():
        assert time.monotonic() < end and pods.starts < 8, pods.logs()
        time.sleep(0.5)
    assert f"continuing from {checkpoint.folder}" in pods.logs()
    assert (
        json.loads((run.folder / "export" / "export.json").read_text())["step"] == 100
        and len(values(run.folder)) == 20
    )
