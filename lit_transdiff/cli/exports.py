"""The export of the command ``export``: a new one of a checkpoint, or the one that a run or folder has."""

from __future__ import annotations

import argparse
from pathlib import Path

from lit_transdiff.base.hub import SCHEME, hub_place
from lit_transdiff.config import require
from lit_transdiff.config.paths import checkpoints_folder, export_folder


def exported(args: argparse.Namespace) -> Path:
    """The folder of the export. For an upload with no other option it is the trained model that is there."""
    chosen = args.step is not None or args.average != "ema" or args.half or args.output is not None
    of_hub = [name for name in ("private", "revision") if getattr(args, name)]
    require(args.hub is not None or not of_hub, f"--{' and --'.join(of_hub)}", True, "only with --hub")
    if args.hub is not None:
        hub_place(f"{SCHEME}{args.hub}", "--hub")
        if not chosen:
            return export_folder(args.run_folder)
    checkpoints_folder(args.run_folder)
    from lit_transdiff.checkpoints.export import export_run

    return export_run(Path(args.run_folder), args.step, args.average, args.output, half=args.half)
