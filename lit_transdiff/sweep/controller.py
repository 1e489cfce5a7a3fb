"""``lit-transdiff sweep``: run the trials of a W&B sweep file as processes of this machine, without a server.

The controller takes the role of W&B's server and agents: it chooses settings, starts a trial on each free
slot of devices, reads the metric from the trial's files, stops trials early, and keeps a journal, so that the
same command continues after a kill. A trial that was running at that time is started again with its settings
and continues from its checkpoint. Each call of the command also retries failed trials once, up to ``--tries``
attempts in total.
"""

from __future__ import annotations

import difflib
import math
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lit_transdiff.base.endings import EXIT_INTERRUPTED, EXIT_REQUEUE, TrialsFailed, ending_when_asked, leave
from lit_transdiff.config import require
from lit_transdiff.sweep.command import trial_command, write_parameters
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.sweep.processes import KILL_AFTER, end_orphans, signal_group, wait_or_kill
from lit_transdiff.sweep.search import next_settings, to_stop
from lit_transdiff.sweep.trial import Trial, TrialState
from lit_transdiff.sweep.values import logged_names, logged_values
from lit_transdiff.tracking.place import SWEEP_FOLDER, TrialPlace

POLL = 0.5  # seconds between checks of the trials
TRIES = 3  # attempts of a trial, over all calls of the command
HOPELESS = 3  # this many failures without any success end the sweep
Slot = tuple[int, ...]  # GPUs of one trial; empty on CPUs


@dataclass
class Agent:
    """A running trial with its process and devices."""

    trial: Trial
    process: subprocess.Popen[bytes]
    slot: Slot
    old: list[float] = field(default_factory=list)  # values left by a failed earlier attempt
    stopped_at: float | None = None


def slots_of(agents: int | None, devices_per_run: int) -> list[Slot]:
    """The GPUs of ``agents`` concurrent trials; default: as many trials as the GPUs allow, or one on CPUs."""
    gpus = torch.cuda.device_count()
    if gpus == 0:
        return [()] * (agents or 1)
    require(
        devices_per_run <= gpus,
        "--devices-per-run",
        devices_per_run,
        f"at most the {gpus} GPUs of this machine",
    )
    slots = [
        tuple(range(i, i + devices_per_run)) for i in range(0, gpus - devices_per_run + 1, devices_per_run)
    ]
    require(
        agents is None or agents <= len(slots),
        "--agents",
        agents,
        f"at most {len(slots)} of {devices_per_run} GPUs each",
    )
    return slots[:agents]


