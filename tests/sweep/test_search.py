"""Searches, distributions and early stopping."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from lit_transdiff.sweep.definition import Hyperband, Sweep
from lit_transdiff.sweep.distributions import DISTRIBUTIONS
from lit_transdiff.sweep.file import load_sweep, sweep_from
from lit_transdiff.sweep.search import SEARCHES, counts_as, next_settings, to_stop, worst_value
from lit_transdiff.sweep.trial import Trial
from tests.helpers.small import ROOT

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
    "q_log_uniform": {"min": 0, "max": 5, "q": 2, "distribution": "q_log_uniform"},
    "log_uniform_values": {"min": 0.01, "max": 1, "distribution": "log_uniform_values"},
    "inv_log_uniform": {"min": -2, "max": 1, "distribution": "inv_log_uniform"},
    "inv_log_uniform_values": {"min": 0.01, "max": 1, "distribution": "inv_log_uniform_values"},
    "q_log_uniform_values": {"min": 1, "max": 100, "q": 4, "distribution": "q_log_uniform_values"},
    "normal": {"mu": 1, "sigma": 2, "distribution": "normal"},
    "log_normal": {"mu": 0, "sigma": 1, "distribution": "log_normal"},
    "q_normal": {"mu": 1, "sigma": 2, "q": 0.5, "distribution": "q_normal"},
    "q_log_normal": {"mu": 3, "sigma": 0.3, "q": 1, "distribution": "q_log_normal"},
    "beta": {"a": 2, "b": 2, "distribution": "beta"},
    "q_beta": {"a": 2, "b": 2, "q": 0.1, "distribution": "q_beta"},
}


def sweep(method: str, parameters: dict[str, Any], **more: Any) -> Sweep:
    return sweep_from({**COMMON, "method": method, "parameters": parameters, **more}, "s")


def run_all(plan: Sweep, score, count: int, seed: int = 0) -> list[Trial]:
    trials: list[Trial] = []
    while len(trials) < count and (settings := next_settings(plan, trials, seed)) is not None:
        trials.append(Trial(str(len(trials)), settings, "finished", [score(settings)]))
    return trials


def test_a_grid_is_every_combination_once() -> None:
    plan = sweep(
        "grid",
        {"a": {"values": [1, 2, 3]}, "b": {"parameters": {"c": {"min": 0, "max": 1}}}, "d": {"value": None}},
    )
    found = [
        (t.settings["a"], t.settings["b"]["c"], t.settings["d"]) for t in run_all(plan, lambda s: 0.0, 100)
    ]
    assert found == [(a, c, None) for a, c in itertools.product([1, 2, 3], [0, 1])]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_draws_lie_where_the_distribution_says(name: str) -> None:
    spec, rng = EXAMPLES[name], random.Random(0)
    drawn = [DISTRIBUTIONS[name].draw(spec, rng) for _ in range(4000)]
    if DISTRIBUTIONS[name].values is not None:
        assert {repr(v) for v in drawn} == {repr(v) for v in DISTRIBUTIONS[name].values(spec)}
    if "mu" in spec:
        logs = [math.log(v) if "log" in name else v for v in drawn]
        assert abs(sum(logs) / 4000 - spec["mu"]) < 0.15
    elif "a" in spec:
        assert min(drawn) >= 0 and max(drawn) <= 1 and abs(sum(drawn) / 4000 - 0.5) < 0.02
    elif "min" in spec:
        sign = -1 if name == "inv_log_uniform" else 1
        exponents = name.endswith("log_uniform")
        low, high = sorted(math.exp(sign * spec[k]) if exponents else spec[k] for k in ("min", "max"))
        margin = spec.get("q", 0) / 2  # rounding reaches a little beyond
        assert low - margin <= min(drawn) and max(drawn) <= high + margin
        middle = math.sqrt(low * high) if "log" in name else (low + high) / 2
        assert 0.4 < sum(v < middle for v in drawn) / 4000 + sum(v == middle for v in drawn) / 8000 < 0.6
    if "q" in spec:
        assert all(abs(v / spec["q"] - round(v / spec["q"])) < 1e-9 for v in drawn)


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
    """In the median of 25 seeds; of five, chance decides."""
    parameters = {"x": {"min": -1.0, "max": 1.0}, "y": {"min": -1.0, "max": 1.0}}
    score = lambda s: (s["x"] - 0.3) ** 2 + (s["y"] + 0.4) ** 2  # noqa: E731
    best = {
        method: sorted(
            min(t.values[0] for t in run_all(sweep(method, parameters), score, 30, seed))
            for seed in range(25)
        )[12]
        for method in ("bayes", "random")
    }
    assert best["bayes"] < best["random"]


LR = {"optimizer.lr": {"min": 1e-5, "max": 10.0, "distribution": "log_uniform_values"}}


def diverging(trial: Trial, how: str) -> None:
    """Fill in the results of a training that is best at 3e-3 and diverges above 1e-2, in several ways."""
    lr = trial.settings["optimizer.lr"]
    loss = abs(math.log10(lr / 3e-3))
    ends: dict[str, tuple[str, list[float]]] = {
        "fails": ("failed", []),
        "fails late": ("failed", [0.001]),
        "nan": ("finished", [loss, math.nan]),
        "only nan": ("finished", [math.nan] * 3),
        "inf": ("finished", [math.inf]),
        "nothing": ("finished", []),
    }
    trial.state, trial.values = ends[how] if lr > 1e-2 else ("finished", [2 * loss, loss])  # type: ignore[assignment]


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize("how", ["fails", "fails late", "nan", "only nan", "inf", "nothing"])
def test_bayes_leaves_the_region_where_trials_fail(how: str, goal: str) -> None:
    plan = sweep("bayes", LR, metric={"name": "loss", "goal": goal})
    trials: list[Trial] = []
    for i in range(30):
        trials.append(Trial(str(i), next_settings(plan, trials, 0) or {}))
        diverging(trials[-1], how)
        if goal == "maximize":
            trials[-1].values = [-value for value in trials[-1].values]  # -inf among them
    bad = [trial.settings["optimizer.lr"] > 1e-2 for trial in trials]
    assert sum(bad) <= 18 and sum(bad[-10:]) <= 7, bad


@pytest.mark.parametrize(
    "metric, counts",
    [
        ({}, [2.0, 9.0, 9.0, 9.0, 9.0, None]),
        ({"impute": "worst"}, [2.0, 9.0, 9.0, 9.0, 9.0, None]),
        ({"impute": "best"}, [2.0, 4.0, 1.0, 9.0, 9.0, None]),
        ({"impute": "latest"}, [2.0, 6.0, 1.0, 9.0, 9.0, None]),
        ({"impute_while_running": "worst"}, [2.0, 9.0, 9.0, 9.0, 9.0, 9.0]),
        ({"impute_while_running": "best"}, [2.0, 9.0, 9.0, 9.0, 9.0, 7.0]),
        ({"impute_while_running": "latest"}, [2.0, 9.0, 9.0, 9.0, 9.0, 8.0]),
        ({"impute_while_running": False}, [2.0, 9.0, 9.0, 9.0, 9.0, None]),
    ],
)
def test_what_counts_for_a_trial_without_a_result(metric: dict[str, Any], counts: list[float | None]) -> None:
    """Minimised: a finished trial, one that failed, one that diverged, one without a metric, one of NaN
    alone, a running one.
    """
    states = ["finished", "failed", "finished", "finished", "finished", "running"]
    values = [[9.0, 2.0, 3.0], [4.0, 6.0], [1.0, math.nan], [], [math.nan], [7.0, 30.0, 8.0]]
    trials = [Trial(str(i), {}, state, v) for i, (state, v) in enumerate(zip(states, values, strict=True))]  # type: ignore[arg-type]
    plan = sweep("bayes", LR, metric={"name": "loss", "goal": "minimize", **metric})
    worst = worst_value(trials, plan.maximize)
    assert [counts_as(plan, trial, worst) for trial in trials] == counts


def test_failures_alone_tell_bayes_nothing() -> None:
    trials = [Trial(str(i), {"optimizer.lr": 0.1}, "failed") for i in range(8)]
    plan = sweep("bayes", LR)
    assert worst_value(trials, False) is None
    assert 1e-5 <= (next_settings(plan, trials, 0) or {})["optimizer.lr"] <= 10


def test_numbers_are_read_as_people_write_them(tmp_path: Path) -> None:
    lr = "{distribution: log_uniform_values, min: 1e-4, max: 1E-1}"
    text = (
        f"method: random\nprogram: x\ncontroller: {{type: local}}\nparameters: {{lr: {lr}, b: {{values: "
        "[1e3, 5, e4]}}\n"
    )
    (tmp_path / "sweep.yaml").write_text(text)
    found = load_sweep(tmp_path / "sweep.yaml").parameters
    assert (found["lr",]["min"], found["lr",]["max"], found["b",]["values"]) == (1e-4, 0.1, [1000.0, 5, "e4"])


@pytest.mark.parametrize(
    "goal, target, count", [("minimize", 2.0, 3), ("maximize", 2.0, 1), ("minimize", -1.0, 5)]
)
def test_a_target_that_is_reached_ends_a_sweep(goal: str, target: float, count: int) -> None:
    plan = sweep(
        "grid", {"x": {"values": [4, 3, 2, 1, 0]}}, metric={"name": "loss", "goal": goal, "target": target}
    )
    assert len(run_all(plan, lambda s: float(s["x"]), 100)) == count


def test_bayes_searches_between_the_bounds_of_inverse_distributions() -> None:
    for name, low, high in (
        ("inv_log_uniform", math.exp(-1), math.exp(2)),
        ("inv_log_uniform_values", 0.01, 1.0),
    ):
        trials = run_all(sweep("bayes", {"x": EXAMPLES[name]}), lambda s: s["x"], 8)
        assert all(low <= trial.settings["x"] <= high for trial in trials)


def test_a_cap_ends_a_sweep() -> None:
    assert len(run_all(sweep("random", MIXED, run_cap=3), lambda s: 0.0, 100)) == 3


def test_hyperband_ends_the_runs_that_wandbs_engine_ends() -> None:
    """60 random cases, answered by the published engine of W&B (sweeps 0.3.0)."""
    states = {"running": "running", "finished": "finished", "killed": "stopped"}
    for case in json.loads((ROOT / "tests/fixtures/hyperband.json").read_text()):
        trials = [
            Trial(str(i), {}, states[run["state"]], run["values"]) for i, run in enumerate(case["runs"])
        ]  # type: ignore[arg-type]
        stopped = to_stop(Hyperband(**case["rule"]), trials, case["goal"] == "maximize")
        assert [int(trial.id) for trial in stopped] == case["stopped"]


@pytest.mark.parametrize("goal", ["minimize", "maximize"])
@pytest.mark.parametrize(
    "rule", [{"min_iter": 2, "strict": False}, {"max_iter": 6, "s": 1}, {"min_iter": 2, "strict": True}]
)
def test_hyperband_promotes_nothing_whose_last_value_is_no_number(rule: dict[str, Any], goal: str) -> None:
    sign = -1 if goal == "maximize" else 1
    values = [[3.0, 2.0, 1.0], [0.5, 0.4, math.nan], [0.5, math.inf], [math.nan] * 3, [math.nan]]
    trials = [Trial(str(i), {}, "running", [sign * value for value in v]) for i, v in enumerate(values)]
    assert [trial.id for trial in to_stop(Hyperband(**rule), trials, goal == "maximize")] == ["1", "2", "3"]
    # nothing to compare with
    assert [trial.id for trial in to_stop(Hyperband(**rule), trials[3:], goal == "maximize")] == ["3"]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"method": "gird"}, "Did you mean 'grid'"),
        ({"metod": 1}, "setting: 'metod' is not known. Did you mean 'method'"),
        ({"parameters": {"a": {}}}, "parameters.a: got {}"),
        (
            {"parameters": {"a": {"min": 1}}},
            "parameters.a: got {'min': 1}; allowed: uniform with min and max",
        ),
        (
            {"parameters": {"a": {"min": 0.1, "max": 1.0}}},
            "parameters.a: got 'uniform'; allowed: value, values, or whole numbers",
        ),
        ({"early_terminate": {"type": "median"}}, "early_terminate.type: got 'median'; allowed: hyperband"),
        ({"early_terminate": {"type": "hyperband"}}, "one of max_iter and min_iter"),
        ({"metric": None, "method": "bayes"}, "metric: got None"),
        ({"command": None}, "a command or a program"),
        ({"command": "train"}, "command: got 'train'; allowed: a list of words"),
        ({"metric": "loss"}, "metric: got 'loss'; allowed: name: ..."),
        ({"metric": {"name": "loss", "goal": "small"}}, "metric.goal: got 'small'"),
        ({"metric": {"name": "loss", "target": "low"}}, "metric.target: got 'low'; allowed: a number"),
        (
            {"metric": {"name": "loss", "impute": "median"}},
            "metric.impute: got 'median'; allowed: worst, best, latest",
        ),
        (
            {"metric": {"name": "loss", "impute_while_running": "true"}},
            "metric.impute_while_running: got 'true'; allowed: worst, best, latest, false",
        ),
        ({"metric": {"name": "loss", "inpute": "best"}}, "Did you mean 'impute'"),
        ({"controller": {"type": "cloud"}}, "controller: got {'type': 'cloud'}; allowed: type: local"),
        (
            {"early_terminate": {"type": "hyperband", "min_itr": 3}},
            "'min_itr' is not known. Did you mean 'min_iter'",
        ),
        ({"run_cap": "ten"}, "run_cap: got 'ten'; allowed: a whole number of at least 1"),
        (
            {"parameters": {"a": {"min": 5, "max": 1}}},
            "parameters.a.max: got 1; allowed: at least min, which is 5",
        ),
        ({"parameters": {"a": {"min": "low", "max": 1}}}, "parameters.a.min: got 'low'; allowed: a number"),
        ({"parameters": {"a": {"parameters": 3}}}, "parameters.a.parameters: got 3"),
        (
            {"parameters": {"a": {"min": 0, "max": 1, "distribution": "log_uniform_values"}}},
            "parameters.a.min: got 0; allowed: above 0",
        ),
        (
            {"parameters": {"a": {"min": 0, "max": 1, "q": 0, "distribution": "q_uniform"}}},
            "parameters.a.q: got 0; allowed: above 0",
        ),
        ({"parameters": {"a": {"sigma": -1, "distribution": "normal"}}}, "parameters.a.sigma: got -1"),
        (
            {"parameters": {"a": {"values": [1, 2], "probabilities": [1]}}},
            "parameters.a.probabilities: got [1]; allowed: 2 numbers",
        ),
        ({"parameters": {"a": {"values": 3}}}, "parameters.a.values: got 3; allowed: a list"),
        ({"parameters": {"a": {"values": [1], "probabilites": [1]}}}, "Did you mean 'probabilities'"),
    ],
)
def test_a_bad_file_is_refused_with_the_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        sweep_from({**COMMON, "method": "grid", "parameters": {"a": {"values": [1]}}, **change}, "s")
    assert message in str(error.value)


@pytest.mark.parametrize("file", sorted((ROOT / "experiments/sweeps").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_sweeps_are_read_and_name_real_settings(file) -> None:
    from lit_transdiff.config.loading import load_run
    from lit_transdiff.sweep.command import trial_command

    plan = load_sweep(file)
    settings = next_settings(plan, [])
    assert settings is not None
    words = trial_command(plan.command, plan.program, settings, file.parent / f".{file.stem}.json")
    (file.parent / f".{file.stem}.json").unlink()
    recipe = next((word for word in words if word.endswith(".yaml")), "experiments/fashion/ar_pretrain.yaml")
    # raises for a setting that does not exist
    load_run(ROOT / recipe, [word for word in words if "=" in word])


@pytest.mark.parametrize("name", ["..", "a/b", "'~'", "~alice", "$HOME", "' '", '"a\\nb"', "[a]", "{a: 1}"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name) -> None:
    (tmp_path / "sweep.yaml").write_text(
        f"name: {name}\nmethod: grid\nparameters: {{x: {{value: 1}}}}\ncommand: [a]\n"
    )
    with pytest.raises(ValueError, match=r"name: got .*; allowed: the name of one folder"):
        load_sweep(tmp_path / "sweep.yaml")


def test_words_of_a_sweep_file_stay_as_they_are_written(tmp_path) -> None:
    settings = (
        "name: 010\nmethod: grid\nparameters: {seed: {values: [010, 1_000]}}\ncommand: [a, 010, 1e-4, 1_000, "
        "on, 7]\n"
    )
    (tmp_path / "sweep.yaml").write_text(settings)
    sweep = load_sweep(tmp_path / "sweep.yaml")
    assert sweep.name == "010" and list(map(str, sweep.command or [])) == [
        "a",
        "010",
        "1e-4",
        "1_000",
        "on",
        "7",
    ]
    assert sweep.parameters[("seed",)]["values"] == [10, 1000]
