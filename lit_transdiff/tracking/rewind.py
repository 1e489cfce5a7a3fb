"""Rewinding a W&B run to the checkpoint that it continues from: after a kill, no point is shown twice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_transdiff.base.remote_errors import one_line
from lit_transdiff.tracking.server import answers

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)


def rewind_point(project: str, id_: str, axis: str, value: int) -> str | None:
    """The last moment of a run, ``ID?_step=N``, before its first ``axis`` above ``value``, or None."""
    import wandb

    last = None
    try:
        (source,) = answers(lambda: [wandb.Api().run(f"{project}/{id_}")], f"the run {id_}")
        rows = answers(lambda: source.scan_history(keys=["_step", axis]), f"the points of run {id_}")
        for row in rows:
            if row[axis] > value:
                return None if last is None else f"{id_}?_step={last}"
            last = row["_step"]
    except ConnectionError as error:
        log.info("W&B's run is not rewound: %s", error)
    return None


def rewound(moment: str | None, given: Mapping[str, Any]) -> wandb.Run | None:
    """Continue a run at an earlier ``moment``; None if the server does not do that (it is a preview)."""
    import wandb

    if moment is None:
        return None
    try:
        return wandb.init(resume_from=moment, **given)
    except wandb.errors.Error as error:
        text = "W&B does not rewind the run to its checkpoint, and shows later points twice (%s)"
        log.info(text, one_line(error))
        wandb.teardown()  # the service still has the run that could not start
        return None
