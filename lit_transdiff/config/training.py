"""Settings of the objective, the optimizer, and the length and intervals of a run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, Optional

from lit_transdiff.config.checks import require

MOST_PROFILED = 100  # steps; the operations of more would not fit into memory


@dataclass(frozen=True)
class FlowConfig:
    """The training objective, the sampling of t, and the label dropout."""

    objective: str = "velocity"  # a name in flow.loss.OBJECTIVES: the error to be minimised
    loss_terms: dict[str, float] = field(default_factory=dict)
    # names in flow.loss.LOSS_TERMS with the weights of the terms added to the objective, as in {direction:
    # 0.1}
    density: str = "logit_normal"  # a name in flow.loss.DENSITIES
    density_mean: float = 0.0  # mean of the normal distribution under the logit; only for logit_normal
    density_std: float = 1.0  # standard deviation of the same distribution
    shift: float = 1.0  # t -> shift t / (1 + (shift - 1) t); above 1 moves mass towards noise
    discretize: Optional[int] = None
    # n: t -> floor(t n) / n, as in the reference with n = 1000; null: continuous times
    num_noise_draws: int = 4  # number of noise and time samples per image and step, which share its context
    label_drop_prob: float = 0.1  # probability of replacing the label by the null class, for guidance

    def __post_init__(self) -> None:
        require(self.density_std > 0, "flow.density_std", self.density_std, "above 0")
        require(self.shift > 0, "flow.shift", self.shift, "above 0")
        allowed = "null, or at least 2"
        require(self.discretize is None or self.discretize >= 2, "flow.discretize", self.discretize, allowed)
        allowed = "an integer of at least 1"
        require(self.num_noise_draws >= 1, "flow.num_noise_draws", self.num_noise_draws, allowed)
        require(0 <= self.label_drop_prob <= 1, "flow.label_drop_prob", self.label_drop_prob, "0 to 1")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer with the paper's two parameter groups, warm-up, clipping and weight averages."""

    name: str = "adamw"  # a name in stages.optim.OPTIMIZERS
    lr: float = 8e-4  # learning rate after the warm-up
    muon_lr: Optional[float] = None  # learning rate of the blocks' matrices with name=muon; null: 10 times lr
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    # decay rates of the first and second moments of AdamW
    eps: float = 1e-8  # added to the root of AdamW's second moment
    weight_decay: float = 0.02  # weight decay of the encoder's matrices; biases, norms and decoder have none
    warmup_steps: int = 0  # number of steps of the linear warm-up
    warmup_offset: float = 1.0
    # the factor of step s is (s + offset) / warmup_steps; in the reference the offset is 1 - 1 / accumulated
    # passes
    schedule: str = "constant"  # a name in stages.optim.SCHEDULES
    min_lr: float = 0.0  # final learning rate of cosine; wsd covers 63/64 of the way to it
    gradient_clip: float = 3.0  # maximal norm of all gradients together; 0: no clipping
    gradient_scale: float = 1.0
    # factor of the mean loss before clipping; the number of accumulated passes reproduces the reference's sum
    # over passes
    ema_decay: float = 0.9999  # decay of the average of the weights that is validated, sampled and exported
    more_ema_decays: list[float] = field(default_factory=list)
    # decays of further averages, for ``export --average ema_DECAY``
    power_widths: list[float] = field(default_factory=list)
    # widths of further power-function averages (EDM2: 0.05, 0.1), for ``export --average ema_power_WIDTH``

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "gradient_scale"):
            require(getattr(self, name) > 0, f"optimizer.{name}", getattr(self, name), "above 0")
        allowed = "null, or above 0"
        require(self.muon_lr is None or self.muon_lr > 0, "optimizer.muon_lr", self.muon_lr, allowed)
        require(self.weight_decay >= 0, "optimizer.weight_decay", self.weight_decay, "0 or more")
        require(0 <= self.min_lr <= self.lr, "optimizer.min_lr", self.min_lr, f"0 to optimizer.lr={self.lr}")
        decays, widths = [self.ema_decay, *self.more_ema_decays], self.power_widths
        require(0 <= self.ema_decay < 1, "optimizer.ema_decay", self.ema_decay, "0 <= decay < 1")
        fits = all(0 <= decay < 1 for decay in decays)
        require(fits, "optimizer.more_ema_decays", self.more_ema_decays, "0 <= decay < 1")
        require(len(set(decays)) == len(decays), "optimizer.more_ema_decays", decays, "decays that differ")
        allowed = "different widths above 0 and below 0.288 (the mean of all updates)"
        fits = all(0 < width < 12**-0.5 for width in widths) and len(set(widths)) == len(widths)
        require(fits, "optimizer.power_widths", widths, allowed)
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        require(0 <= self.warmup_offset <= 1, "optimizer.warmup_offset", self.warmup_offset, "0 to 1")
        require(self.gradient_clip >= 0, "optimizer.gradient_clip", self.gradient_clip, "0 (off) or more")
        fits = len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas)
        require(fits, "optimizer.betas", self.betas, "two values in [0, 1)")

    @property
    def num_averages(self) -> int:
        """The number of weight averages."""
        return 1 + len(self.more_ema_decays) + len(self.power_widths)


