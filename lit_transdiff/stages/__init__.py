"""The training stages by name (the setting ``stage``)."""

from __future__ import annotations

from lit_transdiff.stages.ar_pretrain import ARPretrain
from lit_transdiff.stages.autoencoder import AutoencoderStage
from lit_transdiff.stages.base import TransDiffStage
from lit_transdiff.stages.classifier import ClassifierStage
from lit_transdiff.stages.diffusion_head import DiffusionHead
from lit_transdiff.stages.judge import JudgeStage
from lit_transdiff.stages.mrar_finetune import MRARFinetune
from lit_transdiff.stages.preparatory import PreparatoryStage
from lit_transdiff.stages.pretrain import Pretrain

STAGES: dict[str, type[TransDiffStage]] = {
    "ar_pretrain": ARPretrain,
    "diffusion_head": DiffusionHead,
    "mrar_finetune": MRARFinetune,
    "pretrain": Pretrain,
}
# Trained once per data set, before the stages: an autoencoder, a classifier, and a judge for scoring.
PREPARATORY: dict[str, type[PreparatoryStage]] = {
    "autoencoder": AutoencoderStage,
    "classifier": ClassifierStage,
    "judge": JudgeStage,
}
