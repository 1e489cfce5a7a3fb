"""The export of the command ``export``: a new one of a checkpoint, or the one that a run or folder has."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_transdiff.base.hub import SCHEME, hub_place
from lit_transdiff.config import require
from lit_transdiff.config.loading import load_run
from lit_transdiff.config.paths import checkpoints_folder, uploaded_folder


def exported(args: argparse.Namespace) -> Path:
    """The folder of the export. For an upload with no other option it is the trained model that is there."""
    chosen = args.step is not None or args.average != "ema" or args.half or args.output is not None
    of_hub = [name for name in ("private", "revision") if getattr(args, name)]
    require(args.hub is not None or not of_hub, f"--{' and --'.join(of_hub)}", True, "only with --hub")
    if args.hub is not None:
        hub_place(f"{SCHEME}{args.hub}", "--hub")
        if not chosen:
            return uploaded_folder(args.run_folder)
    checkpoints_folder(args.run_folder)
    from lit_transdiff.checkpoints.export import export_run
    from lit_transdiff.stages import PREPARATORY

    stage = load_run(Path(args.run_folder, "config.yaml")).stage
    allowed = f"a run of a generator; one of stage {stage} has no other model than that in its folder export"
    require(stage not in PREPARATORY, "run", args.run_folder, allowed)
    return export_run(Path(args.run_folder), args.step, args.average, args.output, half=args.half)
