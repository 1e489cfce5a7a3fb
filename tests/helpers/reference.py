"""The reference implementation's numbers (tests/fixtures) as tensors, and models that carry its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.config import FlowConfig, ModelConfig
from lit_transdiff.flow.straight import Flow
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import from_released, read_shape

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = json.loads((FIXTURES / "index.json").read_text())


def load(name: str) -> dict[str, Tensor]:
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in tensors.items()}


def model(case: str) -> TransDiff:
    """A model of the case's shape with its weights, in evaluation mode."""
    theirs = CASES[case]["config"]
    weights = load(CASES[case]["weights"])
    dropout = dict(attention_dropout=theirs["attn_dropout"], projection_dropout=theirs["proj_dropout"])
    config = ModelConfig(**read_shape(weights, theirs["encoder_num_heads"]), **dropout)
    result = TransDiff(config).eval()
    result.load_state_dict(from_released(weights, config).state)
    return result


def assert_near(case: str, name: str, ours: Tensor, reference: Tensor) -> None:
    """Largest error relative to the largest value, within the tolerance that the case states.

    That is 1e-5, or 168 units of float32 rounding (2^-24): a dozen products one after the other, whose sums
    of up to 192 terms err by some sqrt(192) units each. What depends on t needs the frequencies of
    ``reference_frequencies``.
    """
    assert ours.shape == reference.shape
    error = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    assert error <= CASES[case]["recommended_max_rel_err"][name], f"{case}/{name}: relative error {error:.2e}"


def tokens_to_latents(tokens: Tensor) -> Tensor:
    """Row-major tokens [..., 256, 16] of the reference -> latents [..., 16, 16, 16], written out
    independently of ours.
    """
    return tokens.reshape(*tokens.shape[:-2], 16, 16, 16).movedim(-1, -3)


def latents_to_tokens(latents: Tensor) -> Tensor:
    return latents.movedim(-3, -1).flatten(-3, -2)


@cache
def reference_frequencies() -> Tensor:
    """The frequencies of the time features [128] as the reference's processor rounded them, read back from
    its features.

    float32 exp differs between processors in its last places, and 1000 rad turn these into 1e-4. Of the 41
    float32 values around the exact frequency, the one whose cosines and sines come closest to the reference's
    is taken.
    """
    case = load("onestep256_decoder")
    times = torch.cat([case["in/t_int"], case["in/t_frac"]])
    features = torch.cat([case["out/sinusoid_int"], case["out/sinusoid_frac"]])
    exact = (-math.log(10_000) * torch.arange(128).double() / 128).exp().float()
    candidates = (exact.view(torch.int32) + torch.arange(-20, 21, dtype=torch.int32)[:, None]).view(
        torch.float32
    )
    found = torch.stack([features_of(times, frequencies) for frequencies in candidates])
    errors = (found - features).abs().unflatten(-1, (2, 128)).amax(dim=(1, 2))
    return candidates.gather(0, errors.argmin(dim=0, keepdim=True))[0]


def features_of(t: Tensor, frequencies: Tensor) -> Tensor:
    """Cosines then sines [B, 256] of ``t`` [B] in [0, 1000] at the frequencies [128]."""
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def flow_loss(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, noise: Tensor, t: Tensor, config: FlowConfig
) -> Tensor:
    """The loss [B] of every row x [B, ...] on the linear path at times [B], of which ``velocity(x_t, t)`` is
    predicted.
    """
    process = Flow(config, "velocity")
    x_t = process.noised(x, noise, t)
    return process.losses(velocity(x_t, t), x, noise, t, x_t)