@dataclass(frozen=True)
class TrainingConfig:
    """Length, batch and intervals of a run, in optimizer steps and images seen, never epochs."""

    max_steps: int = 1000  # number of optimizer steps of the run
    global_batch_size: int = 256
    # rows (groups of num_references images) per step, over all devices and accumulated passes
    micro_batch_size: Optional[int] = None
    # rows per device and pass; null: global_batch_size / devices, without accumulation
    precision: Literal["auto", "fp32", "bf16-mixed", "fp16-mixed", "bf16-true"] = "auto"
    # auto: bf16-mixed on GPUs that support it, else fp32. Weights and their averages are float32 in all modes
    # but bf16-true, where weights and optimizer are bfloat16 as in the reference's fine-tuning: small updates
    # are then lost to rounding.
    frozen_dropout: bool = False  # stage diffusion_head: dropout in the frozen encoder, as in the reference
    log_every: int = 10  # steps between logged values
    validate_every: int = 0  # steps; 0: only at the end
    checkpoint_every: int = 500  # steps between checkpoints
    sample_every: int = 0  # steps between sample grids; 0: only at the end
    num_validation_samples: int = 512  # images of data.evaluation, the same every time; 0: no validation
    callbacks: list[str] = field(default_factory=list)  # names in training.callbacks.CALLBACKS
    profile_steps: list[int] = field(default_factory=list)
    # first and last step of which a profile is written to the run folder (profile/), as in [100, 110]; []:
    # none
    kernels: Literal["auto", True, False] = "auto"
    # Triton kernels on GPUs (docs/performance.md): in bf16 or fp16 between the matrix products of the blocks
    # that have them, except with zero3; with single and ddp, AdamW with clipping and averages in one pass
    residual_dtype: Literal["fp32", "bf16"] = "fp32"
    # the sum of the layers' outputs, with mixed precision; bf16 is faster on GPUs, and rounds at every layer
    matmul_precision: Literal["highest", "high"] = "highest"
    # precision of products of float32 matrices, in torch's words; high allows TF32 on GPUs that have it
    compile: Literal["auto", True, False] = "auto"
    # torch.compile of the blocks; auto: on GPUs, of blocks without kernels. If it fails, the run continues
    # without it, with a warning
    cuda_graphs: Literal["auto", True, False] = "auto"
    # forward and backward pass as one CUDA graph; auto: on a GPU, with single and ddp, without recomputation
    activation_checkpointing: str = "none"
    # "all", or one of the model's stacks of blocks (encoder, decoder), recomputed in the backward pass
    activation_checkpointing_every: int = 1  # recompute every n-th of those blocks

    def __post_init__(self) -> None:
        positive = (
            "max_steps",
            "global_batch_size",
            "log_every",
            "checkpoint_every",
            "activation_checkpointing_every",
        )
        for name in positive:
            allowed = "an integer of at least 1"
            require(getattr(self, name) >= 1, f"training.{name}", getattr(self, name), allowed)
        require(self.max_steps <= 10**9, "training.max_steps", self.max_steps, "at most 1,000,000,000")
        for name in ("validate_every", "sample_every", "num_validation_samples"):
            require(getattr(self, name) >= 0, f"training.{name}", getattr(self, name), "0 or more")
        steps = self.profile_steps
        allowed = f"[], or the first and last of 1 to {MOST_PROFILED} steps, as in [100, 110]"
        fits = not steps or (len(steps) == 2 and 1 <= steps[0] <= steps[1] < steps[0] + MOST_PROFILED)
        require(fits, "training.profile_steps", steps, allowed)
        micro = self.micro_batch_size
        allowed = f"a divisor of training.global_batch_size={self.global_batch_size}"
        fits = micro is None or (micro >= 1 and self.global_batch_size % micro == 0)
        require(fits, "training.micro_batch_size", micro, allowed)
        allowed = "auto or false when blocks are recomputed (training.activation_checkpointing)"
        fits = self.cuda_graphs is not True or self.activation_checkpointing == "none"
        require(fits, "training.cuda_graphs", self.cuda_graphs, allowed)
        allowed = "1 when training.activation_checkpointing is 'none'"
        fits = self.activation_checkpointing_every == 1 or self.activation_checkpointing != "none"
        require(fits, "training.activation_checkpointing_every", self.activation_checkpointing_every, allowed)

    @property
    def takes_graphs(self) -> bool:
        """Whether the passes are to be CUDA graphs, where the device and the strategy allow it."""
        return self.cuda_graphs is True or (
            self.cuda_graphs == "auto" and self.activation_checkpointing == "none"
        )

    def recomputed(self, stacks: Iterable[str]) -> list[str]:
        """The recomputed ones of a model's stacks of blocks."""
        return [name for name in stacks if self.activation_checkpointing in ("all", name)]
