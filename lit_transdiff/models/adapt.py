"""Initialising a model from another one of a different shape, with a report of every tensor.

Converting one-step to MRAR, or changing classes, latent size, patch size or numbers of tokens, affects few
tensors; all others are copied. Each tensor of the new model is copied, adapted by a named rule, or newly
initialised, and the result is loaded strictly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

if TYPE_CHECKING:
    from lit_transdiff.config import ModelSettings
    from lit_transdiff.models.paradigm import Paradigm


Rule = Callable[[Tensor, Tensor, "ModelSettings"], "Tensor | None"]
# tensor name -> rule, description; a rule returns None for unsuitable shapes
Rules = Mapping[str, tuple[Rule, str]]


@dataclass(frozen=True)
class Adaptation:
    """The rules of a family for initialising a model from one of another shape, by tensor name."""

    classes: str = ""  # the table of class embeddings, one row per class
    rules: Rules = field(default_factory=dict)  # the rules that always apply
    # the rules for another latent size with interpolated positions; otherwise these tensors are made anew
    sized: Rules = field(default_factory=dict)
    # tensors that depend on patch, channels and numbers of tokens; made anew with init_shapes=new
    shaped: Sequence[str] = ()
    optional: tuple[str, ...] = ()  # prefixes of names that only one of the two models may have


@dataclass
class AdaptReport:
    """The treatment of each tensor: names by kind."""

    mapped: list[str] = field(default_factory=list)
    adapted: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{len(self.mapped)} tensors copied"]
        lines += [f"adapted: {name} ({how})" for name, how in self.adapted.items()]
        lines += [f"newly made: {name}" for name in self.new]
        lines += [f"dropped: {name}" for name in self.dropped]
        return "\n".join(lines)


def broadcast_mask_tokens(old: Tensor, new: Tensor, config: ModelSettings) -> Tensor | None:
    """One-step AR has one mask token for all positions; MRAR has one per position of a group."""
    return old.expand_as(new).clone() if old.shape[1] == 1 and old.shape[2] == new.shape[2] else None


def resize_positions(old: Tensor, new: Tensor, config: ModelSettings) -> Tensor | None:
    """Interpolate the table [1, n n, D] of a square grid bicubically to another grid."""
    before, after = math.isqrt(old.shape[1]), math.isqrt(new.shape[1])
    if (before**2, after**2, old.shape[2]) != (old.shape[1], new.shape[1], new.shape[2]):
        return None
    grid = rearrange(old.float(), "1 (h w) d -> 1 d h w", h=before)
    resized = F.interpolate(grid, size=(after, after), mode="bicubic", antialias=True)
    return rearrange(resized, "1 d h w -> 1 (h w) d").to(new.dtype)


def spread_patch(old: Tensor, new: Tensor, config: ModelSettings) -> Tensor | None:
    """Convert the projection [D, c p p] of p x p patches to k p x k p patches, applied to k x k means."""
    before, after = (math.isqrt(weight.shape[1] // config.latent_channels) for weight in (old, new))
    if after % before or old.shape[0] != new.shape[0] or old.shape[1] != config.latent_channels * before**2:
        return None
    k = after // before
    return repeat(old, "d (c p q) -> d (c p i q j)", p=before, q=before, i=k, j=k) / k**2


def match(
    model: Paradigm,
    state: Mapping[str, Tensor],
    positions: str = "new",
    shapes: str = "same",
    classes: Sequence[int | None] | None = None,
) -> tuple[dict[str, Tensor], AdaptReport]:
    """The tensors for ``model`` from ``state``, with a report; the model may be on the meta device.

    With ``positions`` "interpolate", tables of another latent size are resized instead of made anew. With
    ``shapes`` "new", tensors that do not fit are made anew if they depend on these settings (see
    ``Adaptation``). ``classes`` gives for each class of the model the class of ``state`` with its embedding,
    or None; by default they are identical. Raises ``ValueError`` with every tensor that fits neither
    unchanged nor by a rule.
    """
    report, result, misfits = AdaptReport(), {}, []
    own, kind = model.state_dict(), model.adaptation
    rules = {**kind.rules, **kind.sized} if positions == "interpolate" else kind.rules
    anew = (*(kind.sized if positions == "new" else ()), *(kind.shaped if shapes == "new" else ()))
    for name, new in own.items():
        old = state.get(name)
        chosen = (
            None if old is None or classes is None or name != kind.classes else with_null(classes, old, new)
        )
        if old is not None and chosen is not None and chosen != list(range(len(old))):
            result[name] = chosen_rows(name, old, new, chosen, report)
        elif old is not None and old.shape == new.shape:
            report.mapped.append(name)
            result[name] = old
        elif (
            old is not None
            and name in rules
            and (adapted := rules[name][0](old, new, model.config)) is not None
        ):
            report.adapted[name] = f"{rules[name][1]}, {list(old.shape)} -> {list(new.shape)}"
            result[name] = adapted
        elif old is None and name.startswith(kind.optional):
            report.new.append(name)
            result[name] = new
        elif old is not None and name in anew and old.ndim == new.ndim:
            report.new.append(f"{name} {list(new.shape)}, which was {list(old.shape)}")
            result[name] = new
        else:
            theirs = "missing" if old is None else list(old.shape)
            misfits.append(f"{name}: {list(new.shape)} here, {theirs} in the checkpoint")
    for name in state.keys() - own.keys():
        if name.startswith(kind.optional):
            report.dropped.append(name)
        else:
            misfits.append(f"{name}: {list(state[name].shape)} in the checkpoint, missing here")
    if misfits:
        raise ValueError(
            f"the checkpoint is of another shape: {'; '.join(sorted(misfits))}.{way_on(misfits, kind.shaped)}"
        )
    return result, report


def with_null(classes: Sequence[int | None], old: Tensor, new: Tensor) -> list[int | None]:
    """The rows of a table ``old`` for those of ``new``; a last row of the null class is kept."""
    return [*classes, *range(len(old) - len(new) + len(classes), len(old))]


def chosen_rows(
    name: str, old: Tensor, new: Tensor, classes: Sequence[int | None], report: AdaptReport
) -> Tensor:
    """The embeddings [classes, D] of ``new``, replaced by those of ``old`` for corresponding classes."""
    if old.shape[1:] != new.shape[1:]:
        raise ValueError(
            f"the checkpoint is of another shape: {name}: {list(new.shape)} here, {list(old.shape)} in it."
        )
    sources = {c: row for c, row in enumerate(classes) if row is not None}
    change = f"{list(old.shape)} -> {list(new.shape)}"
    if sources:
        report.adapted[name] = (
            f"{len(sources)} classes keep their embeddings, {len(new) - len(sources)} have new ones, {change}"
        )
    else:
        report.new.append(f"{name}, of all classes, {change}")
    result = new.clone()
    if sources and not new.is_meta:  # meta tensors have only shapes
        result[list(sources)] = old[list(sources.values())].to(new)
    return result


def way_on(misfits: Sequence[str], shaped_names: Sequence[str]) -> str:
    """A hint at the setting that allows such a checkpoint, if any."""
    shaped = all(misfit.split(": ")[0] in shaped_names and "missing" not in misfit for misfit in misfits)
    return " With init_shapes=new these are made anew, and all else is kept." if shaped else ""
