"""Stage 1: encoder and decoder jointly, one-step autoregression (arXiv 2506.09482, section 3.2)."""

from __future__ import annotations

from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import TransDiffStage


class ARPretrain(TransDiffStage):
    """Everything is trained; one group of mask tokens and no references."""

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        require(run.model.num_references == 1, "model.num_references", run.model.num_references, "1 in stage ar_pretrain")
