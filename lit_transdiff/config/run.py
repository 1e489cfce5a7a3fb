"""The settings of a run: all sections, and the checks that span them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional, Union

from lit_transdiff.base.remote import is_remote
from lit_transdiff.config.checks import FOLDER_NAME, check_finite, expand, is_folder_name, require
from lit_transdiff.config.data import AutoencoderConfig, AutoencoderTraining, DataConfig
from lit_transdiff.config.evaluation import EvaluationConfig
from lit_transdiff.config.family import ModelSettings
from lit_transdiff.config.model import ModelConfig
from lit_transdiff.config.running import CheckpointConfig, DistributedConfig, SafetyConfig, TrackingConfig
from lit_transdiff.config.sampling import SamplingConfig
from lit_transdiff.config.training import FlowConfig, OptimizerConfig, TrainingConfig


@dataclass(frozen=True)
class RunConfig:
    """All settings of one run."""

    name: str = "run"  # name of the run and of its folder
    stage: str = "ar_pretrain"  # a name in stages.STAGES or stages.PREPARATORY
    output_dir: str = "runs"  # the run folder is output_dir/name
    imports: list[str] = field(default_factory=list)
    # modules of your own that add entries to the tables, as in [my_lab.ideas]
    seed: int = 0  # seed of weights, data order, noise and dropout
    init_from: Optional[str] = None  # run or export folder whose (EMA) weights initialise this run
    init_positions: Literal["new", "interpolate"] = "new"
    # if the latent size differs from that of init_from: new position tables, or interpolated ones
    init_classes: Union[Literal["same", "by_name", "by_number", "new"], dict[str, Optional[str]]] = "same"
    # class embeddings copied from init_from: of identical classes, by equal names, by equal numbers, none, or
    # by a map such as {sneaker: shoe, 3: 5} from a class of this run to one of init_from; the null class is
    # always copied
    init_shapes: Literal["same", "new"] = "same"
    # new: tensors that do not fit init_from (another patch size, latent channels or numbers of tokens) are
    # made anew
    data: DataConfig = field(default_factory=DataConfig)
    autoencoder: AutoencoderConfig = field(default_factory=lambda: AutoencoderConfig(kind="identity"))
    autoencoder_training: AutoencoderTraining = field(default_factory=AutoencoderTraining)
    model: ModelSettings = field(default_factory=ModelConfig)
    flow: FlowConfig = field(default_factory=FlowConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    safety: SafetyConfig = field(default_factory=SafetyConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        expand(self, "output_dir", "init_from")
        local = "a local folder; checkpoint.mirror copies it to a URL"
        require(not is_remote(self.output_dir), "output_dir", self.output_dir, local)
        require(is_folder_name(self.name), "name", self.name, FOLDER_NAME)
        require(0 <= self.seed < 2**32, "seed", self.seed, "0 to 2^32 - 1")
        allowed = f"at most training.max_steps={self.training.max_steps}"
        fits = self.optimizer.warmup_steps <= self.training.max_steps
        require(fits, "optimizer.warmup_steps", self.optimizer.warmup_steps, allowed)
        rhythm, validated = self.training.checkpoint_every, self.training.validate_every
        allowed = f"a multiple of training.checkpoint_every={rhythm} when checkpoint.keep_best is given"
        fits = self.checkpoint.keep_best is None or (validated > 0 and validated % rhythm == 0)
        require(fits, "training.validate_every", validated, allowed)
        for name, default in (("init_positions", "new"), ("init_classes", "same"), ("init_shapes", "same")):
            given, allowed = getattr(self, name), f"{default!r} without init_from, of whose weights it speaks"
            require(given == default or self.init_from is not None, name, given, allowed)
        for name in ("reference_guidance", "reference_steps"):
            values = getattr(self.sampling, name)
            allowed = f"one for each of the model's {self.model.num_references} references"
            fits = values is None or len(values) == self.model.num_references
            require(fits, f"sampling.{name}", values, allowed)

    @property
    def folder(self) -> Path:
        return Path(self.output_dir) / self.name

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step: a row of the batch has ``num_references`` of them."""
        return self.training.global_batch_size * self.model.num_references


# Section -> its class; ``model`` has the settings class of its paradigm.
NESTED: dict[str, type] = {
    "data": DataConfig,
    "autoencoder": AutoencoderConfig,
    "autoencoder_training": AutoencoderTraining,
    "model": ModelConfig,
    "flow": FlowConfig,
    "optimizer": OptimizerConfig,
    "training": TrainingConfig,
    "sampling": SamplingConfig,
    "evaluation": EvaluationConfig,
    "tracking": TrackingConfig,
    "distributed": DistributedConfig,
    "checkpoint": CheckpointConfig,
    "safety": SafetyConfig,
}
