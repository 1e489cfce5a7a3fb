"""``lit-transdiff sweep``: run the trials of a W&B sweep file on this machine or a cluster, without a server.

The controller takes the role of W&B's server and agents: it chooses settings, starts a trial wherever the
launcher has room, reads the metric from the trial's files, stops trials early, and keeps a journal, so that
the same command continues after a kill. A trial that was running at that time is found again, or started
again with its settings, and continues from its checkpoint. Each call of the command also retries failed
trials once, up to ``--tries`` attempts in total.
"""

from __future__ import annotations

import math
import secrets
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from lit_transdiff.base.endings import EXIT_INTERRUPTED, EXIT_REQUEUE, TrialsFailed, ending_when_asked, leave
from lit_transdiff.config import require
from lit_transdiff.sweep.command import trial_command, write_parameters
from lit_transdiff.sweep.definition import Sweep
from lit_transdiff.sweep.journal import SweepJournal
from lit_transdiff.sweep.launching import Launcher, LauncherConfig, Order, Outcome, TrialJob, launcher_of
from lit_transdiff.sweep.local import POLL
from lit_transdiff.sweep.search import next_settings, to_stop
from lit_transdiff.sweep.trial import Trial, TrialState, hopeless
from lit_transdiff.sweep.values import logged_values, no_value
from lit_transdiff.tracking.place import SWEEP_FOLDER, TrialPlace

TRIES = 3  # attempts of a trial, over all calls of the command
TIMES_LOST = 5  # this many losses of a trial's machine in a row, without a new value, are a failure


@dataclass
class Agent:
    """A running trial with its job."""

    trial: Trial
    job: TrialJob
    old: list[float] = field(default_factory=list)  # values left by a failed earlier attempt
    stopped_at: float | None = None


