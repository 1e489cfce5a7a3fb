"""Stage 3: multi-reference autoregression (arXiv 2506.09482, section 3.3)."""

from __future__ import annotations

from lit_transdiff.config import PARADIGMS, RunConfig, require
from lit_transdiff.stages.base import TransDiffStage


class MRARFinetune(TransDiffStage):
    """Train all weights; an image attends to the earlier ones of its row, and the loss is the mean over R."""

    @classmethod
    def check(cls, run: RunConfig) -> None:
        super().check(run)
        families = [name for name, family in PARADIGMS.items() if family.settings.has_references()]
        paradigm, number = run.model.paradigm, run.model.num_references
        allowed = f"{', '.join(families)} in stage mrar_finetune, whose rows have references"
        require(paradigm in families, "model.paradigm", paradigm, allowed)
        require(number > 1, "model.num_references", number, "at least 2 in stage mrar_finetune")
