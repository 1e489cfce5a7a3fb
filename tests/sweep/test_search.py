"""Searches, distributions and early stopping."""

from __future__ import annotations

import itertools
import json
import math
import random
from typing import Any

import pytest

from lit_transdiff.sweep.distributions import DISTRIBUTIONS
from lit_transdiff.sweep.file import Hyperband, SweepFile, load_sweep, sweep_from
from lit_transdiff.sweep.search import SEARCHES, next_settings, to_stop
from lit_transdiff.sweep.trial import Trial
from tests.small import ROOT

COMMON: dict[str, Any] = {"command": ["x"], "metric": {"name": "loss", "goal": "minimize"}}
MIXED = {
    "optimizer": {"parameters": {"lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}}},
    "model.width": {"values": [32, 64]},
    "steps": {"min": 1, "max": 9},
    "list": {"values": [[0.0, 1.0], [0.2, 0.7]]},
    "none": {"value": None},
}
EXAMPLES: dict[str, dict[str, Any]] = {
    "constant": {"value": 3},
    "categorical": {"values": ["a", None, [1]]},
    "int_uniform": {"min": 2, "max": 5},
    "uniform": {"min": 0.5, "max": 2.0},
    "q_uniform": {"min": 0, "max": 10, "q": 5, "distribution": "q_uniform"},
    "log_uniform": {"min": -2, "max": 1, "distribution": "log_uniform"},
    "log_uniform_values": {"min": 0.01, "max": 1, "distribution": "log_uniform_values"},
    "q_log_uniform_values": {"min": 1, "max": 100, "q": 4, "distribution": "q_log_uniform_values"},
    "normal": {"mu": 1, "sigma": 2, "distribution": "normal"},
    "log_normal": {"mu": 0, "sigma": 1, "distribution": "log_normal"},
}


def sweep(method: str, parameters: dict[str, Any], **more: Any) -> SweepFile:
    return sweep_from({**COMMON, "method": method, "parameters": parameters, **more}, "s")


def run_all(plan: SweepFile, score, count: int, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < count and (settings := next_settings(plan, trials, seed)) is not None:
        trials.append(Trial(str(len(trials)), settings, "finished", [score(settings)]))
    return trials


def test_a_grid_is_every_combination_once() -> None:
    plan = sweep("grid", {"a": {"values": [1, 2, 3]}, "b": {"parameters": {"c": {"min": 0, "max": 1}}}, "d": {"value": None}})
    found = [(t.settings["a"], t.settings["b"]["c"], t.settings["d"]) for t in run_all(plan, lambda s: 0.0, 100)]
    assert found == [(a, c, None) for a, c in itertools.product([1, 2, 3], [0, 1])]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_lie_where_the_distribution_says(name: str) -> None:
    spec, rng = EXAMPLES[name], random.Random(0)
    drawn = [DISTRIBUTIONS[name].draw(spec, rng) for _ in range(4000)]
    if DISTRIBUTIONS[name].values is not None:
        assert {repr(v) for v in drawn} == {repr(v) for v in DISTRIBUTIONS[name].values(spec)}
    if name in ("normal", "log_normal"):
        logs = [math.log(v) if name == "log_normal" else v for v in drawn]
        assert abs(sum(logs) / 4000 - spec["mu"]) < 0.15
    elif "min" in spec:
        low, high = (math.exp(spec[k]) if name == "log_uniform" else spec[k] for k in ("min", "max"))
        margin = spec.get("q", 0) / 2  # rounding reaches a little beyond
        assert low - margin <= min(drawn) and max(drawn) <= high + margin
        middle = math.sqrt(low * high) if "log" in name else (low + high) / 2
        assert 0.4 < sum(v < middle for v in drawn) / 4000 + sum(v == middle for v in drawn) / 8000 < 0.6


@pytest.mark.parametrize("method", [m for m in SEARCHES if m != "grid"])
def test_what_comes_next_depends_on_the_trials_alone(method: str) -> None:
    plan = sweep(method, MIXED)
    score = lambda s: abs(math.log10(s["optimizer"]["lr"]) + 2.5)  # noqa: E731
    whole = run_all(plan, score, 12, seed=3)
    again = json.loads(json.dumps([t.settings for t in whole]))  # as the journal keeps them
    half = [Trial(t.id, settings, t.state, t.values) for t, settings in zip(whole[:7], again, strict=False)]
    assert next_settings(plan, half, 3) == whole[7].settings
    assert [t.settings for t in run_all(plan, score, 12, seed=4)] != [t.settings for t in whole]


def test_bayes_finds_more_than_chance() -> None:
    parameters = {"x": {"min": -1.0, "max": 1.0}, "y": {"min": -1.0, "max": 1.0}}
    score = lambda s: (s["x"] - 0.3) ** 2 + (s["y"] + 0.4) ** 2  # noqa: E731
    best = {
        method: sorted(min(t.values[0] for t in run_all(sweep(method, parameters), score, 30, seed)) for seed in range(5))[2]
        for method in ("bayes", "random")
    }
    assert best["bayes"] < best["random"]


def test_a_cap_ends_a_sweep() -> None:
    assert len(run_all(sweep("random", MIXED, run_cap=3), lambda s: 0.0, 100)) == 3


def test_hyperband_ends_the_runs_that_wandbs_engine_ends() -> None:
    """60 random cases, answered by the published engine of W&B (sweeps 0.3.0)."""
    states = {"running": "running", "finished": "finished", "killed": "stopped"}
    for case in json.loads((ROOT / "tests/fixtures/hyperband.json").read_text()):
        trials = [Trial(str(i), {}, states[run["state"]], run["values"]) for i, run in enumerate(case["runs"])]  # type: ignore[arg-type]
        stopped = to_stop(Hyperband(**case["rule"]), trials, case["goal"] == "maximize")
        assert [int(trial.id) for trial in stopped] == case["stopped"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "gird"}, "Did you mean 'grid'"),
        ({"metod": 1}, "setting: 'metod' is not known. Did you mean 'method'"),
        ({"parameters": {"a": {}}}, "parameters.a: got {}"),
        ({"parameters": {"a": {"min": 1}}}, "parameters.a: got {'min': 1}; allowed: uniform with min and max"),
        (
            {"parameters": {"a": {"min": 0.1, "max": 1.0}}},
            "parameters.a: got 'uniform'; allowed: value, values, or whole numbers",
        ),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type: got 'median'; allowed: hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "one of max_iter and min_iter"),
        ({"metric": None, "method": "bayes"}, "metric: got None"),
        ({"command": None}, "a command or a program"),
    ],
)
def test_a_bad_file_is_refused_with_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        sweep_from({**COMMON, "method": "grid", "parameters": {"a": {"values": [1]}}, **change}, "s")
    assert message in str(error.value)


@pytest.mark.parametrize("file", sorted((ROOT / "experiments/sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_sweeps_are_read_and_name_real_settings(file) -> None:
    from lit_transdiff.loading import load_run
    from lit_transdiff.tracking.sweep_command import trial_command

    plan = load_sweep(file)
    settings = next_settings(plan, [])
    assert settings is not None
    words = trial_command(plan.command, plan.program, settings, file.parent / f".{file.stem}.json")
    (file.parent / f".{file.stem}.json").unlink()
    recipe = next((word for word in words if word.endswith(".yaml")), "experiments/fashion/ar_pretrain.yaml")
    load_run(ROOT / recipe, [word for word in words if "=" in word])  # raises for a setting that does not exist
