"""The numbers of the official SiT, DiT and MAR (tests/fixtures/paradigms) as tensors, and networks that carry their weights."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.models.mar import MaskedTransformer
from lit_transdiff.models.sit import PatchTransformer, position_table
from tests.helpers.reference import FIXTURES

FOLDER = FIXTURES / "paradigms"
INDEX = json.loads((FOLDER / "index.json").read_text())
SHAPES: dict[str, dict[str, list[int]]] = json.loads((FOLDER / "state_dict_shapes.json").read_text())


def tensors(name: str) -> dict[str, Tensor]:
    """Those of a file, halves as float32 (exact)."""
    stored = load_file(FOLDER / f"{name}.safetensors")
    return {key: value.float() if value.is_floating_point() else value for key, value in stored.items()}


def settings(case: str) -> dict[str, Any]:
    return INDEX["cases"][case]["config"]


def scalars(case: str) -> dict[str, Any]:
    return INDEX["cases"][case]["scalars_in"]


def check(case: str, name: str, ours: Tensor, official: dict[str, Tensor]) -> float:
    """Largest error relative to the largest value, within the case's tolerance; 0 is exact. Gives the error."""
    reference = official[f"out/{name}"]
    assert ours.shape == reference.shape
    error = ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()
    allowed = INDEX["cases"][case]["recommended_max_rel_err"][name]
    assert error <= allowed, f"{case}/{name}: relative error {error:.2e}, allowed {allowed:.0e}"
    return error


def patch_transformer(case: str) -> PatchTransformer:
    """SiT or DiT with the case's weights, in evaluation mode."""
    theirs = settings(case)
    net = PatchTransformer(
        width=theirs["hidden_size"],
        num_heads=theirs["num_heads"],
        num_blocks=theirs["depth"],
        mlp_ratio=theirs["mlp_ratio"],
        num_classes=theirs["num_classes"],
        latent_channels=theirs["in_channels"],
        latent_size=theirs["input_size"],
        patch_size=theirs["patch_size"],
        learn_sigma=theirs["learn_sigma"],
    ).eval()
    table = position_table(theirs["hidden_size"], theirs["input_size"] // theirs["patch_size"])
    net.load_state_dict(tensors(INDEX["cases"][case]["weights"]) | {"pos_embed": table[None]})
    return net


def masked_transformer() -> MaskedTransformer:
    """MAR with the fixtures' weights, in evaluation mode."""
    theirs = settings("mar_transformer")
    net = MaskedTransformer(
        width=theirs["encoder_embed_dim"],
        decoder_width=theirs["decoder_embed_dim"],
        num_heads=theirs["encoder_num_heads"],
        encoder_blocks=theirs["encoder_depth"],
        decoder_blocks=theirs["decoder_depth"],
        mlp_ratio=theirs["mlp_ratio"],
        num_classes=theirs["class_num"],
        num_class_tokens=theirs["buffer_size"],
        num_tokens=(theirs["img_size"] // theirs["vae_stride"]) ** 2,
        token_features=theirs["vae_embed_dim"],
        head_width=theirs["diffloss_w"],
        head_blocks=theirs["diffloss_d"],
        attention_dropout=theirs["attn_dropout"],
        projection_dropout=theirs["proj_dropout"],
    ).eval()
    net.load_state_dict(tensors("w_mar"))
    return net


def as_tokens(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C], written out independently of ours."""
    return latents.flatten(2).transpose(1, 2)


def same_shapes(net: torch.nn.Module, published: str, left_out: tuple[str, ...] = ()) -> None:
    """The network has exactly the published keys and shapes."""
    ours = {key: [*value.shape] for key, value in net.state_dict().items() if key not in left_out}
    assert ours == SHAPES[published]
