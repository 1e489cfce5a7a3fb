"""The documents' lines of other programs run: each page's in order, in a user's folder, by a shell.

``HOW`` says by what each program is run here, and ``NOT_RUN`` which lines are left out. Lines of
``lit-transdiff`` itself are in tests/test_documents.py; here those are checked that such a line starts. The
programs in ``benchmarks`` are described beside their measurements and not meant.
"""

from __future__ import annotations

import itertools
import os
import pickle
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.distributed.run import get_args_parser

from lit_transdiff.__main__ import main, parse
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.tracking.wandb_run import WandbRun
from tests.helpers.documents import CURRENT, FOLDERS, PLACEHOLDER, check_command, name
from tests.helpers.hub_stub import TOKEN, HubStub
from tests.helpers.small import ROOT, small_run
from tests.helpers.tools_stub import Tools, options
from tests.helpers.wandb_runs import TRACKED, rows_of

pytestmark = pytest.mark.slow

STRICT = "a stub: the options of the real one; files, images, services and fields must be there"
HOW = {
    "aws": f"{STRICT}; copies to the S3 server of tests",
    "docker": f"{STRICT}; the container's command is checked as a line of lit-transdiff",
    "experiments/launch/torchrun.sh": "itself; the ranks' command is checked by torchrun's parser and ours",
    "hf": "itself, with the token in the line, against a Hub of tests",
    "kubectl": f"{STRICT}; the container's command is checked by torchrun's parser and ours",
    "make": "itself, which prints what it would do",
    "mkdir": "itself",
    "pip": f"{STRICT}, and the extra that a line names",
    "python": "itself; the ranks' command is only checked",
    "sbatch": f"{STRICT}; the script runs, and the command of its srun is checked",
    "sky": f"{STRICT}; what a node runs is run, and the ranks' command is checked",
    "torchrun": "its parser and ours",
    "wandb": "itself, against a server of tests; its agent in a job is only written down",
}
NOT_RUN = {
    "python -m benchmarks.intervals": "simulates for hours",
    "python benchmarks/judge.py": "trains for minutes",
    "python -m lit_transdiff.cli.api > docs/api.md": "tests/test_door.py compares the page",
}
IN_PLACE = {  # of words that stand for the user's
    r"\bRUN\.yaml": PLACEHOLDER,
    r"IMAGE=\.\.\.": "IMAGE=registry/lit-transdiff:1.0",
    r" \[key=value \.\.\.\]": " seed=1",
    r"ENTITY/PROJECT/SWEEP": "team/p/s1",
    r"\bNAME\b": "small",
    r"RUN_FOLDER/wandb/run-\.\.\.": "runs/small/wandb/run-*",
    r"RUN_FOLDER": "runs/small",
    r"hf auth login$": f"hf auth login --token {TOKEN}",
    r"\.venv/bin/pip": "pip",
}
OTHERS = [
    ROOT / "Dockerfile",
    ROOT / "compose.yaml",
    *(
        file
        for file in sorted((ROOT / "experiments").rglob("*"))
        if file.suffix in (".yaml", ".sbatch", ".sh", ".py")
    ),
]
DOCUMENTED = [path for path in CURRENT if path.parent.name != "benchmarks"]
STARTS = re.compile(r"docker (compose )?run|kubectl|sbatch|sky|submitit_train|torchrun")
PROGRAM = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/|envsubst .*\| )?({'|'.join(HOW)}) ")


