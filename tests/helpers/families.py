"""The numbers of the official implementations (tests/fixtures/paradigms) as tensors, and networks that carry
their weights.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.config.acdit import ACDiTConfig
from lit_transdiff.config.ardiff import ARDiffConfig
from lit_transdiff.config.flowar import FlowARConfig
from lit_transdiff.config.mar import MARConfig
from lit_transdiff.config.sit import DiTConfig, SiTConfig
from lit_transdiff.config.xar import XARConfig
from lit_transdiff.models.acdit import ACDiT
from lit_transdiff.models.ardiff import ARDiff
from lit_transdiff.models.flowar import FlowAR
from lit_transdiff.models.mar import MAR
from lit_transdiff.models.sit import DiT, SiT, position_table
from lit_transdiff.models.xar import XAR
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
    """Largest error relative to the largest value, within the case's tolerance; 0 is exact.

    Gives the error.
    """
    reference = official[f"out/{name}"]
    assert ours.shape == reference.shape
    error = ((ours.double() - reference.double()).abs().max() / reference.double().abs().max()).item()
    allowed = INDEX["cases"][case]["recommended_max_rel_err"][name]
    assert error <= allowed, f"{case}/{name}: relative error {error:.2e}, allowed {allowed:.0e}"
    return error


def sit_or_dit(case: str, **more: Any) -> SiT:
    """SiT or DiT with the case's weights, in evaluation mode."""
    theirs = settings(case)
    learns, names = (
        theirs["learn_sigma"],
        dict(width="hidden_size", num_heads="num_heads", num_blocks="depth", mlp_ratio="mlp_ratio"),
    )
    names |= dict(
        num_classes="num_classes",
        latent_channels="in_channels",
        latent_size="input_size",
        patch_size="patch_size",
    )
    config = (DiTConfig if learns else SiTConfig)(
        **{ours: theirs[name] for ours, name in names.items()}, **more
    )
    net = (DiT if learns else SiT)(config).eval()
    table = position_table(config.width, config.latent_size // config.patch_size)
    net.load_state_dict(tensors(INDEX["cases"][case]["weights"]) | {"pos_embed": table[None]})
    return net


def mar() -> MAR:
    """MAR with the fixtures' weights, in evaluation mode."""
    theirs = settings("mar_transformer")
    names = dict(
        width="encoder_embed_dim",
        decoder_width="decoder_embed_dim",
        num_heads="encoder_num_heads",
        mlp_ratio="mlp_ratio",
    )
    names |= dict(
        encoder_blocks="encoder_depth",
        decoder_blocks="decoder_depth",
        head_width="diffloss_w",
        head_blocks="diffloss_d",
    )
    names |= dict(num_classes="class_num", num_class_tokens="buffer_size", latent_channels="vae_embed_dim")
    names |= dict(
        attention_dropout="attn_dropout", projection_dropout="proj_dropout", mask_rate_min="mask_ratio_min"
    )
    shape = {ours: theirs[name] for ours, name in names.items()}
    net = MAR(
        MARConfig(
            **shape, latent_size=theirs["img_size"] // theirs["vae_stride"], patch_size=theirs["patch_size"]
        )
    ).eval()
    net.load_state_dict(tensors("w_mar"))
    return net


def acdit() -> ACDiT:
    """ACDiT with the fixtures' weights, in evaluation mode."""
    theirs = settings("acdit_forward")
    shape = dict(
        width=theirs["hidden_size"], num_blocks=theirs["depth"], latent_size=math.isqrt(theirs["spatial_len"])
    )
    shape |= {name: theirs[name] for name in ("num_heads", "mlp_ratio", "num_classes")}
    net = ACDiT(ACDiTConfig(**shape, latent_channels=16, parts_per_side=math.isqrt(theirs["ar_len"]))).eval()
    net.load_state_dict(tensors("w_acdit"))
    return net


def xar() -> XAR:
    """xAR with the fixtures' weights, in evaluation mode."""
    theirs = settings("xar_forward")
    shape = _halves(theirs) | dict(parts_per_side=math.isqrt(theirs["clusters"]))
    net = XAR(XARConfig(**shape)).eval()
    net.load_state_dict(tensors("w_xar"))
    return net


def flowar() -> FlowAR:
    """FlowAR with the fixtures' weights, in evaluation mode."""
    theirs = settings("flowar_transformer")
    shape = _halves(theirs) | dict(head_width=theirs["diffloss_w"], head_blocks=theirs["diffloss_d"])
    net = FlowAR(FlowARConfig(**shape, head_version=2 if theirs["cross"] else 1)).eval()
    net.load_state_dict(tensors("w_flowar"))
    return net


def ardiff(**more: Any) -> ARDiff:
    """ARDiff with the fixtures' weights, whose size is no published one, in evaluation mode."""
    theirs = settings("ardiff_sample_raster_cfg3")
    shape = dict(width=48, num_heads=4, num_blocks=2)  # "tiny"
    shape |= dict(head_width=theirs["diffloss_w"], head_blocks=theirs["diffloss_d"])
    shape |= {name: theirs[name] for name in ("num_classes", "order", "patch_size")}
    shape |= dict(latent_size=theirs["img_size"] // theirs["tokenizer_patch_size"])
    net = ARDiff(ARDiffConfig(**shape | dict(latent_channels=theirs["token_channels"]) | more)).eval()
    net.load_state_dict(tensors("w_ardiff"))
    return net


def _halves(theirs: dict[str, Any]) -> dict[str, Any]:
    """The settings of a network of two halves, from the names of the official constructor."""
    names = dict(width="encoder_embed_dim", mlp_ratio="mlp_ratio", latent_channels="vae_embed_dim")
    names |= dict(num_heads="encoder_num_heads", decoder_heads="decoder_num_heads", patch_size="patch_size")
    names |= dict(encoder_blocks="encoder_depth", decoder_blocks="decoder_depth")
    names |= dict(attention_dropout="attn_dropout", projection_dropout="proj_dropout")
    return {ours: theirs[name] for ours, name in names.items()}


class Prepared:
    """A ``Normal`` that gives prepared numbers, in order."""

    def __init__(self, numbers: list[Tensor], shared: float = 0.0) -> None:
        self.numbers, self.common = iter(numbers), shared

    def __call__(self, *shape: int) -> Tensor:
        numbers = next(self.numbers)
        assert numbers.shape[1:] == shape
        return numbers

    def shared(self) -> float:
        return self.common


def check_gradients(name: str, net: torch.nn.Module, case: dict[str, Tensor], number: int) -> None:
    """Those that the case contains; ``name[1,2]`` are rows of a table."""
    gradients = {f"grad/{key}": p.grad for key, p in net.named_parameters()}
    names = [key.removeprefix("out/") for key in case if key.startswith("out/grad/")]
    assert len(names) == number
    for key in names:
        table, _, rows = key.removesuffix("]").partition("[")
        gradient = gradients[table]
        assert gradient is not None
        check(name, key, gradient[[int(row) for row in rows.split(",")]] if rows else gradient, case)


def without_gradient(net: torch.nn.Module) -> list[str]:
    """The trainable parameters that have none."""
    named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return [name for name, p in named if p.grad is None or not p.grad.abs().sum() > 0]


def as_tokens(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C], written out independently of ours."""
    return latents.flatten(2).transpose(1, 2)


def same_shapes(net: torch.nn.Module, published: str, left_out: tuple[str, ...] = ()) -> None:
    """The network has exactly the published keys and shapes."""
    ours = {key: [*value.shape] for key, value in net.state_dict().items() if key not in left_out}
    assert ours == SHAPES[published]
