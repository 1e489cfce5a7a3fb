"""The commands of many runs: sweeps, studies and reports, with their options."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.endings import TrialsFailed
from lit_transdiff.cli.commands import report_command
from lit_transdiff.config import require

AddCommand = Callable[[Callable[[argparse.Namespace], None], str], argparse.ArgumentParser]

if TYPE_CHECKING:
    from lit_transdiff.sweep.definition import Sweep


def options(args: argparse.Namespace, sweep: Sweep) -> dict[str, Any]:
    """The options that sweeps and studies share."""
    from lit_transdiff.sweep.launching import changed_launcher

    names = ("nodes", "tasks_per_node", "time", "partition", "account")
    changes = {"kind": args.launcher, **{name: getattr(args, name) for name in names}}
    return dict(
        agents=args.agents,
        devices_per_run=args.devices_per_run,
        seed=args.seed,
        tries=args.tries,
        launcher=changed_launcher(sweep.launcher, changes),
    )


def sweep_command(args: argparse.Namespace) -> None:
    from lit_transdiff.sweep.file import load_sweep

    sweep = load_sweep(args.file)
    from lit_transdiff.sweep.controller import run_sweep
    from lit_transdiff.sweep.report import failures, outcome

    folder = Path(args.output or Path("runs") / "sweeps" / sweep.name)
    trials = run_sweep(sweep, folder, **options(args, sweep))
    print(outcome(sweep, trials, folder))
    if failed := failures(trials, folder, args.tries):
        raise TrialsFailed(failed)


def srun_command(args: argparse.Namespace) -> None:
    """Become the command on all nodes of the allocation of SLURM; outside of one, the command alone."""
    from lit_transdiff.sweep.slurm import on_all_nodes

    require(len(args.words) > 0, "srun", "nothing", "a command, as in lit-transdiff srun python program.py")
    words = on_all_nodes(args.words, os.environ)
    require(shutil.which(words[0]) is not None, "srun", words[0], "a command on the PATH")
    os.execvp(words[0], words)


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
    trials = run_sweep(sweep, folder, hours=sweep.study.budget, **options(args, sweep))
    print(write_claims(sweep, trials, folder))
    if args.keep:
        print(f"The results are in {keep_results(folder, args.file)}, from which the same command continues.")
    if failed := failures(trials, folder, args.tries):
        raise TrialsFailed(failed)


def add_study_commands(command: AddCommand) -> None:
    """The commands for many runs: sweeps and reports."""
    again = "the same command continues it and tries failed trials again"
    text = f"run a W&B sweep file on this machine or a cluster, without a server; {again}"
    sweep = command(sweep_command, text)
    study = command(study_command, f"run arms and seeds until a claim is settled; {again}")
    for sub, where in ((sweep, "runs/sweeps"), (study, "runs/studies")):
        sub.add_argument("file", help="its YAML")
        sub.add_argument("--output", help=f"folder of the trials; default: {where}/NAME")
        trials = "trials at once (more than GPUs share them); default: one a GPU or on CPUs, 8 jobs of SLURM"
        sub.add_argument("--agents", "--parallel", type=int, help=trials)
        sub.add_argument("--devices-per-run", type=int, default=1, help="GPUs per trial, for torchrun")
        sub.add_argument("--tries", type=int, default=3, help="attempts of a trial; default: %(default)s")
        add_launcher(sub)
    sweep.add_argument("--seed", type=int, default=0, help="seed of random and bayes")
    kept = "also write the results to an archive beside FILE, from which this command continues anywhere"
    study.add_argument("--keep", action="store_true", help=kept)
    study.set_defaults(seed=0)

    text = "start a command on all nodes of this SLURM job, and elsewhere as it is (for W&B sweeps)"
    sub = command(srun_command, text)
    sub.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")

    told = "one HTML page of all runs below folders: curves, samples, scores, differences"
    sub = command(report_command, told)
    where = "folders of runs (such as sweeps), archives of them, or entity/project at W&B"
    sub.add_argument("folder", nargs="+", help=where)
    sub.add_argument("--output", help="the file; default: report.html in the folder, or beside the others")


def add_launcher(sub: argparse.ArgumentParser) -> None:
    """The options about the place of trials; all are settings of ``launcher:`` in the file, too."""
    add = sub.add_argument
    add("--launcher", choices=("local", "slurm"), help="slurm: every trial is a job; default: local")
    add("--nodes", type=int, help="slurm: nodes of a trial; default: 1")
    add("--tasks-per-node", type=int, help="slurm: processes on each node, one per GPU; default: 1")
    add("--time", help="slurm: time limit of a job, as in 24:00:00")
    add("--partition", help="slurm: the partition")
    add("--account", help="slurm: the account that is charged")