class Controller:
    """The controller of one sweep in one folder."""

    def __init__(
        self,
        sweep: Sweep,
        folder: Path,
        seed: int,
        launcher: Launcher,
        say: Callable[[str], None],
        tries: int = TRIES,
        hours: float = math.inf,
        retries: int = 0,
    ) -> None:
        self.sweep = sweep
        self.deadline = time.monotonic() + 3600 * hours  # no trial starts after it
        self.folder = folder.resolve()
        self.seed = seed
        self.launcher = launcher
        self.say = say
        self.tries = tries
        self.journal = SweepJournal(self.folder, sweep, seed)
        (self.folder / "logs").mkdir(exist_ok=True)
        self.trials = self.journal.read()
        self.retry()
        self.again = [trial for trial in self.trials if trial.state == "running"]
        self.live: list[Agent] = []
        self.asked: list[int] = []  # the signals received so far
        self.retries = retries  # further attempts of a failed trial in this call
        self.retried = Counter[str]()  # further attempts that each trial has had
        self.lost: dict[str, tuple[int, int]] = {}  # losses in a row, and the values before the last one

    def retry(self) -> None:
        """Retry failed trials that have attempts left, or all if no trial ever succeeded."""
        always = hopeless(self.trials)
        for trial in self.trials:
            if trial.state == "failed" and (always or trial.failures < self.tries):
                self.journal.write("again", id=trial.id)
                trial.begin_again()

    def run(self) -> list[Trial]:
        """Run trials until the search is exhausted and every trial has ended.

        A signal ends the running trials, unless they are jobs of a cluster, and raises ``Preempted``; the
        same command continues them. The signal is handled between two checks, because in the middle of a
        start it would leave a trial without a controller. A second Ctrl-C does not wait for the trials, which
        still save and end.
        """
        with ending_when_asked(lambda number, _: self.asked.append(number)):
            self.until_asked()
        if self.asked:
            leave(self.asked[0], None)
        return self.trials

    def until_asked(self) -> None:
        """Run trials until the end or a signal; then the launcher ends or leaves them."""
        try:
            self.adopt()
            while not self.asked and (self.fill() or self.live or self.again):
                self.wait()
                self.launcher.look()
                for agent in [agent for agent in self.live if agent.job.outcome() is not None]:
                    self.end(agent)
                for agent in self.live:
                    agent.trial.values = self.new_values(agent)
                self.stop_losers()
                self.check_hope()
        finally:
            if told := self.launcher.leave([agent.job for agent in self.live]):
                self.say(told)

    def wait(self) -> None:
        """Wait until the next look at the jobs, or for a signal."""
        until = time.monotonic() + self.launcher.poll
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(left, POLL))

    def adopt(self) -> None:
        """Take over the jobs of an earlier controller."""
        orders = [self.order(trial) for trial in self.again]
        jobs = self.launcher.adopt(orders, self.journal.records())
        for trial in [trial for trial in self.again if trial.id in jobs]:
            self.again.remove(trial)
            self.take(trial, jobs[trial.id])
            self.say(f"found     {self.place(trial).name}{jobs[trial.id].where}")

    def fill(self) -> bool:
        """Start trials while there is room and return whether one was started."""
        started = False
        while self.launcher.has_room() and time.monotonic() < self.deadline:
            if self.again:
                trial = self.again.pop(0)
            else:
                settings = next_settings(self.sweep, self.trials, self.seed)
                if settings is None:
                    break
                trial = Trial(secrets.token_hex(4), settings)
                self.journal.write("start", id=trial.id, settings=settings)
                self.trials.append(trial)
            if not self.start(trial):
                self.again.insert(0, trial)
                break
            started = True
        return started

    def place(self, trial: Trial) -> Path:
        """The trial's run folder."""
        return self.folder / TrialPlace(trial.id, self.sweep.name, self.folder, trial.settings).name

    def order(self, trial: Trial) -> Order:
        """The trial's command, with the environment that an agent gives to a trial."""
        parameters = self.folder / "logs" / f"{trial.id}.yaml"
        write_parameters(trial.settings, parameters)
        command = trial_command(
            self.sweep.command, self.sweep.program, trial.settings, parameters.with_suffix(".json")
        )
        environment = {
            "WANDB_RUN_ID": trial.id,
            "WANDB_RUN_GROUP": self.sweep.name,
            "WANDB_SWEEP_PARAM_PATH": str(parameters),
            "WANDB_DIR": str(self.place(trial)),
            SWEEP_FOLDER: str(self.folder),
        }
        return Order(trial.id, command, environment, parameters.with_suffix(".log"))

    def start(self, trial: Trial) -> bool:
        """Start a trial; False if the launcher cannot take it at the moment."""
        self.place(trial).mkdir(exist_ok=True)
        job = self.launcher.start(self.order(trial))
        if job is None:
            return False
        self.journal.write("process", id=trial.id, **job.record)
        self.take(trial, job)
        attempt = f", attempt {trial.failures + 1}" if trial.failures else ""
        self.say(f"start     {self.place(trial).name}{attempt}{job.where}")
        return True

    def take(self, trial: Trial, job: TrialJob) -> None:
        """Count a trial among those that run."""
        old = self.values(trial) if trial.failures else []
        self.live.append(Agent(trial, job, old, time.monotonic() if job.stopping else None))

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
            losers = to_stop(self.sweep.early_terminate, self.trials, self.sweep.maximize)
            lost = {trial.id for trial in losers}
            for agent in self.live:
                trial = agent.trial
                if trial.id in lost and agent.stopped_at is None and agent.job.outcome() is None:
                    agent.stopped_at = time.monotonic()
                    self.say(f"stop      {self.place(trial).name} after {len(trial.values)} values")
                    agent.job.stop()
        for agent in self.live:
            if agent.stopped_at is not None and time.monotonic() - agent.stopped_at > self.launcher.patience:
                agent.job.kill()

    def end(self, agent: Agent) -> None:
        """Record the outcome of a trial."""
        trial, outcome = agent.trial, agent.job.outcome()
        assert outcome is not None
        self.live.remove(agent)
        if agent.stopped_at is None and self.goes_on(agent, outcome):
            self.launcher.end(agent.job)
            self.again.append(trial)
            reason = f": {outcome.reason}" if outcome.reason else ""
            self.say(f"again     {self.place(trial).name}{reason}")
            return
        state: TrialState = "finished" if outcome.code == 0 else "failed"
        state = "stopped" if agent.stopped_at is not None else state
        trial.end(state, self.values(trial) if outcome.code == 0 else self.new_values(agent))
        self.journal.write("end", id=trial.id, state=trial.state, values=trial.values)
        self.launcher.end(agent.job)
        is_first = state == "finished" and [each.state for each in self.trials].count(state) == 1
        if is_first and (warning := no_value(trial, self.place(trial), self.sweep)):
            self.say(f"warning   metric.name: {warning}")
        self.say(f"{trial.state:9} {self.place(trial).name}{self.in_words(trial, outcome)}")
        left = min(self.retries, self.tries - trial.failures)
        if state == "failed" and self.retried[trial.id] < left:
            self.retried[trial.id] += 1
            self.journal.write("again", id=trial.id)
            trial.begin_again()
            self.again.append(trial)

    def goes_on(self, agent: Agent, outcome: Outcome) -> bool:
        """Whether a trial was ended from outside, and its attempt therefore continues."""
        if not outcome.lost:
            return outcome.code in (EXIT_REQUEUE, EXIT_INTERRUPTED)
        times, before = self.lost.get(agent.trial.id, (0, 0))
        values = len(agent.trial.values)
        times = times + 1 if values <= before else 1
        self.lost[agent.trial.id] = times, values
        return times <= TIMES_LOST

    def in_words(self, trial: Trial, outcome: Outcome) -> str:
        """The best value of a trial that has ended, and why it failed."""
        best = trial.best(self.sweep.maximize)
        told = f", best {self.sweep.metric} {best:.5g}" if best is not None else ""
        told += ", the last is not a number" if trial.diverged else ""
        if trial.state == "failed":
            reason = outcome.reason or f"exit status {outcome.code}"
            told += f", {reason}: see {self.folder / 'logs' / trial.id}.log"
        return told

    def check_hope(self) -> None:
        """Raise ``TrialsFailed`` if the sweep's first trials have all failed."""
        if hopeless(self.trials):
            ended = [trial for trial in self.trials if trial.state == "failed"]
            log = self.folder / "logs" / f"{ended[-1].id}.log"
            raise TrialsFailed(
                f"the first {len(ended)} trials all failed; see {log}. The same command tries them again."
            )


def run_sweep(
    sweep: Sweep,
    folder: Path,
    *,
    agents: int | None = None,
    devices_per_run: int = 1,
    seed: int = 0,
    tries: int = TRIES,
    hours: float = math.inf,
    launcher: LauncherConfig | None = None,
    say: Callable[[str], None] = print,
) -> list[Trial]:
    """Run or continue a sweep to its end, or for so many ``hours``; trials are run folders in ``folder``.

    ``launcher`` says where trials run; by default, the sweep's file does.
    """
    require(tries >= 1, "--tries", tries, "at least 1")
    config = launcher or sweep.launcher
    config = config if agents is None else replace(config, parallel=agents)
    runner = launcher_of(config, sweep.name, folder.resolve(), devices_per_run)
    return Controller(sweep, folder, seed, runner, say, tries, hours, config.retries).run()
