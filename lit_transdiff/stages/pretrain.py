"""Train a model of any family from scratch."""

from __future__ import annotations

from lit_transdiff.stages.base import TransDiffStage


class Pretrain(TransDiffStage):
    """Train all weights."""
