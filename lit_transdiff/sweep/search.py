"""The searches of sweeps. A search is a function ``(sweep, trials, seed) -> settings``, or None at its end.

It depends only on the sweep, the seed and the trials so far (including running ones), so a killed sweep
continues as if it had not been interrupted. SEARCHES is the table of them.
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
from lit_transdiff.sweep.study import next_of_study
from lit_transdiff.sweep.trial import Trial

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

START_TRIALS = 5  # random trials at the start of bayes


@dataclass(frozen=True)
class Search:
    """A search function and its requirements: a metric, or parameters that can be enumerated."""

    next: Callable[[Sweep, Sequence[Trial], int], dict[str, Any] | None]
    needs_metric: bool = False
    needs_values: bool = False


def grid_search(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any] | None:
    """Every combination once; the last parameter varies fastest."""
    lists = [DISTRIBUTIONS[name_of(spec)].values(spec) for spec in sweep.parameters.values()]  # type: ignore[misc]
    values = next(itertools.islice(itertools.product(*lists), len(trials), None), None)
    return None if values is None else sweep.nested(dict(zip(sweep.parameters, values, strict=True)))


def at_random(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Random settings; trial i depends only on the seed and i."""
    rng = random.Random(f"{seed} {len(trials)}")
    return sweep.nested(
        {path: DISTRIBUTIONS[name_of(spec)].draw(spec, rng) for path, spec in sweep.parameters.items()}
    )


def bayes(sweep: Sweep, trials: Sequence[Trial], seed: int) -> dict[str, Any]:
    """Optuna's tree-structured Parzen estimator on ``counts_as``; running trials count as poor."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    distributions = {
        ".".join(path): for_optuna(".".join(path), spec) for path, spec in sweep.parameters.items()
    }
    sampler = optuna.samplers.TPESampler(
        seed=hash_of(seed, len(trials)), n_startup_trials=START_TRIALS, constant_liar=True
    )
    study = optuna.create_study(direction="maximize" if sweep.maximize else "minimize", sampler=sampler)
    worst = worst_value(trials, sweep.maximize)
    study.add_trials([past(sweep, trial, distributions, counts_as(sweep, trial, worst)) for trial in trials])
    asked = study.ask(distributions).params
    return sweep.nested(
        {path: from_optuna(spec, asked[".".join(path)]) for path, spec in sweep.parameters.items()}
    )


def past(sweep: Sweep, trial: Trial, distributions: dict[str, Any], value: float | None) -> FrozenTrial:
    """A trial in optuna's format; a trial without a value only contributes its position."""
    from optuna.trial import TrialState, create_trial

    values = sweep.flat(trial.settings)
    params = {".".join(path): to_optuna(spec, values[path]) for path, spec in sweep.parameters.items()}
    if value is None:
        state = TrialState.RUNNING if trial.state == "running" else TrialState.FAIL
        return create_trial(state=state, params=params, distributions=distributions)
    return create_trial(value=value, params=params, distributions=distributions)


def worst_value(trials: Sequence[Trial], maximize: bool) -> float | None:
    """The worst value logged by any trial that has ended, or None."""
    values = [value for trial in trials if trial.state != "running" for value in trial.finite()]
    return (min if maximize else max)(values, default=None)


def counts_as(sweep: Sweep, trial: Trial, worst: float | None) -> float | None:
    """The value of a trial in a search: its best value.

    A trial that failed, diverged or logged no number has the value chosen by ``metric.impute``, a running
    trial that chosen by ``metric.impute_while_running``. None if there is no such value.
    """
    if trial.state == "running":
        rule = sweep.impute_while_running
        return None if rule == "false" else imputed(rule, sweep, trial, worst)
    best = trial.best(sweep.maximize)
    if best is None or trial.diverged or trial.state == "failed":
        return imputed(sweep.impute, sweep, trial, worst)
    return best


def imputed(rule: str, sweep: Sweep, trial: Trial, worst: float | None) -> float | None:
    """W&B's rules: the trial's own best or latest value, or the worst of all trials (the default)."""
    own = {"best": trial.best(sweep.maximize), "latest": next(reversed(trial.finite()), None)}.get(rule)
    return worst if own is None else own


def to_optuna(spec: dict[str, Any], value: Any) -> Any:
    """Replace a categorical value by its index."""
    return DISTRIBUTIONS[name_of(spec)].values(spec).index(value) if counted(spec) else value  # type: ignore[misc]


def from_optuna(spec: dict[str, Any], value: Any) -> Any:
    """The inverse of ``to_optuna``."""
    return DISTRIBUTIONS[name_of(spec)].values(spec)[value] if counted(spec) else value  # type: ignore[misc]


def counted(spec: dict[str, Any]) -> bool:
    return name_of(spec) in ("constant", "categorical")


def hash_of(seed: int, number: int) -> int:
    """The seed of trial ``number``."""
    return random.Random(f"{seed} {number}").getrandbits(32)


SEARCHES: dict[str, Search] = {
    "grid": Search(grid_search, needs_values=True),
    "random": Search(at_random),
    "bayes": Search(bayes, needs_metric=True),
}


def next_settings(sweep: Sweep, trials: Sequence[Trial], seed: int = 0) -> dict[str, Any] | None:
    """The settings of the next trial, or None if the sweep is complete."""
    if sweep.study is not None:
        return next_of_study(sweep, trials, seed)
    if sweep.run_cap is not None and len(trials) >= sweep.run_cap:
        return None
    if sweep.target is not None and any(reached(sweep, sweep.target, trial) for trial in trials):
        return None
    return SEARCHES[sweep.method].next(sweep, trials, seed)


def reached(sweep: Sweep, target: float, trial: Trial) -> bool:
    """Whether a trial has reached the sweep's target."""
    best = trial.best(sweep.maximize)
    return best is not None and (best >= target if sweep.maximize else best <= target)


def to_stop(rule: Hyperband, trials: Sequence[Trial], maximize: bool) -> list[Trial]:
    """The running trials to be stopped by hyperband (arXiv 1603.06560, with W&B's rules).

    These are worse than the best 1/eta of all trials that reached the same band. A trial is judged at its
    highest band by its best value so far, or with ``strict`` by the value at that band. NaN is worse than any
    number, and a trial whose last value is NaN does not pass a band.
    """
    sign = -1 if maximize else 1
    costs = {
        trial.id: [sign * value if math.isfinite(value) else math.inf for value in trial.values]
        for trial in trials
    }
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
