"""The image, the files for clusters, and the constraints."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from lit_transdiff.__main__ import parse
from tests.helpers.dockerfile import instructions
from tests.helpers.processes import children, until
from tests.helpers.small import ROOT

LAUNCH = ROOT / "experiments" / "launch"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
STOPPABLE = """
import pathlib, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))
again, there = pathlib.Path(sys.argv[1] + ".stopped"), pathlib.Path(sys.argv[1])
if again.exists():
    there.write_text("done")
    sys.exit(0)
again.touch()
signal.pause()
"""


def pins(python: str) -> dict[str, str]:
    """The versions that constraints.txt gives a Linux machine with this Python."""
    found: dict[str, str] = {}
    machine = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.split("#")[0].strip():
            pin = Requirement(line.split("#")[0])
            if pin.marker is None or pin.marker.evaluate(machine):
                assert pin.name not in found, f"{pin.name} has two versions on Python {python}"
                (found[pin.name],) = (one.version for one in pin.specifier if one.operator == "==")
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_the_constraints_pin_one_allowed_version_of_each_dependency(python: str) -> None:
    found = pins(python)
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    needed = {Requirement(line).name.replace("_", "-"): Requirement(line) for line in lines if line}
    assert {"torch", "lightning", "numpy", "scipy", "wandb"} <= set(found) & set(needed)
    for name in set(found) & set(needed):
        assert needed[name].specifier.contains(found[name]), (name, found[name])


def test_the_image_copies_what_exists_and_runs_as_a_user() -> None:
    text = (ROOT / "Dockerfile").read_text()
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    last = text.rpartition("FROM ")[2]
    assert last.index("USER $USER_ID") > last.index('useradd --create-home --uid "$USER_ID"')  # a number
    assert re.findall(r"^RUN (.*pip install.*)$", text, re.MULTILINE)
    # Nothing is installed without the tested versions, and the package itself without its dependencies.
    installs = re.findall(r"pip install(?: --no-deps \.| (?:--no-deps )?--constraint constraints\.txt)", text)
    assert len(installs) == text.count("pip install")


def write_wheel(folder: Path, name: str, version: str, needs: str) -> None:
    """A package without code in an index."""
    folder.mkdir(parents=True)
    info = f"{name}-{version}.dist-info"
    file = folder / f"{name}-{version}-py3-none-any.whl"
    (folder / "index.html").write_text(f'<a href="{file.as_uri()}">{file.name}</a>')
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA",
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {needs}\n",
        )
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize(
    "device, code, said",
    [
        ("cpu", 0, "Would install torch-{torch}+cpu torchvision-{torchvision}+cpu"),
        ("gpu", 0, ""),
        ("tpu", 1, "'tpu'"),
    ],
)
def test_the_image_for_cpus_takes_torch_from_an_index_of_few_packages(
    tmp_path: Path, device: str, code: int, said: str
) -> None:
    """PyTorch's index has no other package in the version of the constraints."""
    versions = pins(f"{sys.version_info[0]}.{sys.version_info[1]}")
    for name, needs in (("torch", "filelock"), ("torchvision", "torch")):
        write_wheel(tmp_path / "index" / name, name, f"{versions[name]}+cpu", needs)
    write_wheel(tmp_path / "index" / "filelock", "filelock", "3.13.1", "six")
    (script,) = (text for word, text in instructions((ROOT / "Dockerfile").read_text()) if "$DEVICE" in text)
    pip = f"{sys.executable} -m pip install --dry-run --target {tmp_path / 'venv'}"
    variables = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_FIND_LINKS": ""}
    variables |= {"DEVICE": device, "CPU_INDEX": (tmp_path / "index").as_uri()}
    script = script.replace("/opt/venv/bin/pip install", pip)
    line = ["bash", "-ec", script]
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert said.format(**versions) in done.stdout


def test_what_the_image_leaves_out_is_not_in_the_repository() -> None:
    listed = subprocess.run(
        ["git", "ls-files", "-ci", "-X", ".dockerignore"], cwd=ROOT, capture_output=True, text=True
    )
    assert listed.stdout == "" and listed.returncode == 0


