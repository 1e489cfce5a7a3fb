"""Settings of sampling."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Optional

from lit_transdiff.config.checks import require

Precision = Literal["fp32", "bf16", "auto"]

# Named sampler settings (``--preset``), between those of a run and single overrides.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": dict(
        solver="euler_maruyama",
        grid="paper",
        num_steps=100,
        guidance_interval=[0.0, 1.0],
        reference_steps=None,
    ),
    # An eighth of the decoder evaluations; docs/performance.md says how good its images are.
    "fast": dict(
        solver="heun",
        grid="uniform",
        num_steps=6,
        drift_scale=1.0,
        noise_scale=1.0,
        guidance_interval=[0.0, 1.0],
        reference_steps=None,
    ),
}

MOST_STEPS = 100_000  # upper limit of solver steps


@dataclass(frozen=True)
class SamplingConfig:
    """Sampling from a trained model."""

    solver: str = "euler_maruyama"
    # a name in flow.solvers.SOLVERS, or for discrete diffusion in flow.diffusion.CHAIN_SOLVERS
    grid: str = "paper"  # a name in flow.solvers.GRIDS
    num_steps: int = 100  # solver steps per image; of dopri5, which chooses them, the most
    shift: float = 1.0  # shift of the grid, by the formula of flow.shift
    rtol: float = 1e-3  # error of a step of dopri5 that is accepted, relative to the state
    atol: float = 1e-6  # the same, absolute: each error stays below atol + rtol |x|
    drift_scale: float = 1.0  # the paper's scale_0
    noise_scale: float = 1.0  # the paper's scale_1; for discrete diffusion the temperature
    diffusion: Literal["sigma", "decreasing"] = "sigma"
    # noise of stochastic solvers at t: the paper's t, or SiT's (1 - cos(pi t))^2 / 4
    last_step: Literal["drift", "velocity"] = "drift"
    # direction of the last step of stochastic solvers, without noise: their drift (paper), or the velocity
    guidance_scale: float = 1.0  # v = u + scale (c - u) of classifier-free guidance; 1: none
    guidance: str = "constant"  # a name in flow.guidance.GUIDANCE: dependence of the scale on t
    part_guidance: str = "constant"  # a name in flow.guidance.PART_GUIDANCE: how the scale grows over parts
    guidance_interval: list[float] = field(default_factory=lambda: [0.0, 1.0])
    # interval of t (1 = noise) with guidance
    reference_guidance: Optional[list[float]] = None  # guidance_scale of each reference instead
    reference_steps: Optional[list[int]] = None  # num_steps of each reference instead
    reuse_noise: bool = True  # MRAR: the same initial noise for all references of a row, as in the paper
    num_parts: Optional[int] = None
    # parts of an image in families that let you choose; null: the family's default
    precision: Precision = "fp32"
    # precision of the model in sampling; the solver's state is float32. auto: bf16 on GPUs that have it, and
    # on CPUs with instructions for it (AMX), else fp32

    def __post_init__(self) -> None:
        steps = [self.num_steps, *(self.reference_steps or [])]
        allowed = f"integers of 1 to {MOST_STEPS:,}"
        require(all(1 <= n <= MOST_STEPS for n in steps), "sampling.num_steps", steps, allowed)
        allowed = "at least 1"
        require(self.num_parts is None or self.num_parts >= 1, "sampling.num_parts", self.num_parts, allowed)
        require(self.shift > 0, "sampling.shift", self.shift, "above 0")
        require(1e-6 <= self.rtol <= 1, "sampling.rtol", self.rtol, "1e-6 (the state is float32) to 1")
        require(0 < self.atol <= 1, "sampling.atol", self.atol, "above 0, at most 1")
        scales = [self.guidance_scale, *(self.reference_guidance or [])]
        require(all(s >= 1 for s in scales), "sampling.guidance_scale", scales, "at least 1 (no guidance)")
        low_high = self.guidance_interval
        fits = len(low_high) == 2 and 0 <= low_high[0] <= low_high[1] <= 1
        require(fits, "sampling.guidance_interval", low_high, "[low, high] with 0 <= low <= high <= 1")
        for name in ("drift_scale", "noise_scale"):
            require(getattr(self, name) >= 0, f"sampling.{name}", getattr(self, name), "0 or more")
