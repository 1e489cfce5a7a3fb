"""The reference implementation's numbers (tests/fixtures) as tensors, and models that carry its weights."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.config import ModelConfig
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import from_released, read_shape

FIXTURES = Path(__file__).parent / "fixtures"
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
    """Largest error relative to the largest value, within the tolerance that the case states."""
    assert ours.shape == reference.shape
    error = (ours.double() - reference.double()).abs().max() / reference.double().abs().max()
    assert error <= CASES[case]["recommended_max_rel_err"][name], f"{case}/{name}: relative error {error:.2e}"


def tokens_to_latents(tokens: Tensor) -> Tensor:
    """Row-major tokens [..., 256, 16] of the reference -> latents [..., 16, 16, 16], written out independently of ours."""
    return tokens.reshape(*tokens.shape[:-2], 16, 16, 16).movedim(-1, -3)


def latents_to_tokens(latents: Tensor) -> Tensor:
    return latents.movedim(-3, -1).flatten(-3, -2)
