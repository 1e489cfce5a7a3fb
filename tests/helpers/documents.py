"""The documents of the repository, and the checks of a command that one of them shows."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_transdiff.base.files import read_json
from lit_transdiff.cli import studies
from lit_transdiff.cli.pipeline import load_pipeline
from lit_transdiff.config.loading import load_run
from lit_transdiff.sweep.file import load_sweep
from lit_transdiff.sweep.study import load_study
from tests.helpers.small import ROOT

FOLDERS = ("benchmarks", "data", "docs")
DOCUMENTS = [
    *sorted(ROOT.glob("*.md")),
    *(file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.md"))),
]
CURRENT = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # which names what has gone, too
PLACEHOLDER = "experiments/fashion/ar_pretrain.yaml"  # stands for RUN.yaml


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def check_command(args: argparse.Namespace) -> None:
    """Files of this repository that it names are there, and its ``key=value`` settings are taken by the run's
    own checks.
    """
    given = vars(args)
    if "pipeline" in given:
        load_pipeline(args.pipeline, args.overrides)
    elif "overrides" in given:
        recipe = given.get("run") or given.get("recipe") or "RUN.yaml"
        load_run(PLACEHOLDER if recipe == "RUN.yaml" else recipe, args.overrides, args.imports)
    elif "file" in given:
        (load_study if args.function is studies.study_command else load_sweep)(args.file)
    if "row" in given:
        assert args.row in read_json(ROOT / "experiments/baselines.json")["rows"]