def test_the_demo_in_a_container_is_a_command_of_ours() -> None:
    services = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
    for name, device in (("demo", "cpu"), ("demo-gpu", "gpu")):
        assert (ROOT / parse(services[name]["command"]).pipeline).is_file()
        assert services[name]["build"]["args"]["DEVICE"] == device
        assert services[name]["image"] == f"lit-transdiff:{device}"
    assert "deploy" in services["demo-gpu"] and "deploy" not in services["demo"]


def test_kubernetes_takes_the_image_from_a_variable() -> None:
    spec = yaml.safe_load((LAUNCH / "kubernetes.yaml").read_text())["spec"]
    (container,) = spec["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    assert container["image"] == "${IMAGE}"


def test_skypilot_starts_the_same_line_on_every_node(tmp_path: Path) -> None:
    """Its ``run`` with the variables that SkyPilot sets, and a python that writes its arguments down."""
    task = yaml.safe_load((LAUNCH / "skypilot.yaml").read_text())
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text(f"PATH={tmp_path}/venv/bin:$PATH\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/arguments\n')
    python.chmod(0o755)
    given = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NUM_GPUS_PER_NODE": "8", "SKYPILOT_TASK_ID": "job-1"}
    given |= {
        "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2",
        "HOME": str(tmp_path),
        "PATH": "/usr/bin:/bin",
        **task["envs"],
    }
    subprocess.run(["bash", "-c", task["run"]], cwd=ROOT, env=given, check=True)
    arguments = (tmp_path / "arguments").read_text()
    assert "--nnodes 2 --nproc_per_node 8 " in arguments and "--rdzv_endpoint 10.0.0.1:29500 " in arguments
    assert arguments.endswith(f"train {task['envs']['RECIPE']} output_dir=/data/runs\n")
    assert (ROOT / task["envs"]["RECIPE"]).is_file()


def submitit_train() -> Any:
    spec = importlib.util.spec_from_file_location("submitit_train", LAUNCH / "submitit_train.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["submitit_train"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_submitit_stops_the_run_and_starts_it_again(tmp_path: Path) -> None:
    """Its own executor for one machine; the run is a stand-in that ends with 75 at the signal."""
    submitit = pytest.importorskip("submitit")
    import cloudpickle

    module = submitit_train()
    cloudpickle.register_pickle_by_value(module)
    executor = submitit.LocalExecutor(tmp_path / "jobs")
    executor.update_parameters(timeout_min=10)
    script = tmp_path / "stoppable.py"
    script.write_text(STOPPABLE)
    job = executor.submit(module.Training([sys.executable, "-S", str(script), str(tmp_path / "run")]))
    until(lambda: (tmp_path / "run.stopped").exists(), job._process)
    (task,) = children(job._process.pid)
    os.kill(task, signal.SIGUSR2)  # what submitit tells SLURM to send
    assert job.result() is None and (tmp_path / "run").read_text() == "done"


@pytest.fixture
def submitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[str]]]:
    """The parameters and commands of the jobs that submitit is given; none is started."""
    submitit = pytest.importorskip("submitit")
    found: list[tuple[dict[str, Any], list[str]]] = []

    def submit(executor: Any, task: Any) -> Any:
        found.append((executor.parameters, task.command))
        return submitit.LocalJob(tmp_path, "1")

    monkeypatch.setattr(submitit.AutoExecutor, "submit", submit)
    return found


def test_a_job_of_submitit_has_the_parameters_of_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, submitted: list[tuple[dict[str, Any], list[str]]]
) -> None:
    line = f"--cluster local --gpus 1 --hours 2 --folder {tmp_path} RUN.yaml training.max_steps=5"
    monkeypatch.setattr(sys, "argv", ["submitit_train.py", *line.split()])
    submitit_train().main()
    ((parameters, command),) = submitted
    assert command[1:] == ["-m", "lit_transdiff", "train", "RUN.yaml", "training.max_steps=5"]
    assert (parameters["tasks_per_node"], parameters["timeout_min"]) == (1, 120)
