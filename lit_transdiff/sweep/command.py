"""The command of a trial, built by W&B's own code from a sweep file, so that both run the same command."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lit_transdiff.config import unknown
from lit_transdiff.config.yaml_text import dump


def trial_command(
    command: Sequence[str] | None, program: str | None, settings: dict[str, Any], json_file: Path
) -> list[str]:
    """Expand the macros of ``command``: ``${env}``, ``${interpreter}``, ``${program}``, ``${args}``, ..."""
    from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

    filled: dict[str, Any] = create_sweep_command_args(
        {"args": {key: {"value": value} for key, value in settings.items()}}
    )
    filled |= dict(env=["/usr/bin/env"], interpreter=[sys.executable], program=[program] if program else [])
    filled |= dict(args_json_file=[str(json_file)])
    json_file.write_text(json.dumps(settings))
    lists = {name: value for name, value in filled.items() if isinstance(value, list)}
    words: list[str] = []
    for word in create_sweep_command(list(command) if command else None):
        macro = str(word)[2:-1] if str(word).startswith("${") and str(word).endswith("}") else None
        if macro is None:
            words.append(str(word))
        elif macro in lists:
            words += lists[macro]
        else:
            raise unknown("command: macro", macro, lists)
    return words


def write_parameters(settings: dict[str, Any], file: Path) -> None:
    """Write the swept settings in the format of an agent (``WANDB_SWEEP_PARAM_PATH``)."""
    file.write_text(dump({"wandb_version": 1, **{key: {"value": value} for key, value in settings.items()}}))
