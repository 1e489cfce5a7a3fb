"""Stage 1: encoder and decoder jointly, one-step autoregression (arXiv 2506.09482, section 3.2)."""

from __future__ import annotations

from lit_transdiff.config import RunConfig, require
from lit_transdiff.stages.base import TransDiffStage


class ARPretrain(TransDiffStage):
    """Train all weights, with one group of mask tokens and no references."""

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        paradigm, allowed = run.model.paradigm, "'pretrain', the stage of families without references"
        require(run.model.has_references(), f"stage with model.paradigm {paradigm}", run.stage, allowed)
        number = run.model.num_references
        require(number == 1, "model.num_references", number, "1 in stage ar_pretrain")
