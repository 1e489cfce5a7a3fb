"""Programs in processes that are forked from a server which has done the imports once: a start takes
milliseconds instead of ten seconds. Otherwise these are processes as a user starts them, with a session,
signals, environment, output and exit code of their own; a torchrun among them forks its ranks.

``python -m tests.helpers.forks MODULE ARGUMENTS`` is what each rank does.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from types import ModuleType

from lightning.fabric.utilities.rank_zero import rank_zero_only

from lit_transdiff.base.endings import STOP_SIGNALS
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import to_dict
from lit_transdiff.data.processes import PRELOAD, clean_context
from tests.helpers.processes import ENVIRONMENT, free_port
from tests.helpers.small import ROOT

PROGRAM = "lit_transdiff.__main__"
# Options of torchrun, which looks so often (in seconds) that it sees which rank ended first.
FORKED_RANKS = ("--monitor_interval", "0.01", "--start_method", "fork", "--run_path", __file__)
# A process has one server, which also forks its data workers.
PRELOAD.extend([PROGRAM, "lit_transdiff.cli.pipeline", "torch.distributed.run", __name__])
CONTEXT = clean_context()


class Forked(CONTEXT.Process):  # type: ignore[name-defined, misc]
    """A program; names as in ``subprocess.Popen``."""

    def __init__(self, module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
        super().__init__(target=run, args=(module, arguments, log, environment))
        self.start()

    def poll(self) -> int | None:
        return self.exitcode

    def wait(self, timeout: float) -> int:
        self.join(timeout)
        if self.exitcode is None:
            raise subprocess.TimeoutExpired(self.name, timeout)
        return self.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def forked(
    processes: int, module: str, *arguments: str, log: Path, elastic: tuple[str, ...] = (), **environment: str
) -> Forked:
    """Start ``main`` of a module with arguments, through torchrun when there are several processes, and do
    not wait for it; ``log`` gets its output.
    """
    line = [module, *arguments]
    if processes > 1:
        torchrun = ["torch.distributed.run", "--nproc_per_node", str(processes), *elastic]
        line = [*torchrun, "--master_addr", "127.0.0.1", "--master_port", free_port(), *FORKED_RANKS, *line]
    return Forked(line[0], line[1:], log, ENVIRONMENT | environment)


def run_forked(processes: int, module: str, *arguments: str, timeout: float = 300) -> str:
    """Run to the end; fails with the output."""
    with tempfile.NamedTemporaryFile("r", suffix=".log") as log:
        process = forked(processes, module, *arguments, log=Path(log.name))
        try:
            code = process.wait(timeout)
        finally:
            process.kill()
        output = log.read()
    assert code == 0, output
    return output


def fit_all(folder: Path, processes: int, plan: list[tuple[RunConfig, int | None]]) -> str:
    """All fits of a plan in the same processes; see ``fits``. Returns the output."""
    file = folder / f"plan-{processes}-{len(plan)}.json"
    file.write_text(json.dumps([[to_dict(run), step] for run, step in plan]))
    return run_forked(processes, "tests.helpers.fits", str(file), timeout=900)


def run(module: str, arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    """The life of a forked process."""
    os.setsid()
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    run_main(module, arguments)


def run_main(module: str, arguments: list[str]) -> None:
    """Call ``main`` of a module, which hears its signals as a new process does.

    ``__main__`` is empty, because data workers import it.
    """
    sys.modules["__main__"] = ModuleType("__main__")
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = [module, *arguments]
    if code := import_module(module).main():
        sys.exit(code)


if __name__ == "__main__":
    rank_zero_only.rank = int(os.environ["RANK"])  # Lightning reads it when it is imported
    run_main(sys.argv[1], sys.argv[2:])
