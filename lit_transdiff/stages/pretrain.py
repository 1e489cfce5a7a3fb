"""Training from scratch of a model of any family."""

from __future__ import annotations

from lit_transdiff.stages.base import TransDiffStage


class Pretrain(TransDiffStage):
    """Everything is trained."""
