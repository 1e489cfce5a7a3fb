"""Opening, writing and closing a W&B run.

A run folder is one W&B run across restarts and contains W&B's local files. W&B's own environment variables
select online, offline or disabled. An unreachable server costs no training step: at the start, the run is
recorded offline with a warning; later, the client continues to write its log, and the end of the run waits at
most ``FINISH_TIMEOUT`` seconds. Tables and artifacts (at the last step and after it) need the server and are
skipped after 20 s without an answer. All other data that the server has not received are in the run's
``.wandb`` file, for ``wandb sync --include-online``.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from lit_transdiff.base.files import replace_file
from lit_transdiff.base.remote_errors import one_line
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.loading import to_dict
from lit_transdiff.distributed import num_nodes
from lit_transdiff.tracking.identity import run_id
from lit_transdiff.tracking.metrics_file import device_count, last_logged, read_rows
from lit_transdiff.tracking.nodes import node_label
from lit_transdiff.tracking.origin import COPIED_FROM, read_record
from lit_transdiff.tracking.rewind import rewind_point, rewound
from lit_transdiff.tracking.server import (
    finish_timeout,
    finished_within,
    going_on_without,
    wait_of,
    writing_below,
)

if TYPE_CHECKING:
    import wandb

INIT_TIMEOUT = 20.0  # the most seconds that the start of a run waits for the server
MODES = ("online", "offline", "disabled", "shared", "dryrun", "run")  # the last two are old names
STEP, IMAGES_SEEN = "trainer/global_step", "images_seen"  # the two axes of every metric
NUM_DEVICES = "num_devices"  # on all nodes; stored beside the settings in the configuration
log = logging.getLogger(__name__)


def open_run(
    run: RunConfig,
    id_: str,
    *,
    folder: Path,
    name: str,
    job_type: str,
    shared: bool = False,
    rewind_to: int | None = None,
) -> wandb.Run:
    """Start or resume the W&B run ``id_`` with all its local files in ``folder``.

    If it is ``shared``, clients of other nodes can write to it, too. With ``rewind_to`` the server is asked
    to drop its points after this optimizer step.
    """
    keep_below(folder)
    mode = wandb_mode()
    if shared and mode == "offline":
        log.info("W&B is offline, and gets the system metrics of the first node only")
    mode = "shared" if shared and mode == "online" else mode
    given: dict[str, Any] = dict(
        id=id_,
        project=run.tracking.project,
        group=run.tracking.group,
        tags=run.tracking.tags,
        name=name,
        job_type=job_type,
        dir=str(folder),
        config=to_dict(run) | {NUM_DEVICES: device_count(run.folder)} | origin_of(folder),
        reinit="finish_previous",
    )
    opened = None
    if rewind_to is not None and mode in ("online", "shared"):
        moment = rewind_point(run.tracking.project, id_, STEP, rewind_to)
        opened = rewound(moment, {**given, "mode": mode, "settings": client_settings(mode)})
    opened = opened or resumed(mode, given, folder)
    opened.define_metric(STEP)
    opened.define_metric(IMAGES_SEEN)
    opened.define_metric("*", step_metric=IMAGES_SEEN)
    return opened


def client_settings(mode: str) -> wandb.Settings:
    """The client's settings, new ones for each start, because it notes there how the run is resumed."""
    import wandb

    return wandb.Settings(
        silent=mode == "offline" or os.environ.get("WANDB_SILENT") == "true",
        init_timeout=wait_of("WANDB_INIT_TIMEOUT", INIT_TIMEOUT),
        finish_timeout=finish_timeout(),
        x_label=node_label(0) if mode == "shared" else None,
    )


def resumed(mode: Any, given: dict[str, Any], folder: Path) -> wandb.Run:
    """Start or resume a run at its end; offline, with a warning, if the server cannot be reached."""
    import wandb

    try:
        return wandb.init(mode=mode, resume="allow", settings=client_settings(mode), **given)
    except wandb.errors.UsageError as error:
        raise ValueError(f"WANDB_MODE: got {mode!r}; {error}") from error
    except wandb.errors.CommError as error:
        text = "W&B cannot be reached (%s). This run is recorded offline; later: wandb sync %s/offline-run-*"
        log.warning(text, one_line(error), folder / "wandb")
        wandb.teardown()  # the service still has the run that could not start
        return wandb.init(mode="offline", resume="allow", settings=client_settings(mode), **given)


def origin_of(folder: Path) -> dict[str, Any]:
    """The run that a folder is a copy of, as an entry of W&B's configuration; empty for an original."""
    origin = read_record(folder / "wandb" / "run_id").get(COPIED_FROM)
    return {COPIED_FROM: origin} if origin else {}


