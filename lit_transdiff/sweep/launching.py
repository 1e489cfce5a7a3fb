"""The place where trials of a sweep run: its settings (``launcher:``), and the protocol of launchers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Optional, Protocol

from lit_transdiff.config import require, require_known
from lit_transdiff.config.typed import section

TIME = re.compile(r"\d+(:\d\d){0,2}|\d+-\d+(:\d\d){0,2}")  # the forms of sbatch


@dataclass(frozen=True)
class LauncherConfig:
    """The place where trials run. All settings but ``kind`` and ``parallel`` are for SLURM."""

    kind: Literal["local", "slurm"] = "local"  # processes of this machine, or a job of SLURM per trial
    parallel: Optional[int] = None
    # trials at once; null: as many as the GPUs allow, one on CPUs; 8 jobs of SLURM
    nodes: int = 1  # nodes of a trial
    tasks_per_node: int = 1  # processes of a trial on each node: one per GPU
    gpus_per_node: Optional[int] = None  # null: tasks_per_node; 0: none
    cpus_per_task: Optional[int] = None  # cores of each process
    memory: Optional[str] = None  # memory of each node, as in 200G; null: the partition's default
    time: Optional[str] = None  # time limit of a job, as in 24:00:00 or 2-00; null: the partition's
    partition: Optional[str] = None  # the partition's name
    account: Optional[str] = None  # the account that is charged
    signal_seconds: int = 180  # seconds before the time limit at which a trial saves and is requeued
    retries: int = 0  # further attempts that a failed trial gets at once; --tries limits all attempts
    poll_seconds: float = 15.0  # seconds between two looks at the queue
    setup: list[str] = field(default_factory=list)  # shell lines before srun, as in module load cuda
    sbatch: list[str] = field(default_factory=list)  # further options of sbatch, as in --qos=high

    def __post_init__(self) -> None:
        for name in ("parallel", "nodes", "tasks_per_node", "cpus_per_task"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"launcher.{name}", value, "at least 1")
        for name in ("gpus_per_node", "retries", "signal_seconds"):
            value = getattr(self, name)
            require(value is None or value >= 0, f"launcher.{name}", value, "0 or more")
        for name in ("memory", "partition", "account"):
            value = getattr(self, name)
            fits = value is None or re.fullmatch(r"[\w.,-]+", value) is not None
            require(fits, f"launcher.{name}", value, "a word")
        forms = "minutes, hours:minutes:seconds or days-hours, as in 90, 24:00:00 or 2-00"
        require(self.time is None or TIME.fullmatch(self.time) is not None, "launcher.time", self.time, forms)
        require(0.1 <= self.poll_seconds <= 3600, "launcher.poll_seconds", self.poll_seconds, "0.1 to 3600")
        for word in self.sbatch:
            require(word.startswith("-"), "launcher.sbatch", word, "options of sbatch, as in --qos=high")


def launcher_from(given: Any) -> LauncherConfig:
    """The settings of the ``launcher:`` section of a sweep file."""
    require(isinstance(given, dict), "launcher", given, "settings (key: value), as in kind: slurm")
    names = [each.name for each in fields(LauncherConfig)]
    for key in given:
        require_known("launcher", key, names)
    config: LauncherConfig = section(given, LauncherConfig, "launcher")
    return config


def changed_launcher(config: LauncherConfig, options: Mapping[str, Any]) -> LauncherConfig:
    """The settings with the options of the command line that are given (not None)."""
    given = {key: value for key, value in options.items() if value is not None}
    changed = replace(config, **given)
    for key, value in given.items():
        fits = key == "kind" or changed.kind == "slurm"
        require(fits, f"--{key.replace('_', '-')}", value, "only with --launcher slurm")
    return changed


@dataclass(frozen=True)
class Order:
    """The command of a trial, with its environment and the file of its output."""

    id: str
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path


@dataclass(frozen=True)
class Outcome:
    """The end of a job: exit code, the scheduler's word, and whether the machine caused it."""

    code: int
    reason: str = ""
    lost: bool = False


class TrialJob(Protocol):
    """A trial that was started."""

    @property
    def record(self) -> Mapping[str, Any]:
        """The entries of the journal about it."""

    @property
    def where(self) -> str:
        """Its place in words."""

    @property
    def stopping(self) -> bool:
        """Whether an earlier controller has asked it to end."""

    def outcome(self) -> Outcome | None:
        """The end of the job; None while it runs or waits."""

    def stop(self) -> None:
        """Ask it to save and end."""

    def kill(self) -> None:
        """End it at once."""


class Launcher(Protocol):
    """Starts trials somewhere."""

    poll: float  # seconds between two looks at the jobs
    patience: float  # seconds for a trial to end when asked

    def has_room(self) -> bool:
        """Whether another trial may start."""

    def start(self, order: Order) -> TrialJob | None:
        """Start a trial; None if the scheduler cannot take it at the moment."""

    def adopt(self, orders: Sequence[Order], known: Mapping[str, Mapping[str, Any]]) -> dict[str, TrialJob]:
        """The jobs that an earlier controller has left, by trial; ``known`` are their records."""

    def look(self) -> None:
        """Bring the state of all jobs up to date."""

    def end(self, job: TrialJob) -> None:
        """Forget a job that has ended, after the journal has its end."""

    def leave(self, jobs: Sequence[TrialJob]) -> str:
        """End or leave the jobs when the controller ends; returns a sentence about them, or ""."""


def launcher_of(config: LauncherConfig, sweep: str, folder: Path, devices_per_run: int) -> Launcher:
    """The launcher of a sweep of this name in ``folder``."""
    if config.kind == "slurm":
        from lit_transdiff.sweep.slurm import SlurmLauncher

        allowed = "1 with --launcher slurm; --tasks-per-node gives the GPUs of a node"
        require(devices_per_run == 1, "--devices-per-run", devices_per_run, allowed)
        return SlurmLauncher(config, sweep, folder)
    from lit_transdiff.sweep.local import LocalLauncher, slots_of

    return LocalLauncher(slots_of(config.parallel, devices_per_run), folder)
