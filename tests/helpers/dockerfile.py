"""The steps of the Dockerfile without Docker, each in a layer over the files of this machine (Linux, root):

    python -m tests.helpers.dockerfile /tmp/image DEVICE=gpu -- plan --help

The images of FROM are not fetched: the first layer is this machine, without its variables. Nothing outside of
the folder changes. At the end the ENTRYPOINT runs with the rest of the line.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
BASE = {"PATH": f"{Path(sys.base_prefix) / 'bin'}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
MOUNT = """
mount -t overlay overlay -o lowerdir=/,upperdir=$1/files,workdir=$1/work $1/root
for place in proc dev sys; do mount --rbind /$place $1/root/$place; done
exec chroot ${2:+--userspec=$2} $1/root bash -ec "$3"
"""


class Stage:
    """A stage of the build: its files, variables, user and place."""

    def __init__(self, folder: Path, given: dict[str, str]) -> None:
        self.folder, self.given = folder, given
        self.user, self.place, self.variables = "", "/", dict(BASE)
        for part in ("files", "work", "root"):
            (folder / part).mkdir(parents=True)
        # Also the user of the image may pass the folders of this machine's Python.
        (folder / "files" / Path(sys.base_prefix).relative_to("/")).mkdir(parents=True)

    def step(self, word: str, rest: str, stages: dict[str, Stage]) -> None:
        """Carry out an instruction."""
        if word == "ARG":
            name, _, default = rest.partition("=")
            self.variables[name] = self.given.get(name, default)
        elif word == "ENV":
            pairs = (part.partition("=") for part in shlex.split(rest))
            self.variables |= {
                name: value.replace("$PATH", self.variables["PATH"]) for name, _, value in pairs
            }
        elif word == "WORKDIR":
            self.place = rest
        elif word == "USER":
            self.user = rest.replace("$USER_ID", self.variables["USER_ID"])
        elif word == "COPY":
            self.copy(*rest.split(), stages=stages)
        elif word == "RUN":
            self.run(rest)

    def run(self, script: str) -> None:
        """Run a script in the stage."""
        print(f"RUN {script}", flush=True)
        script = f"mkdir -p {self.place} && cd {self.place}\n{script}"
        line = ["unshare", "--mount", "bash", "-ec", MOUNT, "-", str(self.folder), self.user, script]
        subprocess.run(line, env=self.variables, check=True)

    def copy(self, *names: str, stages: dict[str, Stage]) -> None:
        """Copy files of the repository, or a folder of another stage."""
        *sources, target = names
        goal = self.folder / "files" / Path(self.place, target).relative_to("/")
        if sources[0].startswith("--from="):
            other = stages[sources[0].removeprefix("--from=")].folder / "files"
            shutil.copytree(other / sources[1].lstrip("/"), goal, symlinks=True)
            return
        line = ["git", "ls-files", "-co", "--exclude-standard", "-X", ".dockerignore", *sources]
        for name in subprocess.run(
            line, cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.splitlines():
            (goal / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, goal / name)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """The instructions of a Dockerfile."""
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE)
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line:
            word, _, rest = line.partition(" ")
            yield word, rest


def main() -> None:
    folder, *rest = sys.argv[1:]
    arguments = rest[rest.index("--") + 1 :]
    given = dict(pair.split("=", 1) for pair in rest[: rest.index("--")])
    stages: dict[str, Stage] = {}
    entry: list[str] = []
    for word, text in instructions((ROOT / "Dockerfile").read_text()):
        if word == "FROM":
            stage = stages[text.partition(" AS ")[2]] = Stage(Path(folder) / str(len(stages)), given)
        elif word == "ENTRYPOINT":
            entry = json.loads(text)
        elif stages:
            stage.step(word, text, stages)
    stage.run(shlex.join([*entry, *arguments]))


if __name__ == "__main__":
    main()