class Controller:
    """The controller of one sweep in one folder."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        seed: int,
        slots: list[Slot],
        say: Callable[[str], None],
        tries: int = TRIES,
        hours: float = math.inf,
    ) -> None:
        self.sweep = sweep
        self.deadline = time.monotonic() + 3600 * hours  # no trial starts after it
        self.folder = folder.resolve()
        self.seed = seed
        self.free = list(slots)
        self.say = say
        self.journal = SweepJournal(self.folder, sweep, seed)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.trials = self.journal.read()
        self.retry(tries)
        self.again = [trial for trial in self.trials if trial.state == "running"]
        self.live: list[Agent] = []
        self.asked: list[int] = []  # the signals received so far

    def retry(self, tries: int) -> None:
        """Retry failed trials with fewer than ``tries`` attempts, or all if no trial ever succeeded."""
        always = hopeless(self.trials)
        for trial in self.trials:
            if trial.state == "failed" and (always or trial.failures < tries):
                self.journal.write("again", id=trial.id)
                trial.begin_again()

    def run(self) -> list[Trial]:
        """Run trials until the search is exhausted and every trial has ended.

        A signal ends the running trials and raises ``Preempted``; the same command continues them. The signal
        is handled between two checks, because in the middle of a start it would leave a trial without a
        controller. A second Ctrl-C does not wait for the trials, which still save and end.
        """
        with ending_when_asked(lambda number, _: self.asked.append(number)):
            self.until_asked()
        if self.asked:
            leave(self.asked[0], None)
        return self.trials

    def until_asked(self) -> None:
        """Run trials until the end or a signal; no trial outlives this call."""
        try:
            if self.again:
                end_orphans({trial.id for trial in self.again}, self.folder)
            while not self.asked and (self.fill() or self.live):
                time.sleep(POLL)
                for agent in [agent for agent in self.live if agent.process.poll() is not None]:
                    self.end(agent)
                for agent in self.live:
                    agent.trial.values = self.new_values(agent)
                self.stop_losers()
                self.check_hope()
        finally:
            for agent in self.live:  # the journal lists them as running, so the same command continues them
                signal_group(agent.process.pid, signal.SIGTERM)
            for agent in self.live:
                wait_or_kill(agent.process)

    def fill(self) -> bool:
        """Start trials on free slots and return whether one was started."""
        started = False
        while self.free and time.monotonic() < self.deadline:
            if self.again:
                trial = self.again.pop(0)
            else:
                settings = next_settings(self.sweep, self.trials, self.seed)
                if settings is None:
                    break
                trial = Trial(secrets.token_hex(4), settings)
                self.journal.write("start", id=trial.id, settings=settings)
                self.trials.append(trial)
            self.start(trial, self.free.pop(0))
            started = True
        return started

    def place(self, trial: Trial) -> Path:
        """The trial's run folder."""
        return self.folder / TrialPlace(trial.id, self.sweep.name, self.folder, trial.settings).name

    def start(self, trial: Trial, slot: Slot) -> None:
        """Start a process in its own group, with the environment that an agent gives to a trial."""
        parameters = self.folder / "logs" / f"{trial.id}.yaml"
        write_parameters(trial.settings, parameters)
        command = trial_command(
            self.sweep.command, self.sweep.program, trial.settings, parameters.with_suffix(".json")
        )
        environment = {
            **os.environ,
            "WANDB_RUN_ID": trial.id,
            "WANDB_RUN_GROUP": self.sweep.name,
            "WANDB_SWEEP_PARAM_PATH": str(parameters),
            "WANDB_DIR": str(self.place(trial)),
            SWEEP_FOLDER: str(self.folder),
        }
        environment |= {"CUDA_VISIBLE_DEVICES": ",".join(map(str, slot))} if slot else {}
        self.place(trial).mkdir(exist_ok=True)
        old = self.values(trial) if trial.failures else []
        with open(self.folder / "logs" / f"{trial.id}.log", "ab") as log:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.journal.write("process", id=trial.id, pid=process.pid)
        self.live.append(Agent(trial, process, slot, old))
        attempt = f", attempt {trial.failures + 1}" if trial.failures else ""
        self.say(
            f"start     {self.place(trial).name}{attempt}"
            + (f" on GPU {','.join(map(str, slot))}" if slot else "")
        )

    def values(self, trial: Trial) -> list[float]:
        """The values of the sweep's metric logged by the trial so far, in order."""
        return logged_values(self.place(trial), self.sweep.metric) if self.sweep.metric is not None else []

    def new_values(self, agent: Agent) -> list[float]:
        """``values``, but empty while the files still have exactly the values of a failed attempt."""
        values = self.values(agent.trial)
        return [] if repr(values) == repr(agent.old) else values  # repr, because NaN is not NaN

    def stop_losers(self) -> None:
        """Early termination: SIGTERM, so that a trial can save its state, and SIGKILL if it does not end."""
        if self.sweep.early_terminate is not None:
            lost = {
                trial.id for trial in to_stop(self.sweep.early_terminate, self.trials, self.sweep.maximize)
            }
            for agent in self.live:
                if agent.trial.id in lost and agent.stopped_at is None and agent.process.poll() is None:
                    agent.stopped_at = time.monotonic()
                    self.say(
                        f"stop      {self.place(agent.trial).name} after {len(agent.trial.values)} values"
                    )
                    signal_group(agent.process.pid, signal.SIGTERM)
        for agent in self.live:
            if agent.stopped_at is not None and time.monotonic() - agent.stopped_at > KILL_AFTER:
                signal_group(agent.process.pid, signal.SIGKILL)

    def end(self, agent: Agent) -> None:
        """Record the outcome of a trial."""
        trial, code = agent.trial, agent.process.returncode
        self.live.remove(agent)
        self.free.append(agent.slot)
        if code in (EXIT_REQUEUE, EXIT_INTERRUPTED) and agent.stopped_at is None:  # stopped from outside
            self.again.append(trial)
            self.say(f"again     {self.place(trial).name}")
            return
        state: TrialState = (
            "stopped" if agent.stopped_at is not None else "finished" if code == 0 else "failed"
        )
        trial.end(state, self.values(trial) if code == 0 else self.new_values(agent))
        self.journal.write("end", id=trial.id, state=trial.state, values=trial.values)
        self.check_metric(trial)
        best = trial.best(self.sweep.maximize)
        told = f", best {self.sweep.metric} {best:.5g}" if best is not None else ""
        told += ", the last is not a number" if trial.diverged else ""
        told += (
            f", exit status {code}: see {self.folder / 'logs' / trial.id}.log"
            if trial.state == "failed"
            else ""
        )
        self.say(f"{trial.state:9} {self.place(trial).name}{told}")

    def check_metric(self, trial: Trial) -> None:
        """Warn if the first finished trial has logged no usable value of the sweep's metric."""
        metric = self.sweep.metric
        first = [trial.state for trial in self.trials].count("finished") == 1
        if metric is None or trial.finite() or trial.state != "finished" or not first:
            return
        if trial.values:
            return self.say(f"warning   metric.name: the trial has logged no finite value of {metric!r}")
        names = logged_names(self.place(trial))
        near = difflib.get_close_matches(metric, names, n=3, cutoff=0.3) or names
        self.say(
            f"warning   metric.name: the trial has not logged {metric!r}, but {', '.join(near) or 'nothing'}"
        )

    def check_hope(self) -> None:
        """Raise ``TrialsFailed`` if the sweep's first trials have all failed."""
        if hopeless(self.trials):
            ended = [trial for trial in self.trials if trial.state == "failed"]
            log = self.folder / "logs" / f"{ended[-1].id}.log"
            raise TrialsFailed(
                f"the first {len(ended)} trials all failed; see {log}. The same command tries them again."
            )


def hopeless(trials: list[Trial]) -> bool:
    """Whether at least ``HOPELESS`` trials have failed and none has ended in another way."""
    ended = [trial.state for trial in trials if trial.state != "running"]
    return len(ended) >= HOPELESS and set(ended) == {"failed"}


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    agents: int | None = None,
    devices_per_run: int = 1,
    seed: int = 0,
    tries: int = TRIES,
    hours: float = math.inf,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """Run or continue a sweep to its end, or for so many ``hours``; the trials are run folders in
    ``folder``.
    """
    require(tries >= 1, "--tries", tries, "at least 1")
    return Controller(sweep, folder, seed, slots_of(agents, devices_per_run), say, tries, hours).run()
