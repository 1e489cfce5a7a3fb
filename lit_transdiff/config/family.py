"""What the settings of every family of models have, and how a family enters the table of paradigms."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from lit_transdiff.config.checks import unknown

if TYPE_CHECKING:
    from lit_transdiff.config.sampling import SamplingConfig


OF_A_TOKEN = 6  # times the width: what a block keeps of a token (its input, queries, keys, values, two norms) and more


class OfSize(int):
    """Stands for the number in the row of a model's size, until the settings are made; an int, as the number is."""


OF_SIZE = OfSize()


def take_size(model: Any, sizes: Mapping[str, Mapping[str, int]]) -> None:
    """Give settings that are being made the numbers of their ``size``, for fields that were not given."""
    if model.size not in sizes:
        raise unknown("model.size", model.size, sizes)
    for name, number in sizes[model.size].items():
        if isinstance(getattr(model, name), OfSize):
            object.__setattr__(model, name, number)


class ModelSettings:
    """The base of a family's settings: a frozen dataclass with these fields, their defaults and its own fields.

    ``paradigm`` comes first, and its default is the name under which the family stands in ``PARADIGMS``.
    """

    paradigm: str
    num_classes: int  # labels are 0 to num_classes - 1
    latent_channels: int
    latent_size: int
    of_a_row: ClassVar[tuple[str, ...]] = ("latent_size",)  # settings that decide what a row of a batch takes
    num_references: int = 1  # images of a row; a field of families that draw several in succession

    @classmethod
    def has_references(cls) -> bool:
        """Whether a row may hold several images: whether ``num_references`` is a field."""
        return any(field.name == "num_references" for field in fields(cls))  # type: ignore[arg-type]

    def check_sampling(self, sampling: SamplingConfig) -> None:
        """Refuse a sampler that draws no images of such a model."""

    # What a model takes at the very least, by arithmetic: sizes that cannot work are refused before anything of them is made.

    def least_parameters(self) -> Mapping[tuple[str, ...], int]:
        """Names of settings -> fewer parameters than they certainly make."""
        return {}

    def least_kept(self, draws: int, recomputed: Collection[str], head_alone: bool) -> int:
        """Fewer numbers than a row certainly leaves until the backward pass; ``recomputed`` are stacks of blocks."""
        return 0

    def least_drawn(self) -> int:
        """Fewer numbers than drawing a row certainly holds."""
        return 0


@dataclass(frozen=True)
class Family:
    """An entry of ``PARADIGMS``: the settings of a family of models, and its network."""

    settings: type[ModelSettings]
    network: Any  # a ``Paradigm`` of models.paradigm, or "module:name" of one that is imported when it is needed
