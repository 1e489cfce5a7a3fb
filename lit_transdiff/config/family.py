"""The base of the model settings of all families, and the entries of the table of paradigms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lit_transdiff.config.checks import require, require_known

if TYPE_CHECKING:
    from lit_transdiff.config.sampling import SamplingConfig


OF_A_TOKEN = 6  # times the width: activations of a block per token (input, queries, keys, values, two norms)


class OfSize(int):
    """Placeholder for the number given by a model's size; an int, like the number."""


OF_SIZE = OfSize()


def take_size(model: Any, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Fill the fields that were not given with the numbers of the model's ``size``."""
    require_known("model.size", model.size, sizes)
    for name, number in sizes[model.size].items():
        if isinstance(getattr(model, name), OfSize):
            object.__setattr__(model, name, number)


def check_positive(model: Any, *names: str) -> None:
    """Refuse numbers below 1."""
    for name in names:
        require(getattr(model, name) >= 1, f"model.{name}", getattr(model, name), "an integer of at least 1")


def check_transformer(model: Any, width: str = "width") -> None:
    """Refuse a number of heads, or a ratio of the MLPs, that does not fit a width (the name of a setting)."""
    whole, ratio = getattr(model, width), model.mlp_ratio
    allowed = f"a divisor of model.{width}={whole}"
    require(whole % model.num_heads == 0, "model.num_heads", model.num_heads, allowed)
    require(ratio * whole >= 1, "model.mlp_ratio", ratio, f"at least 1 / model.{width}={whole}")


def check_rotary_heads(model: Any, **heads: int) -> None:
    """Refuse numbers of heads whose width is no multiple of 4, which rotary positions in 2D need."""
    allowed = f"a number of which four times is a divisor of model.width={model.width}"
    for name, number in heads.items():
        require(number >= 1 and model.width % (4 * number) == 0, f"model.{name}", number, allowed)


def check_patches(model: Any) -> None:
    """Refuse patches that do not fill the latent."""
    check_positive(model, "latent_channels", "latent_size", "patch_size")
    size, patch = model.latent_size, model.patch_size
    require(size % patch == 0, "model.patch_size", patch, f"a divisor of {size}")


def check_cells(model: CellSettings) -> None:
    """Refuse cells that do not fill the latent."""
    check_positive(model, "parts_per_side")
    allowed = f"a divisor of {model.grid}, the tokens of a side of the latent"
    require(model.grid % model.parts_per_side == 0, "model.parts_per_side", model.parts_per_side, allowed)


def check_dropout(model: Any) -> None:
    """Refuse rates of dropout outside of [0, 1)."""
    for name in ("attention_dropout", "projection_dropout"):
        require(0 <= getattr(model, name) < 1, f"model.{name}", getattr(model, name), "0 <= p < 1")


class ModelSettings:
    """The base of a family's settings: a frozen dataclass with these fields, their defaults and its own
    fields.

    ``paradigm`` comes first; its default is the family's name in ``PARADIGMS``.
    """

    paradigm: str
    num_classes: int  # labels are 0 to num_classes - 1
    latent_channels: int
    latent_size: int
    of_a_row: ClassVar[tuple[str, ...]] = ("latent_size",)  # settings that determine the memory of a row
    num_references: int = 1  # images per row; a field of families with several
    # noise process, where it is not that of the family's class; a field of families with a choice
    process: str | None = None

    @classmethod
    def has_references(cls) -> bool:
        """Whether a row may hold several images: whether ``num_references`` is a field."""
        return any(field.name == "num_references" for field in fields(cls))  # type: ignore[arg-type]

    @property
    def is_drawn_at_once(self) -> bool:
        """Whether an image is one part, which leaves nothing for settings of several."""
        return False

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse sampling settings that do not suit the model."""

    # Lower bounds of memory, by arithmetic, so that impossible sizes are refused before anything is
    # allocated.

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """Names of settings -> a lower bound of the number of their parameters."""
        return {}

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """A lower bound of a row's activations for the backward pass; ``recomputed`` are stacks of blocks."""
        return 0

    def least_drawn(self) -> int:
        """A lower bound of a row's activations in sampling."""
        return 0


@dataclass(frozen=True)
class PatchSettings(ModelSettings):
    """The base of settings of transformers whose tokens are squares of latent pixels."""

    sizes: ClassVar[Mapping[str, Mapping[str, int]]]  # the defaults of fields for each name of ``size``
    of_a_row: ClassVar[tuple[str, ...]] = ("width", "latent_size", "patch_size")
    paradigm: str = ""  # family of the model, a name in config.paradigms.PARADIGMS; each has its own settings
    size: str = "base"
    width: int = OF_SIZE  # width D of the blocks
    num_heads: int = OF_SIZE  # number of attention heads
    mlp_ratio: float = 4.0  # hidden width of an MLP / width
    num_classes: int = 1000  # labels are 0 to num_classes - 1
    latent_channels: int = 16  # channels of the autoencoder's latents
    latent_size: int = 16  # height and width of the latent
    patch_size: int = 1  # side length in latent pixels of a token's square

    def __post_init__(self) -> None:
        take_size(self, self.sizes)
        check_positive(self, "width", "num_heads", "num_classes")
        check_transformer(self)
        check_patches(self)

    @property
    def grid(self) -> int:
        """Tokens of a side of the latent."""
        return self.latent_size // self.patch_size

    @property
    def num_tokens(self) -> int:
        return self.grid**2

    @property
    def token_features(self) -> int:
        return self.latent_channels * self.patch_size**2


@dataclass(frozen=True)
class CellSettings(PatchSettings):
    """The base of settings of families that draw rows of square cells of tokens, and keep keys and values."""

    parts_per_side: int = 2  # an image is drawn in so many rows of so many cells; 1: all at once

    def __post_init__(self) -> None:
        super().__post_init__()
        check_cells(self)

    @property
    def is_drawn_at_once(self) -> bool:
        return self.parts_per_side == 1

    @property
    def tokens_of_part(self) -> int:
        return (self.grid // self.parts_per_side) ** 2

    def least_cached(self, num_blocks: int) -> int:
        """Keys and values of all cells but the last in the blocks, and the last before and after a norm."""
        before = self.num_tokens - self.tokens_of_part
        return 2 * self.width * (num_blocks * before + self.tokens_of_part)


@dataclass(frozen=True)
class Family:
    """An entry of ``PARADIGMS``: the settings of a family of models, and its network."""

    settings: type[ModelSettings]
    network: Any  # a ``Paradigm`` of models.paradigm, or its "module:name" for a lazy import
