"""The table of model families (``model.paradigm``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_transdiff.config.acdit import ACDiTConfig
from lit_transdiff.config.ardiff import ARDiffConfig
from lit_transdiff.config.checks import unknown
from lit_transdiff.config.family import Family, ModelSettings
from lit_transdiff.config.flowar import FlowARConfig
from lit_transdiff.config.mar import MARConfig
from lit_transdiff.config.model import ModelConfig
from lit_transdiff.config.sit import DiTConfig, SiTConfig
from lit_transdiff.config.transdiff_parts import TransDiffPartsConfig
from lit_transdiff.config.xar import XARConfig

PARADIGMS: dict[str, Family] = {
    "transdiff": Family(ModelConfig, "lit_transdiff.models.transdiff:TransDiff"),
    "transdiff_parts": Family(TransDiffPartsConfig, "lit_transdiff.models.transdiff_parts:TransDiffParts"),
    "sit": Family(SiTConfig, "lit_transdiff.models.sit:SiT"),
    "dit": Family(DiTConfig, "lit_transdiff.models.sit:DiT"),
    "acdit": Family(ACDiTConfig, "lit_transdiff.models.acdit:ACDiT"),
    "xar": Family(XARConfig, "lit_transdiff.models.xar:XAR"),
    "flowar": Family(FlowARConfig, "lit_transdiff.models.flowar:FlowAR"),
    "ardiff": Family(ARDiffConfig, "lit_transdiff.models.ardiff:ARDiff"),
    "mar": Family(MARConfig, "lit_transdiff.models.mar:MAR"),
}


def settings_class(model: Mapping[str, Any]) -> type[ModelSettings]:
    """The settings class for a section ``model``. Raises ``ValueError`` for an unknown paradigm."""
    name = model.get("paradigm", ModelConfig.paradigm)  # absent in files of earlier versions
    if not isinstance(name, str) or name not in PARADIGMS:
        raise unknown("model.paradigm", name, PARADIGMS)
    return PARADIGMS[name].settings
