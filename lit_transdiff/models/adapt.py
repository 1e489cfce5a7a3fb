"""Start one model from another of a different shape, with a report of every tensor.

One-step -> MRAR, other grids and another number of classes change a few tensors only; everything else is copied. Nothing is
loaded loosely: each tensor of the new model is mapped, adapted by a named rule, or newly made, and the result loads strictly.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn


@dataclass
class AdaptReport:
    """What happened to each tensor: names by kind."""

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


def broadcast_mask_tokens(old: Tensor, new: Tensor) -> Tensor | None:
    """One-step AR has one mask token for all positions; MRAR has one for each position of a group."""
    return old.expand_as(new).clone() if old.shape[1] == 1 and old.shape[2] == new.shape[2] else None


# Tensor name -> (rule, description); a rule returns nothing when the shapes do not allow it.
RULES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor | None], str]] = {
    "encoder.mask_tokens": (broadcast_mask_tokens, "one mask token repeated for every position"),
}
# Tensors that a model may have while the one it starts from has none, and the reverse.
OPTIONAL = ("encoder.reference_projection.",)


def adapt(model: nn.Module, state: Mapping[str, Tensor]) -> AdaptReport:
    """Load ``state`` into ``model``; raises ``ValueError`` listing every tensor that fits neither as it is nor by a rule."""
    report, result, misfits = AdaptReport(), {}, []
    own = model.state_dict()
    for name, new in own.items():
        old = state.get(name)
        adapted = None
        if old is not None and old.shape == new.shape:
            report.mapped.append(name)
            result[name] = old
            continue
        if old is not None and name in RULES:
            adapted = RULES[name][0](old, new)
        if adapted is not None:
            report.adapted[name] = f"{RULES[name][1]}, {list(old.shape)} -> {list(new.shape)}"  # type: ignore[union-attr]
            result[name] = adapted
        elif old is None and name.startswith(OPTIONAL):
            report.new.append(name)
            result[name] = new
        else:
            misfits.append(f"{name}: {list(new.shape)} here, {'missing' if old is None else list(old.shape)} in the checkpoint")
    for name in state.keys() - own.keys():
        if name.startswith(OPTIONAL):
            report.dropped.append(name)
        else:
            misfits.append(f"{name}: {list(state[name].shape)} in the checkpoint, missing here")
    if misfits:
        raise ValueError("the checkpoint is of another shape:\n  " + "\n  ".join(sorted(misfits)))
    model.load_state_dict(result)
    return report