def shell_lines(path: Path) -> list[str]:
    """The lines of a page's blocks, comments and text that call another program, each once."""
    text, words = path.read_text(), []
    if path.suffix == ".md":
        block = r"^```(?:bash|sh|console)\n(.*?)^```"
        shell = "\n".join(re.findall(block, text, flags=re.DOTALL | re.MULTILINE))
        inline = re.findall(r"`([^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        words = [re.sub(r"\s+", " ", word).replace("\\|", "|") for word in inline]
    else:
        shell = "\n".join(re.findall(r"^(?:#  |   ) *(.*)$", text, flags=re.MULTILINE))
    shell = re.sub(r"\\\n\s*", " ", shell)
    lines = [*shell.splitlines(), *re.findall(r"# or(?:: |, .*: )(.*)$", shell, flags=re.MULTILINE), *words]
    return [line for line in dict.fromkeys(map(str.strip, lines)) if PROGRAM.match(line)]


PAGES = [path for path in [*DOCUMENTED, *OTHERS] if shell_lines(path)]


def test_every_program_of_the_table_has_a_line() -> None:
    lines = list(itertools.chain.from_iterable(map(shell_lines, PAGES)))
    called = {match[1] for line in lines if (match := PROGRAM.match(line))}
    assert called == set(HOW) and set(NOT_RUN) <= set(lines)
    assert {"Dockerfile", "compose.yaml", "docs/containers.md", "docs/remote.md"} <= set(map(name, PAGES))


@pytest.fixture(scope="module")
def tools(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    """A user's folder: the repository's files, a package, a run, shards, and the tools."""
    folder = tmp_path_factory.mktemp("user") / "folder"
    folder.mkdir()
    for place in ("experiments", "data", "lit_transdiff", "tests", *FOLDERS):
        (folder / place).unlink(missing_ok=True)
        (folder / place).symlink_to(ROOT / place)
    for file in (*ROOT.glob("*.txt"), *ROOT.glob("*.md"), ROOT / "Dockerfile", ROOT / "compose.yaml"):
        shutil.copy(file, folder)
    for file in ("Makefile", "setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / file, folder)
    (folder / "my_lab").mkdir()
    (folder / "my_lab" / "pyproject.toml").touch()
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").touch()
    (folder / "LIST").write_text(f"{PLACEHOLDER} training.max_steps=5000\n")
    image = Image.fromarray(np.zeros((28, 28, 3), np.uint8))
    (folder / "photos" / "a").mkdir(parents=True)
    image.save(folder / "photos" / "a" / "0.png")
    shards = str(folder / "runs/folder/shards/train")
    assert main(["pack", str(folder / "photos"), shards, "--image-size", "28"]) == 0
    return Tools(folder.parent)


@pytest.fixture
def servers(
    request: pytest.FixtureRequest, tools: Tools, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[dict[str, Any]]:
    """The servers that a page's lines talk to, each with what the page has put there before."""
    given, found = request.node.callspec.params, dict[str, Any]()
    lines = shell_lines(given["path"]) if "path" in given else [given["line"]]
    folder = tools.state.parent / "folder"
    monkeypatch.chdir(folder)
    if any(line.startswith("wandb ") for line in lines):
        found["stub"] = request.getfixturevalue("stub")
    if any(line.startswith("wandb sync") for line in lines):
        for value, mode in enumerate(("offline", "online"), start=1):
            monkeypatch.setenv("WANDB_MODE", mode)
            log = WandbRun(small_run(folder / "runs", name="small", tracking=TRACKED))
            log.log_metrics({"train/loss": float(value)}, value)
            log.finish()
    if any(line.startswith("aws ") for line in lines):
        found["bucket"] = request.getfixturevalue("network")
        found["bucket"].make("bucket")
        RemoteFolder("s3://bucket/runs/small").write("mirror.json", b"{}")
    with HubStub() as hub:
        for name, value in {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield found
    assert hub.unknown == []


def run_line(line: str, tools: Tools) -> subprocess.CompletedProcess[str]:
    for shown, own in IN_PLACE.items():
        line = re.sub(shown, own, line)
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", line],
        cwd=tools.state.parent / "folder",
        env={**os.environ, **tools.environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def check_started(words: list[str]) -> None:
    """A tool has started a valid command of ours, perhaps by torchrun, submitit or an agent."""
    if words[:2] == ["wandb", "agent"]:
        return
    if "submitit.core._submit" in words:
        (pickled,) = Path(words[-1]).glob("*_submitted.pkl")
        words = pickle.loads(pickled.read_bytes()).function.command
        shutil.rmtree(words[-1], ignore_errors=True)
    if words[0] == "torchrun" or words[:3] == ["python", "-m", "torch.distributed.run"]:
        given = get_args_parser().parse_args(words[1 if words[0] == "torchrun" else 3 :])
        assert given.module
        words = ["python", "-m", given.training_script, *given.training_script_args]
    if words[0] != "lit-transdiff":
        assert words[1:3] == ["-m", "lit_transdiff"], words
        words = words[2:]
    check_command(parse(words[1:]))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_lines_of_a_page_run(path: Path, tools: Tools, servers: dict[str, Any], tmp_path: Path) -> None:
    for line in shell_lines(path):
        if line not in NOT_RUN:
            done = run_line(line, tools)
            assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
            started = tools.started()
            assert bool(started) == bool(STARTS.search(line)), line
            for words in started:
                check_started(words)
    if "bucket" in servers:
        assert main(["verify", "s3://bucket/shards/train"]) == 0
        assert not RemoteFolder("s3://bucket/runs/small").files()
    if path.name == "tracking.md":
        assert {row["train/loss"] for row in rows_of(servers["stub"], "train/loss")} == {1.0, 2.0}
        assert servers["stub"].state.sweeps
    if path.name == "hub.md":
        assert (tmp_path / "token").read_text() == TOKEN


KUBERNETES, SKY = "experiments/launch/kubernetes.yaml", "experiments/launch/skypilot.yaml"
APPLY = "| IMAGE=lab/image:1 envsubst '$IMAGE' | kubectl apply -f -"
MISTAKES = {
    "aws s3 snyc runs s3://bucket/x": "no such command",
    "aws s3 sync nowhere s3://bucket/x": "path nowhere does not exist",
    "aws s3 sync runs s3://no-bucket-of-ours/x": "NoSuchBucket",
    "aws s3 rm s3://lab/nothing": "404",
    "docker biuld .": "unknown command",
    "docker build --tga lit-transdiff .": "unknown option --tga",
    "docker build --tag lit-transdiff nowhere": "no folder nowhere",
    "docker build --tag lit-transdiff --build-arg DEVICES=cpu .": "build argument DEVICES",
    "docker build --tag lit-transdiff --build-arg DEVICE=tpu .": "allowed: gpu, cpu",
    "docker build --tag lit-transdiff . && docker run lit-transdif": "no image lit-transdif",
    "docker build --tag x . && docker run --volume $PWD/no:/workspace x": "no folder",
    "docker build --tag x . && docker run --shm-size lots x": "--shm-size: not a value",
    "docker compose run --biuld demo": "unknown option --biuld",
    "docker compose run --build demos": "no such service",
    "experiments/launch/torchrum.sh RUN.yaml": "No such file",
    "hf auth login --token hf_other": "Invalid user token",
    f"sed s/restartPolicy/restartPolcy/ {KUBERNETES} {APPLY}": "unknown field spec.pytorchReplicaSpecs",
    f"sed s/claimName/claim/ {KUBERNETES} {APPLY}": "unknown field",
    f"sed s/PyTorchJob/PytorchJob/ {KUBERNETES} {APPLY}": "no matches for kind",
    f"sed s/name:.shm,/name:\\ smh,/ {KUBERNETES} {APPLY}": "no volume smh",
    f"cat {KUBERNETES} | kubectl apply -f -": "couldn't parse image ${IMAGE}",
    "kubectl apply -f nowhere.yaml": "nowhere.yaml does not exist",
    "make demmo": "demmo",
    "pip install lit-transdiff[s3]": "is in no index",
    'pip install -e ".[s4]"': "no extra s4",
    "python experiments/launch/submitit_train.py --node x RUN.yaml": "--nodes: invalid int value",
    "sbatch --node 4 experiments/launch/slurm.sbatch RUN.yaml": "unknown option --node",
    "sbatch --nodes four experiments/launch/slurm.sbatch RUN.yaml": "--nodes: not a value",
    "sbatch experiments/launch/slurm.batch RUN.yaml": "Unable to open file",
    f"sky jobs launch {SKY} --env RECIPES=RUN.yaml": "does not use RECIPES",
    f"sky jobs launch {SKY} --envs RECIPE=RUN.yaml": "unknown option --envs",
    f"sed s/use_spot/usespot/ {SKY} > sky.yaml; sky jobs launch sky.yaml": "unknown field resources.usespot",
    "wandb synk runs/small": "No such command",
}


@pytest.mark.parametrize("line", MISTAKES)
@pytest.mark.usefixtures("servers")
def test_a_line_with_a_mistake_fails(tools: Tools, line: str) -> None:
    done = run_line(line, tools)
    assert done.returncode != 0 and MISTAKES[line] in done.stdout + done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "torchrun --nproc_per_nodes 8 -m lit_transdiff train RUN.yaml",
        "torchrun --nproc_per_node 8 lit_transdiff train RUN.yaml",
        "torchrun --nproc_per_node 8 -m lit_transdif train RUN.yaml",
        "torchrun --nproc_per_node 8 -m lit_transdiff trian RUN.yaml",
        "lit-transdiff train RUN.yaml training.max_stepps=1",
    ],
)
def test_a_started_command_with_a_mistake_fails(words: str) -> None:
    with pytest.raises((SystemExit, ValueError, AssertionError)):
        check_started(words.split())


@pytest.mark.parametrize(
    "tool, allowed",
    [
        ("docker build", options.DOCKER_BUILD),
        ("docker run", options.DOCKER_RUN),
        ("kubectl apply", options.KUBECTL_APPLY),
    ],
)
def test_the_real_tool_has_the_options_of_its_stub(tool: str, allowed: str) -> None:
    """Where it is on this machine."""
    command, other = tool.split()
    if shutil.which(command) is None:
        pytest.skip(f"no {command} on this machine")
    line = [command, other, "--help"]
    text = subprocess.run(
        line, capture_output=True, text=True, env={**os.environ, "DOCKER_BUILDKIT": "0"}, check=False
    )
    if command == "kubectl":
        text.stdout += subprocess.run([command, "options"], capture_output=True, text=True, check=True).stdout
    for option in allowed.split():
        assert re.search(rf"(^|[\s,]){option.rstrip('=')}[\s,=]", text.stdout), option
