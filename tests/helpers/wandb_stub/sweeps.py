"""The part of W&B's server for sweeps: it assigns runs to agents and stops some of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from lit_transdiff.sweep.file import sweep_from
from lit_transdiff.sweep.search import next_settings, to_stop
from lit_transdiff.sweep.trial import Trial
from lit_transdiff.sweep.trial import TrialState as TrialState

if TYPE_CHECKING:
    from tests.helpers.wandb_stub.state import State


def as_trial(run: dict[str, Any], metric: str | None) -> Trial:
    """A run of the sweep as the searches see it."""
    states: dict[str, TrialState] = {"running": "running", "pending": "running", "finished": "finished"}
    states |= {"preempted": "running"}
    state: TrialState = "stopped" if run["stopped"] else states.get(run["state"], "failed")
    values = [row[metric] for row in run["history"] if metric in row]
    return Trial(run["name"], {key: item["value"] for key, item in run["args"].items()}, state, values)


def commands(state: State, sweep: dict[str, Any], agents_runs: dict[str, Any]) -> list[dict[str, Any]]:
    """The answer to an agent's heartbeat: runs to stop, a run to start, or to go home."""
    from tests.helpers.wandb_stub.state import short_id

    plan, runs = sweep_from(sweep["settings"], sweep["name"]), state.runs_of_sweep(sweep["name"])
    trials = [as_trial(run, plan.metric) for run in runs]
    if plan.early_terminate is not None:
        lost = {trial.id for trial in to_stop(plan.early_terminate, trials, plan.maximize)}
        for run in runs:
            run["stopped"] |= run["name"] in lost
    orders = [
        {"type": "stop", "run_id": run["name"]}
        for run in runs
        if run["stopped"] and run["name"] in agents_runs
    ]
    if agents_runs:
        return orders
    for run in runs:
        if run["state"] == "preempted" and not run["stopped"]:  # it returns to the queue
            run["state"] = "pending"
            return [*orders, order("resume", run, plan.program)]
    settings = next_settings(plan, trials)
    if settings is None:
        sweep["state"] = "FINISHED"
        return [*orders, {"type": "exit"}]
    sweep["state"] = "RUNNING"
    run = state.run(sweep["project"], short_id())
    run |= dict(
        sweepName=sweep["name"],
        state="pending",
        args={key: {"value": value} for key, value in settings.items()},
    )
    return [*orders, order("run", run, plan.program)]


def order(kind: str, run: dict[str, Any], program: str | None) -> dict[str, Any]:
    """The order to an agent to start a run."""
    return {
        "type": kind,
        "run_id": run["name"],
        "args": json.loads(json.dumps(run["args"])),
        "program": program,
    }
