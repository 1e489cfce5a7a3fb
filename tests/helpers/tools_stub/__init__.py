"""The tools of containers and clusters on the PATH of a test, without what they talk to."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.helpers.tools_stub import commands


class Tools:
    """Stubs in a folder, and what they would have started; ``environment`` makes them those of a process."""

    def __init__(self, folder: Path) -> None:
        self.state = folder / "tools"
        (self.state / "bin").mkdir(parents=True)
        for tool in commands.COMMANDS:
            file = self.state / "bin" / tool
            file.write_text(f'#!/bin/sh\nexec {sys.executable} -E {commands.__file__} {tool} "$@"\n')
            file.chmod(0o755)
        self.environment = {
            "STUB_TOOLS": str(self.state),
            "PATH": f"{self.state / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        }

    def started(self) -> list[list[str]]:
        """The commands that were started since the last call."""
        file = self.state / "started"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]
