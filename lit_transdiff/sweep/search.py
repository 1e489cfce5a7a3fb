"""How a sweep chooses its next settings. A search is ``function(sweep, trials, seed) -> settings``, or nothing at its end.

Each is a function of the sweep, the seed and the trials so far (running ones included), so a sweep that was killed goes on as if
it had not been. SEARCHES lists them.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lit_transdiff.sweep.definition import Hyperband, Sweep
from lit_transdiff.sweep.distributions import DISTRIBUTIONS, for_optuna, name_of
from lit_transdiff.sweep.trial import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

START_TRIALS = 5  # of bayes, drawn at random


@dataclass(frozen=True)
class Search:
    """A search, and what it asks of the sweep file: a metric, or parameters whose values can be listed."""

    next: Callable[[Sweep, Sequence[Trial], int], dict[str, Any] | None]
    needs_metric: bool = False
    needs_values: bool = False


def grid_search(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Every combination once, the last parameter fastest."""
    lists = [DISTRIBUTIONS[name_of(spec)].values(spec) for spec in sweep.parameters.values()]  # type: ignore[misc]
    values = next(itertools.islice(itertools.product(*lists), len(trials), None), None)
    return None if values is None else sweep.nested(dict(zip(sweep.parameters, values, strict=True)))


def at_random(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Trial i follows from the seed and i alone."""
    rng = random.Random(f"{seed} {len(trials)}")
    return sweep.nested({path: DISTRIBUTIONS[name_of(spec)].draw(spec, rng) for path, spec in sweep.parameters.items()})


def bayes(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Optuna's tree-structured Parzen estimator on what each trial counts as; running trials count as poor ones."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {".".join(path): for_optuna(".".join(path), spec) for path, spec in sweep.parameters.items()}
    sampler = optuna.samplers.TPESampler(seed=hash_of(seed, len(trials)), n_startup_trials=START_TRIALS, constant_liar=True)
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize", sampler=sampler)
    worst = worst_value(trials, sweep.maximize)
    study.add_trials([past(sweep, trial, distributions, counts_as(sweep, trial, worst)) for trial in trials])
    asked = study.ask(distributions).params
    return sweep.nested({path: from_optuna(spec, asked[".".join(path)]) for path, spec in sweep.parameters.items()})


def past(sweep: Sweep, trial: Trial, distributions: dict[str, Any], value: float | None) -> FrozenTrial:
    """A trial as optuna keeps it; one without a value tells optuna nothing but where it was."""
    from optuna.trial import TrialState, create_trial

    values = sweep.flat(trial.settings)
    params = {".".join(path): to_optuna(spec, values[path]) for path, spec in sweep.parameters.items()}
    if value is None:
        state = TrialState.RUNNING if trial.state == "running" else TrialState.FAIL
        return create_trial(state=state, params=params, distributions=distributions)
    return create_trial(value=value, params=params, distributions=distributions)


def worst_value(trials: Sequence[Trial], maximize: bool) -> float | None:
    """The worst value that any trial has logged which has ended; nothing where there is none."""
    values = [value for trial in trials if trial.state != "running" for value in trial.finite()]
    return (min if maximize else max)(values, default=None)


def counts_as(sweep: Sweep, trial: Trial, worst: float | None) -> float | None:
    """The value of a trial in a search: its best; of one that has failed, diverged or logged no number by ``metric.impute``.

    A running trial has none unless ``metric.impute_while_running`` says which. Nothing, where no trial has logged a number.
    """
    if trial.state == "running":
        return None if sweep.impute_while_running == "false" else imputed(sweep.impute_while_running, sweep, trial, worst)
    best = trial.best(sweep.maximize)
    if best is None or trial.diverged or trial.state == "failed":
        return imputed(sweep.impute, sweep, trial, worst)
    return best


def imputed(rule: str, sweep: Sweep, trial: Trial, worst: float | None) -> float | None:
    """W&B's rules: the trial's own best or latest number, or the worst of all trials, which also stands for a missing one."""
    own = {"best": trial.best(sweep.maximize), "latest": next(reversed(trial.finite()), None)}.get(rule)
    return worst if own is None else own


def to_optuna(spec: dict[str, Any], value: Any) -> Any:
    """A categorical value by its number."""
    return DISTRIBUTIONS[name_of(spec)].values(spec).index(value) if counted(spec) else value  # type: ignore[misc]


def from_optuna(spec: dict[str, Any], value: Any) -> Any:
    """The inverse of ``to_optuna``."""
    return DISTRIBUTIONS[name_of(spec)].values(spec)[value] if counted(spec) else value  # type: ignore[misc]


def counted(spec: dict[str, Any]) -> bool:
    return name_of(spec) in ("constant", "categorical")


def hash_of(seed: int, number: int) -> int:
    """A seed for trial ``number``."""
    return random.Random(f"{seed} {number}").getrandbits(32)


SEARCHES: dict[str, Search] = {
    "grid": Search(grid_search, needs_values=True),
    "random": Search(at_random),
    "bayes": Search(bayes, needs_metric=True),
}


def next_settings(sweep: Sweep, trials: Sequence[Trial], seed: int = 0) -> dict[str, Any] | None:
    """The settings of the next trial, or nothing when the sweep has all it wants."""
    if sweep.run_cap is not None and len(trials) >= sweep.run_cap:
        return None
    if sweep.target is not None and any(reached(sweep, sweep.target, trial) for trial in trials):
        return None
    return SEARCHES[sweep.method].next(sweep, trials, seed)


def reached(sweep: Sweep, target: float, trial: Trial) -> bool:
    """Whether a trial has been as good as the sweep's target."""
    best = trial.best(sweep.maximize)
    return best is not None and (best >= target if sweep.maximize else best <= target)


def to_stop(rule: Hyperband, trials: Sequence[Trial], maximize: bool) -> list[Trial]:
    """The running trials that hyperband ends: worse than the best 1/eta of all that got as far (arXiv 1603.06560, as at W&B).

    A trial is judged at the highest band that it has reached, by its best value so far, or by the value at that band when the
    rule is strict. A value that is no number is worse than any, and a trial whose last is none does not pass a band.
    """
    sign = -1 if maximize else 1
    costs = {trial.id: [sign * value if math.isfinite(value) else math.inf for value in trial.values] for trial in trials}
    lost = []
    for trial in trials:
        values = costs[trial.id]
        reached = [band for band in rule.bands if band <= len(values)]
        if trial.state != "running" or not reached:
            continue
        band = reached[-1]
        there = sorted(other[band - 1] for other in costs.values() if len(other) >= band)
        threshold = there[int(len(there) / rule.eta)]
        if trial.diverged or (values[band - 1] if rule.strict else min(values)) > threshold:
            lost.append(trial)
    return lost
