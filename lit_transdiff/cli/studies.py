"""The commands of many trials: sweeps and studies."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from lit_transdiff.base.endings import TrialsFailed


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that sweeps and studies share."""
    return dict(agents=args.agents, devices_per_run=args.devices_per_run, seed=args.seed, tries=args.tries)


def sweep_command(args: argparse.Namespace) -> None:
    from lit_transdiff.sweep.file import load_sweep

    sweep = load_sweep(args.file)
    from lit_transdiff.sweep.controller import run_sweep
    from lit_transdiff.sweep.report import failures, outcome

    folder = Path(args.output or Path("runs") / "sweeps" / sweep.name)
    trials = run_sweep(sweep, folder, **options(args))
    print(outcome(sweep, trials, folder))
    if failed := failures(trials, folder, args.tries):
        raise TrialsFailed(failed)


def study_command(args: argparse.Namespace) -> None:
    from lit_transdiff.sweep.study import load_study

    sweep = load_study(args.file)
    from lit_transdiff.sweep.controller import run_sweep
    from lit_transdiff.sweep.report import failures, write_claims
    from lit_transdiff.sweep.results import bring_results, check_same_inputs, keep_results

    folder = Path(args.output or Path("runs") / "studies" / sweep.name)
    if told := bring_results(sweep, args.file, folder):
        print(told, flush=True)
    check_same_inputs(sweep, folder)
    trials = run_sweep(sweep, folder, hours=sweep.study.budget, **options(args))
    print(write_claims(sweep, trials, folder))
    if args.keep:
        print(f"The results are in {keep_results(folder, args.file)}, from which the same command continues.")
    if failed := failures(trials, folder, args.tries):
        raise TrialsFailed(failed)
