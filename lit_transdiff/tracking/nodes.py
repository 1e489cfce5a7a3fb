"""One W&B client on each further node of a run, which adds the system metrics of its node to the run."""

from __future__ import annotations

import logging
import shutil
import tempfile
from typing import TYPE_CHECKING

from lit_transdiff.base.remote_errors import one_line
from lit_transdiff.tracking.server import finish_timeout, finished_within, wait_of

if TYPE_CHECKING:
    import wandb

START = 20.0  # the most seconds that the start of a client waits for the server; see WANDB_INIT_TIMEOUT
log = logging.getLogger(__name__)


def node_label(node: int) -> str:
    """The name of a node's system metrics in W&B."""
    return f"node-{node}"


class NodeClient:
    """Sends this node's system metrics to a run in shared mode until it is closed.

    Its own log is in a temporary folder: the run's log is that of the first node. Without the server, only
    the node's metrics are missing.
    """

    def __init__(self, project: str, id_: str, node: int) -> None:
        import wandb

        self.run: wandb.Run | None = None
        self.folder = tempfile.mkdtemp(prefix="lit-transdiff-wandb-")
        settings = wandb.Settings(
            x_primary=False,
            x_label=node_label(node),
            x_update_finish_state=False,
            console="off",
            silent=True,
            init_timeout=wait_of("WANDB_INIT_TIMEOUT", START),
            finish_timeout=finish_timeout(),
        )
        try:
            self.run = wandb.init(mode="shared", project=project, id=id_, dir=self.folder, settings=settings)
        except wandb.errors.Error as error:
            log.warning("W&B gets no system metrics of node %d (%s)", node, one_line(error))

    def close(self) -> None:
        """End the client, whatever becomes of the run."""
        if self.run is not None:
            finished_within(finish_timeout(), self.run, 0)
            self.run = None
        shutil.rmtree(self.folder, ignore_errors=True)
