"""Stage 3: multi-reference autoregression (arXiv 2506.09482, section 3.3)."""

from __future__ import annotations

from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import TransDiffStage


class MRARFinetune(TransDiffStage):
    """Everything is trained; each next image of a class attends to the earlier ones, and the loss is the mean over all R."""

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        require(
            run.model.num_references > 1, "model.num_references", run.model.num_references, "at least 2 in stage mrar_finetune"
        )
