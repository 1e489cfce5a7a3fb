"""The command line, and which processes it started and which modules each stage of a pipeline found.

``python -m tests.helpers.starts FILE COMMAND ...`` writes them to a JSON file.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from lit_transdiff.__main__ import main as command
from lit_transdiff.cli import pipeline
from lit_transdiff.config import RunConfig

# What Python reports when a process is made (sys.addaudithook).
STARTS = ("os.fork", "os.forkpty", "os.posix_spawn", "os.exec", "os.system", "subprocess.Popen")


def main() -> int:
    started: list[str] = []
    stages: list[tuple[str, int, list[str]]] = []
    train = pipeline.train

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event in STARTS:
            started.append(f"{event} {arguments[0] if arguments else ''}")

    def recorded(run: RunConfig) -> None:
        stages.append((run.name, os.getpid(), [*sys.modules]))
        train(run)

    sys.addaudithook(hear)
    pipeline.train = recorded
    status = command(sys.argv[2:])
    Path(sys.argv[1]).write_text(json.dumps({"started": started, "stages": stages}))
    return status


if __name__ == "__main__":
    sys.exit(main())
