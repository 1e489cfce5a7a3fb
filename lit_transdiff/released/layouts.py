"""The table of layouts of released generators: how each is known, its settings, the names of its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from lit_transdiff.config import ModelSettings, RunConfig, require
from lit_transdiff.config.model import ModelConfig
from lit_transdiff.models.state_dicts import Mapped
from lit_transdiff.released import families, key_names
from lit_transdiff.released.families import FamilyLayout, Hints

IMAGE_SIZE = 256  # the image size of released models whose tensors do not tell it
GUIDED_BY_PARTS = {"part_guidance": "growing"}
ANCESTRAL = {"solver": "ancestral", "num_steps": 100}


class Layout(Protocol):
    """The released files of a family."""

    @property
    def paradigm(self) -> str: ...

    def has(self, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is one of the family's."""

    def settings(self, state: Mapping[str, Tensor], hints: Hints) -> dict[str, Any]:
        """The settings of a run that a state dict implies: stage, model, and the released sampling.

        Raises ``ValueError`` for tensors that are missing or of shapes that do not fit together.
        """

    def check_model(self, model: Any) -> None:
        """Raise ``ValueError`` for a model that the layout cannot hold."""

    def summary(self, model: Any) -> str:
        """A model in a few words."""

    def from_released(self, state: Mapping[str, Tensor], model: Any) -> Mapped:
        """A released state dict as ours, and the tensors without a place. Raises ``ValueError``."""

    def to_released(self, state: Mapping[str, Tensor], model: Any, left_over: Mapping[str, Tensor]) -> Mapped:
        """Our state dict as a released one with ``left_over``, and tensors that were made for it."""


class TransDiffLayout:
    """TransDiff's, whose names are not ours."""

    paradigm = ModelConfig.paradigm
    has = staticmethod(key_names.is_released)
    check_model = staticmethod(key_names.check_model)
    from_released = staticmethod(key_names.from_released)
    to_released = staticmethod(key_names.to_released)

    def settings(self, state: Mapping[str, Tensor], hints: Hints) -> dict[str, Any]:
        shape = key_names.read_shape(state, hints.num_heads)
        one_step = shape["num_references"] == 1
        wide = shape["latent_size"] ** 2 > shape["num_context_tokens"]
        stage = "mrar_finetune" if not one_step else "diffusion_head" if wide else "ar_pretrain"
        return {"stage": stage, "model": shape}

    def summary(self, model: ModelConfig) -> str:
        kind = "one-step" if model.num_references == 1 else f"MRAR with {model.num_references} references"
        blocks = f"{model.encoder_blocks} + {model.decoder_blocks} blocks"
        return f"{kind}, width {model.width}, {blocks}, {model.num_classes} classes"


EMBEDDED = ("y_embedder.embedding_table.weight", "final_layer.linear.weight")
TOKEN_HEAD = "diffloss.net.input_proj.weight"
LAYOUTS: dict[str, Layout] = {
    layout.paradigm: layout
    for layout in (
        TransDiffLayout(),
        FamilyLayout("sit", ("x_embedder.proj.weight", *EMBEDDED), families.sit_shape, {"num_steps": 250}),
        FamilyLayout(
            "dit",
            ("x_embedder.proj.weight", *EMBEDDED),
            families.sit_shape,
            {"solver": "ancestral", "num_steps": 250},
        ),
        FamilyLayout(
            "acdit",
            ("x_embedder.weight", "blocks.0.attn.q_norm.weight", *EMBEDDED),
            families.acdit_shape,
            {"solver": "dpmpp_2m", "grid": "nonzero", "num_steps": 25},
        ),
        FamilyLayout(
            "xar",
            ("pred.weight", "z_proj.weight", "time_embed.mlp.0.weight"),
            families.xar_shape,
            {"num_steps": 50, **GUIDED_BY_PARTS},
        ),
        FamilyLayout(
            "flowar",
            ("flownet.input_proj.weight", "z_proj.weight"),
            families.flowar_shape,
            {"solver": "euler", "grid": "dense_end", "num_steps": 24, "guidance_interval": [0.0, 0.9]}
            | GUIDED_BY_PARTS,
        ),
        FamilyLayout("ardiff", ("bos_token", TOKEN_HEAD), families.ardiff_shape, ANCESTRAL | GUIDED_BY_PARTS),
        FamilyLayout("mar", ("mask_token", TOKEN_HEAD), families.mar_shape, ANCESTRAL | GUIDED_BY_PARTS),
    )
}


def layout_in(state: Mapping[str, Tensor], what: str, recipe: RunConfig | None) -> Layout:
    """The layout of a released state dict, where several fit the one of the recipe.

    Raises ``ValueError`` for a state dict of none, and for a recipe of another family.
    """
    found = [name for name, layout in LAYOUTS.items() if layout.has(state)]
    allowed = f"an autoencoder of latent diffusion, or a checkpoint of {', '.join(LAYOUTS)}"
    require(bool(found), "source", what, allowed)
    if recipe is not None:
        given, fitting = recipe.model.paradigm, " or ".join(found)
        require(given in found, "recipe: model.paradigm", given, f"{fitting}, as the file")
        return LAYOUTS[given]
    several = f"a recipe with model.paradigm {' or '.join(found)}: the tensors of both are the same"
    require(len(found) == 1, "recipe", None, several)
    return LAYOUTS[found[0]]


def layout_for(model: ModelSettings) -> Layout:
    """The layout for models of these settings. Raises ``ValueError`` for a family without one."""
    allowed = f"{', '.join(LAYOUTS)}: only they have released files"
    require(model.paradigm in LAYOUTS, "model.paradigm", model.paradigm, allowed)
    return LAYOUTS[model.paradigm]
