"""The tools, ``python commands.py NAME WORDS``: options and files are checked as by the real ones,
more strictly: each file, image, service, bucket and build argument must be there. What would start is written
down as a line of ``$STUB_TOOLS/started``; scripts run on this machine.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import yaml

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.helpers.dockerfile import instructions
from tests.helpers.tools_stub import options

Given = dict[str, list[str]]
SECONDS = r"\d+(?:-\d+)?(?::\d+){0,2}"
VALUES = {  # what an option of SLURM or Docker takes
    "--nodes": r"\d+(-\d+)?",
    "--array": r"\d+(-\d+)?(,\d+(-\d+)?)*(%\d+)?",
    "--signal": r"([RB]{1,2}:)?(USR[12]|TERM|\d+)(@\d+)?",
    "--time": SECONDS,
    "--ntasks": r"\d+",
    "--ntasks-per-node": r"\d+",
    "--gpus-per-node": r"(\w+:)?\d+",
    "--gpus": r"(all|(device=)?[\d,]+)",
    "--cpus-per-task": r"\d+",
    "--open-mode": "append|truncate",
    "--kill-on-bad-exit": "[01]",
    "--wait": r"\d+",
    "--shm-size": r"\d+[bkmg]?",
    "--tag": r"[\w./-]+(:[\w.-]+)?",
}


def fail(text: str) -> NoReturn:
    sys.exit(f"{sys.argv[1]}: {text}")


def need(condition: object, text: str) -> None:
    if not condition:
        fail(text)


def split(words: list[str], allowed: str, more: bool = False) -> tuple[Given, list[str]]:
    """Options with their values, and the other words; with ``more`` all words after the first other one."""
    given, others, words = defaultdict[str, list[str]](list), [], [*words]
    known = {word.rstrip("="): word.endswith("=") for word in allowed.split()}
    while words:
        name, equals, value = words.pop(0).partition("=")
        if not name.startswith("-") or name == "-":
            others.append(name + equals + value)
            if more:
                break
            continue
        need(name in known, f"unknown option {name}")
        need(known[name] or not equals, f"{name} takes no value")
        if known[name] and not equals:
            need(words, f"{name} needs a value")
            value = words.pop(0)
        need(re.fullmatch(VALUES.get(name, ".*"), value), f"{name}: not a value: {value!r}")
        given[name].append(value)
    return given, others + words


def start(words: list[str]) -> None:
    with open(Path(os.environ["STUB_TOOLS"]) / "started", "a") as file:
        print(json.dumps(words), file=file)


def check_fields(value: Any, fields: dict[str, Any] | None, path: str = "") -> None:
    """Refuse a field that the schema does not have; ``*`` are names of the user."""
    if isinstance(value, list):
        for item in value:
            check_fields(item, fields, path)
    elif fields is not None and isinstance(value, dict):
        for name, inner in value.items():
            need(name in fields or "*" in fields, f"unknown field {path}{name}")
            check_fields(inner, fields.get(name, fields.get("*")), f"{path}{name}.")


# Docker


def image_name(name: str) -> str:
    return name if ":" in name else f"{name}:latest"


def images() -> Path:
    folder = Path(os.environ["STUB_TOOLS"]) / "images"
    folder.mkdir(exist_ok=True)
    return folder


def build(file: Path, context: Path, arguments: dict[str, str], tags: list[str]) -> None:
    """The checks of Docker before a build, and the choices of RUN lines by a build argument."""
    need(context.is_dir(), f"no folder {context}")
    need(file.is_file(), f"no file {file}")
    steps = list(instructions(file.read_text()))
    declared = dict(text.partition("=")[::2] for word, text in steps if word == "ARG")
    for name in arguments:
        need(name in declared, f"build argument {name} is not one of {', '.join(declared)}")
    for word, text in steps:
        if word == "COPY" and not text.startswith("--from"):
            for source in text.split()[:-1]:
                need((context / source).exists(), f"COPY: no file {source}")
        elif word == "RUN" and text.startswith("case "):
            script = re.sub(r"\S+/bin/pip", "true", text)
            done = subprocess.run(["bash", "-c", script], env={**declared, **arguments}, check=False)
            need(done.returncode == 0, f"RUN {text} failed")
    (entry,) = (json.loads(text) for word, text in steps if word == "ENTRYPOINT")
    for tag in tags:
        (images() / image_name(tag).replace("/", "_")).write_text(json.dumps(entry))


def run_image(name: str, words: list[str], volumes: list[str]) -> None:
    image = images() / image_name(name).replace("/", "_")
    need(image.is_file(), f"no image {name}")
    for volume in volumes:
        source, _, target = volume.partition(":")
        need(target.startswith("/"), f"not a mount: {volume}")
        need(Path(source).is_dir(), f"no folder {source} to mount")
    start([*json.loads(image.read_text()), *words])


def docker(words: list[str]) -> None:
    command, *rest = words
    if command == "build":
        given, places = split(rest, options.DOCKER_BUILD)
        need(len(places) == 1, "build takes one PATH")
        (context,) = map(Path, places)
        file = Path(*given["--file"] or given["-f"] or [context / "Dockerfile"])
        arguments = dict(pair.split("=", 1) for pair in given["--build-arg"])
        build(file, context, arguments, given["--tag"] + given["-t"])
    elif command == "run":
        given, others = split(rest, options.DOCKER_RUN, more=True)
        need(others, "run needs an IMAGE")
        run_image(others[0], others[1:], given["--volume"] + given["-v"])
    elif command == "compose":
        need(rest[:1] == ["run"], f"unknown command: compose {rest[:1]}")
        compose_run(rest[1:])
    else:
        fail(f"unknown command: {command}")


def compose_run(words: list[str]) -> None:
    given, others = split(words, options.COMPOSE_RUN, more=True)
    need(Path("compose.yaml").is_file(), "no configuration file")
    services = yaml.safe_load(Path("compose.yaml").read_text())["services"]
    need(others and others[0] in services, f"no such service: {others[:1]}")
    service = services[others[0]]
    if "--build" in given:
        context = Path(service["build"]["context"])
        filled = {
            name: re.sub(r"\$\{\w+:-(.*)\}", r"\1", value) for name, value in service["build"]["args"].items()
        }
        build(context / "Dockerfile", context, filled, [service["image"]])
    run_image(service["image"], others[1:] or service["command"], service["volumes"])


# Clusters and buckets


def kubectl(words: list[str]) -> None:
    need(words[:1] == ["apply"], f"unknown command: {words[:1]}")
    given, others = split(words[1:], options.KUBECTL_APPLY)
    (name,) = given["-f"] or given["--filename"] or [""]
    need(not others and name, "apply takes -f FILE")
    need(name == "-" or Path(name).is_file(), f"the path {name} does not exist")
    job = yaml.safe_load(sys.stdin.read() if name == "-" else Path(name).read_text())
    need((job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob"), "no matches for kind")
    check_fields(job, options.PYTORCH_JOB)
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        pod = replica["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            need(re.fullmatch(r"[\w.:/-]+", container["image"]), f"couldn't parse image {container['image']}")
            for mount in container["volumeMounts"]:
                need(mount["name"] in volumes, f"no volume {mount['name']}")
            start(container["command"])


def sky(words: list[str]) -> None:
    need(words[:2] == ["jobs", "launch"], f"no such command: {words[:2]}")
    given, places = split(words[2:], options.SKY_JOBS_LAUNCH)
    need(len(places) == 1 and Path(places[0]).is_file(), f"no file {places}")
    task = yaml.safe_load(Path(places[0]).read_text())
    check_fields(task, options.SKY_TASK)
    chosen = dict(pair.split("=", 1) for pair in given["--env"])
    for name in chosen:
        need(name in task["envs"], f"{places[0]} does not use {name}")
    need((Path(task["workdir"]) / "constraints.txt").is_file(), "no constraints.txt in the workdir")
    home = Path(os.environ["STUB_TOOLS"]) / "home"
    (home / "venv" / "bin").mkdir(parents=True, exist_ok=True)
    (home / "venv" / "bin" / "activate").touch()
    of_node = {
        "NUM_NODES": "2",
        "NUM_GPUS_PER_NODE": "8",
        "TASK_ID": "job-1",
        "NODE_IPS": "10.0.0.1\n10.0.0.2",
    }
    variables = {f"SKYPILOT_{name}": value for name, value in of_node.items()}
    given_all = {**os.environ, **variables, "HOME": str(home), **task["envs"], **chosen}
    sys.exit(
        subprocess.run(
            ["bash", "-c", task["run"]], env=given_all, cwd=task["workdir"], check=False
        ).returncode
    )


def aws(words: list[str]) -> None:
    import boto3

    need(words[:1] == ["s3"] and words[1:2] and words[1] in options.AWS_S3, f"no such command: {words[:2]}")
    _, places = split(words[2:], options.AWS_S3[words[1]])
    client = boto3.client("s3")
    bucket, _, key = places[-1].removeprefix("s3://").partition("/")
    need(places[-1].startswith("s3://"), f"not a URL: {places[-1]}")
    if words[1] == "rm":
        client.head_object(Bucket=bucket, Key=key)  # an error if it is not there
        client.delete_object(Bucket=bucket, Key=key)
        return
    folder = Path(places[0])
    need(len(places) == 2 and folder.is_dir(), f"the user-provided path {folder} does not exist")
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(file), bucket, f"{key}/{file.relative_to(folder)}")


def sbatch(words: list[str]) -> None:
    given, others = split(words, options.SBATCH, more=True)
    need(others and Path(others[0]).is_file(), f"Unable to open file {others[:1]}")
    for line in re.findall(r"^#SBATCH (.*)$", Path(others[0]).read_text(), flags=re.MULTILINE):
        header, rest = split(line.split(), options.SBATCH)
        need(not rest, f"#SBATCH {line}")
        given = {**header, **given}
    print("Submitted batch job 1000")
    of_job = {"JOB_ID": "1000", "SUBMIT_DIR": os.getcwd(), "ARRAY_JOB_ID": "1000", "ARRAY_TASK_ID": "1"}
    variables = {**os.environ, **{f"SLURM_{name}": value for name, value in of_job.items()}}
    sys.exit(subprocess.run(["bash", *others], env=variables, stdout=sys.stderr, check=False).returncode)


def srun(words: list[str]) -> None:
    need("SLURM_JOB_ID" in os.environ, "not in a job")
    _, command = split(words, options.SRUN, more=True)
    start(command)


def python(words: list[str]) -> None:
    """The start of ranks is only written down."""
    if words[:1] == ["-m"] and words[1] in ("torch.distributed.run", "lit_transdiff"):
        start(["python", *words])
    else:
        os.execv(sys.executable, [sys.executable, *words])


def wandb(words: list[str]) -> None:
    """The real one, but for an agent, which would train."""
    if words[0] == "agent":
        need(len(words) == 2 and len(words[1].split("/")) == 3, f"not a sweep: {words[1:]}")
        start(["wandb", *words])
    else:
        os.execv(sys.executable, [sys.executable, "-m", "wandb", *words])


def pip(words: list[str]) -> None:
    need(words[:1] == ["install"], f"unknown command: {words[:1]}")
    given, places = split(words[1:], options.PIP_INSTALL)
    for place in places + given["-e"] + given["--editable"]:
        folder, _, extra = place.rstrip("]").partition("[")
        files = [Path(folder, name) for name in ("setup.py", "pyproject.toml")]
        need(
            any(file.is_file() for file in files),
            f"{place} is not a package here, and this program is in no index",
        )
        text = "".join(file.read_text() for file in files if file.is_file())
        need(not extra or re.search(rf'"{extra}": \[', text), f"{place}: no extra {extra}")


def make(words: list[str]) -> None:
    os.execv("/usr/bin/make", ["make", "--dry-run", *words])


def torchrun(words: list[str]) -> None:
    start(["torchrun", *words])


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    function.__name__: function
    for function in (docker, kubectl, sky, aws, sbatch, srun, python, wandb, pip, make, torchrun)
}

if __name__ == "__main__":
    COMMANDS[sys.argv[1]](sys.argv[2:])
