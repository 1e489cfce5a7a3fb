"""Samplers and the loader of training: planned rows from the current step on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Optional

from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from lit_transdiff.config import require
from lit_transdiff.data.order import BatchLayout, Rows, TrainPlan
from lit_transdiff.data.remote_shards import ShardsAhead
from lit_transdiff.data.stream import StreamDataset

# The version of the rule by which images are mirrored and cropped; the states of the first one lack it.
AUGMENTATION = {"rule of augmentation": 2}
log = logging.getLogger(__name__)


class RowsInOrder(SequentialSampler, DistributedSampler):
    """Rows of this rank in a fixed order, as a sampler that Lightning does not replace."""

    def __init__(self, batches: Sequence[Rows]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Rows]:  # type: ignore[override]
        return iter(self.batches)


class PlanSampler(RowsInOrder):
    """The rows of each micro-batch of this rank, from the current step to the end of the run; ``ahead`` gives
    the shards at a URL that are read from a position on.
    """

    def __init__(
        self,
        plan: TrainPlan,
        layout: BatchLayout,
        total: int,
        start: Callable[[], int],
        ahead: Optional[ShardsAhead] = None,
    ) -> None:
        self.plan, self.layout, self.total, self.start = plan, layout, total, start
        self.ahead = ahead

    def __len__(self) -> int:
        """The micro-batches of the whole run: on resuming, Lightning counts the earlier ones as fetched."""
        return self.total

    def __iter__(self) -> Iterator[Rows]:  # type: ignore[override]
        for micro_step in range(self.start(), self.total):
            first = self.layout.start(micro_step)
            rows = self.plan.rows(first, first + self.layout.micro_batch)
            yield rows if self.ahead is None else rows._replace(ahead=self.ahead(first))


class TrainLoader(DataLoader):
    """A DataLoader positioned by the trainer; its state only contains what a resumed run must not change."""

    def __init__(
        self, dataset: Any, start: Callable[[], int], identity: dict[str, int], **options: Any
    ) -> None:
        super().__init__(dataset, **options)
        self.start, self.identity = start, identity

    def __iter__(self) -> Any:
        if isinstance(self.dataset, StreamDataset):
            # workers receive a copy of the dataset when iteration begins
            self.dataset.first_micro_step = self.start()
        return super().__iter__()

    def state_dict(self) -> dict[str, int]:
        return dict(self.identity)

    def load_state_dict(self, state: dict[str, int]) -> None:
        for name, value in state.items():
            fits = self.identity.get(name) == value
            require(fits, f"resuming with another {name}", self.identity.get(name), f"{value}, as before")
        if self.identity.keys() & AUGMENTATION.keys() - state.keys():
            log.warning(
                "this run began with an earlier version, which mirrored and cropped other images at random; "
                "from here on it follows the rule of this version"
            )
