"""Reading a W&B sweep file, with all checks before anything starts.

The format is W&B's own: ``method``, ``metric``, ``parameters`` (also nested), ``early_terminate``,
``command``, ``program``, ``name``, ``project``, ``run_cap``. The same file works with ``wandb sweep`` and
``lit-transdiff sweep``, which also reads ``launcher``: where trials run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from lit_transdiff.config import errors_at, is_folder_name, require, require_known
from lit_transdiff.config.checks import FOLDER_NAME
from lit_transdiff.config.yaml_text import read_file
from lit_transdiff.sweep.definition import Hyperband, Path_, Sweep
from lit_transdiff.sweep.distributions import DISTRIBUTIONS, Spec, check, is_number, name_of
from lit_transdiff.sweep.launching import launcher_from
from lit_transdiff.sweep.search import SEARCHES

KEYS = (
    "method",
    "metric",
    "parameters",
    "early_terminate",
    "command",
    "program",
    "name",
    "project",
    "run_cap",
    "description",
    "entity",
    "controller",
    "launcher",  # ours; W&B ignores it
)
AS_WRITTEN = ("name", "project", "program", "command")  # read as text: 010 stays 010
METRIC_KEYS = ("name", "goal", "target", "impute", "impute_while_running")
IMPUTES = ("worst", "best", "latest")


def leaves(parameters: dict[str, Any], prefix: Path_ = ()) -> Iterator[tuple[Path_, Spec]]:
    """The parameters below nested ``parameters:`` entries, with their nested keys."""
    for key, spec in parameters.items():
        if isinstance(spec, dict) and "parameters" in spec:
            fits = isinstance(spec["parameters"], dict)
            require(fits, f"parameters.{key}.parameters", spec["parameters"], "parameters by name")
            yield from leaves(spec["parameters"], (*prefix, str(key)))
        else:
            yield (*prefix, str(key)), spec


def load_sweep(path: str | Path) -> Sweep:
    """Read a sweep file. Raises ``ValueError`` with the file, the field, the value and the allowed values."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist.")
    settings, spelled = read_file(path), read_file(path, spelled=True)
    with errors_at(path, (TypeError, ValueError)):
        if not isinstance(settings, dict):
            return sweep_from(settings, path.stem)  # raises an error for it
        text = {key: spelled[key] for key in AS_WRITTEN if key in settings}
        return replace(sweep_from(settings | text, path.stem), source=settings)


def sweep_from(settings: Any, name: str) -> Sweep:
    """A checked sweep from the settings of a file; ``name`` is the default name."""
    require(isinstance(settings, dict), "sweep file", settings, "settings (key: value)")
    for key in settings:
        require_known("setting", key, KEYS)
    metric, early = metric_from(settings.get("metric")), settings.get("early_terminate")
    if early is not None:
        require(isinstance(early, dict), "early_terminate", early, "type: hyperband, with its settings")
        require(early.get("type") == "hyperband", "early_terminate.type", early.get("type"), "hyperband")
        for key in set(early) - {"type"}:
            require_known("early_terminate", key, [field.name for field in fields(Hyperband)])
    controller = settings.get("controller", {"type": "local"})
    require(controller == {"type": "local"}, "controller", controller, "type: local")
    cap, command = settings.get("run_cap"), settings.get("command")
    allowed = "a whole number of at least 1"
    require(cap is None or (isinstance(cap, int) and cap >= 1), "run_cap", cap, allowed)
    require(command is None or isinstance(command, list), "command", command, "a list of words")
    given = settings.get("name") or name
    require(not isinstance(given, list | dict) and is_folder_name(str(given)), "name", given, FOLDER_NAME)
    parameters = settings.get("parameters")
    require(isinstance(parameters, dict), "parameters", parameters, "parameters by name")
    sweep = Sweep(
        name=str(given),
        method=settings.get("method"),  # type: ignore[arg-type]
        parameters=dict(leaves(parameters)),  # type: ignore[arg-type]
        metric=metric.get("name"),
        maximize=metric.get("goal") == "maximize",
        target=metric.get("target"),
        impute=metric.get("impute", "worst"),
        impute_while_running=metric.get("impute_while_running", "false"),
        early_terminate=Hyperband(**{k: v for k, v in early.items() if k != "type"}) if early else None,
        command=command,
        program=settings.get("program"),
        project=settings.get("project"),
        run_cap=cap,
        launcher=launcher_from(settings.get("launcher", {})),
        source=settings,
    )
    check_search(sweep)
    return sweep


def check_search(sweep: Sweep) -> None:
    """Raise ``ValueError`` for a search that is unknown or lacks the parameters or metric that it needs."""
    require_known("method", sweep.method, SEARCHES)
    search = SEARCHES[sweep.method]
    require(len(sweep.parameters) > 0, "parameters", {}, "at least one parameter")
    for path, spec in sweep.parameters.items():
        check(".".join(path), spec)
        possible = not search.needs_values or DISTRIBUTIONS[name_of(spec)].values is not None
        allowed = f"value, values, or whole numbers for method {sweep.method}"
        require(possible, f"parameters.{'.'.join(path)}", name_of(spec), allowed)
    stops = None if sweep.early_terminate is None else "early_terminate"
    reader = sweep.method if search.needs_metric else stops
    require(reader is None or sweep.metric is not None, "metric", None, f"name and goal, for {reader}")
    require(sweep.command is not None or sweep.program is not None, "command", None, "a command or a program")


def metric_from(metric: Any) -> dict[str, Any]:
    """The checked ``metric:`` section; empty if the file has none."""
    if metric is None:
        return {}
    named = isinstance(metric, dict) and isinstance(metric.get("name"), str)
    require(named, "metric", metric, "name: ..., with goal: minimize or maximize")
    for key in metric:
        require_known("metric", key, METRIC_KEYS)
    goal, target = metric.get("goal", "minimize"), metric.get("target")
    require(goal in ("minimize", "maximize"), "metric.goal", goal, "minimize or maximize")
    require(target is None or is_number(target), "metric.target", target, "a number")
    impute, running = metric.get("impute", "worst"), metric.get("impute_while_running", "false")
    running = "false" if running is False else running  # YAML reads the word false as a boolean
    require(impute in IMPUTES, "metric.impute", impute, ", ".join(IMPUTES))
    allowed = ", ".join((*IMPUTES, "false"))
    require(running in (*IMPUTES, "false"), "metric.impute_while_running", running, allowed)
    return {**metric, "impute_while_running": running}
