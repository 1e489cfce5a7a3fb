"""All settings of the platform, as frozen dataclasses that are validated when they are made.

A run is one YAML file (see ``loading``). This package imports no torch, so that an invalid setting is
reported before any slow import.
"""

from lit_transdiff.config.checks import (
    are_numbers,
    errors_at,
    expand,
    expanded,
    is_folder_name,
    require,
    require_classes,
    require_known,
    shipped,
    some,
    unknown,
)
from lit_transdiff.config.data import (
    BACKGROUNDS,
    AutoencoderConfig,
    AutoencoderTraining,
    DataConfig,
    is_colour,
    is_stream,
)
from lit_transdiff.config.effects import EFFECTS, check_effects
from lit_transdiff.config.evaluation import EvaluationConfig
from lit_transdiff.config.family import Family, ModelSettings
from lit_transdiff.config.model import SIZES, ModelConfig
from lit_transdiff.config.paradigms import PARADIGMS
from lit_transdiff.config.run import NESTED, RunConfig
from lit_transdiff.config.running import CheckpointConfig, DistributedConfig, SafetyConfig, TrackingConfig
from lit_transdiff.config.sampling import PRESETS, SamplingConfig
from lit_transdiff.config.training import FlowConfig, OptimizerConfig, TrainingConfig

__all__ = [
    "BACKGROUNDS",
    "EFFECTS",
    "NESTED",
    "PARADIGMS",
    "PRESETS",
    "SIZES",
    "AutoencoderConfig",
    "AutoencoderTraining",
    "CheckpointConfig",
    "DataConfig",
    "DistributedConfig",
    "EvaluationConfig",
    "Family",
    "FlowConfig",
    "ModelConfig",
    "ModelSettings",
    "OptimizerConfig",
    "RunConfig",
    "SafetyConfig",
    "SamplingConfig",
    "TrackingConfig",
    "TrainingConfig",
    "are_numbers",
    "check_effects",
    "errors_at",
    "expand",
    "expanded",
    "is_colour",
    "is_folder_name",
    "is_stream",
    "require",
    "require_classes",
    "require_known",
    "shipped",
    "some",
    "unknown",
]