def wandb_mode() -> Any:
    """The value of WANDB_MODE, one of ``MODES``; by default online with an API key, and offline without."""
    import wandb

    check_mode()
    return os.environ.get("WANDB_MODE") or (
        "online" if wandb.login(prompt=False, verify=False) else "offline"
    )


def check_mode() -> None:
    """Refuse an unknown WANDB_MODE before any work whose numbers would not be logged."""
    mode = os.environ.get("WANDB_MODE")
    require(mode is None or mode in MODES, "WANDB_MODE", mode, f"{', '.join(MODES)}, or not set")


def keep_below(folder: Path) -> None:
    """Set all of W&B's folders to places below ``folder``."""
    root = folder.resolve()
    for variable, place in (
        ("WANDB_DIR", root),
        ("WANDB_DATA_DIR", root / "wandb"),
        ("WANDB_CACHE_DIR", root / "wandb" / "cache"),
        ("WANDB_ARTIFACT_DIR", root / "wandb" / "artifacts"),
    ):
        with writing_below(place):
            place.mkdir(parents=True, exist_ok=True)
        os.environ[variable] = str(place)


def keep_linked(folder: Path) -> None:
    """Replace links by files: W&B's cache is removed, and other links break if the run is moved."""
    for path in list(folder.rglob("*")):
        if path.is_symlink() and os.path.isabs(os.readlink(path)) and path.is_file():
            replace_file(path, path.read_bytes())


class WandbRun(Logger):
    """Lightning logger for the W&B run of a run folder. The run starts on first use; only rank 0 writes."""

    def __init__(self, run: RunConfig) -> None:
        super().__init__()
        check_mode()
        self.run = run
        self.rewind_to: int | None = None  # the step of the checkpoint, if later ones were logged before
        self._opened: wandb.Run | None = None

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return ""

    @property
    @rank_zero_experiment
    def experiment(self) -> wandb.Run:
        if self._opened is None:
            run, folder = self.run, self.run.folder
            shared = run.tracking.every_node and num_nodes(run) > 1
            self._opened = open_run(
                run,
                run_id(folder),
                folder=folder,
                name=run.name,
                job_type=run.stage,
                shared=shared,
                rewind_to=self.rewind_to,
            )
            if self._opened.offline:  # its summary replaces that of earlier starts
                self._opened.summary.update(last_logged(read_rows(folder / "metrics.csv")))
        return self._opened

    def shared_id(self) -> str | None:
        """The id of the run, which starts here, if clients of other nodes can write to it."""
        opened = self.experiment
        return opened.id if opened.settings.mode == "shared" else None

    def adopt(self, run: wandb.Run) -> None:
        """Log to ``run`` instead of the run folder's own W&B run."""
        self._opened = run

    @rank_zero_only
    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the whole configuration is logged at the start."""

    def axes(self, step: int) -> dict[str, int]:
        """The values of both axes at an optimizer step; W&B's own step counts calls and is not an axis."""
        return {STEP: step, IMAGES_SEEN: step * self.run.images_per_step}

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.experiment.log({k: v for k, v in metrics.items() if k != "epoch"} | self.axes(step or 0))

    @rank_zero_only
    def log_picture(self, key: str, picture: Image.Image, step: int) -> None:
        """Log a labelled picture, such as a grid of samples."""
        import wandb

        self.experiment.log({key: wandb.Image(picture)} | self.axes(step))

    @rank_zero_only
    def log_table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Log a table; images in its cells are displayed."""
        import wandb

        cells = [
            [wandb.Image(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in rows
        ]
        with going_on_without(f"table {key}"):
            self.experiment.log({key: wandb.Table(columns=list(columns), data=cells)} | self.axes(step))

    @rank_zero_only
    def alert(self, title: str, text: str, *, bad: bool = False) -> None:
        """Send an alert to the people who follow the project."""
        self.experiment.alert(title, text, level="ERROR" if bad else "INFO")

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Close the run after a failure; a successful run still gets its model, and ``finish`` closes it."""
        if status != "success":
            self.finish(1)

    @rank_zero_only
    def finish(self, exit_code: int = 0) -> None:
        """Close the run, if it is open, waiting for the server at most ``FINISH_TIMEOUT`` seconds."""
        if self._opened is None:
            return
        opened, self._opened = self._opened, None
        limit, place = finish_timeout(), Path(opened.settings.sync_dir)
        start = time.monotonic()
        ended = finished_within(limit, opened, exit_code)
        keep_linked(place)
        shutil.rmtree(place.with_name("cache"), ignore_errors=True)  # only copies of other files
        if not ended or (not opened.offline and time.monotonic() - start >= limit):
            text = "W&B did not take everything in %.0f s; later: wandb sync --include-online %s"
            log.warning(text, limit, place)
