"""Values as their tensors and their form, which is all the rest: structure, and what is no tensor.

Calls whose arguments have one form do the same work with other numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lit_transdiff.flow.process import Process

PLAIN = (int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, BuiltinFunctionType)
LASTING = (nn.Module, Process)  # one object for all calls


class FormlessError(Exception):
    """A value has no form that another call could have, too."""


@dataclass(frozen=True)
class TensorPlace:
    """The place of a tensor."""

    index: int
    shape: torch.Size
    dtype: torch.dtype


@dataclass(frozen=True)
class Branch:
    """A nested value: the function that makes it of its parts, and their forms."""

    make: Callable[[list[Any]], Any]
    parts: tuple[Hashable, ...]


@dataclass(frozen=True)
class Leaf:
    """Any other value; 1, 1.0 and True are three."""

    kind: type
    value: Hashable


def take_apart(value: Any) -> tuple[Hashable, list[Tensor]]:
    """The form of a value, and its tensors, each once. Raises ``FormlessError``."""
    tensors: list[Tensor] = []
    return form_of(value, tensors, {}), tensors


def form_of(value: Any, tensors: list[Tensor], places: dict[int, int]) -> Hashable:
    """The form of a value, whose tensors join ``tensors`` unless they have a place there, by identity."""
    if isinstance(value, Tensor):
        place = places.setdefault(id(value), len(tensors))
        if place == len(tensors):
            tensors.append(value)
        return TensorPlace(place, value.shape, value.dtype)
    make, parts = branches(value)
    if make is not None:
        return Branch(make, tuple(form_of(part, tensors, places) for part in parts))
    return Leaf(type(value), checked(value))


@dataclass(frozen=True)
class Made:
    """Makes a value of a kind from its parts, by ``names`` or in their order."""

    kind: Any
    names: tuple[Hashable, ...] | None = None

    def __call__(self, parts: list[Any]) -> Any:
        if self.kind is partial:
            function, arguments, settings = parts
            return partial(function, *arguments, **settings)
        if self.names is None:
            return self.kind(*parts) if hasattr(self.kind, "_fields") else self.kind(parts)
        named: dict[Any, Any] = dict(zip(self.names, parts, strict=True))
        return named if self.kind is dict else self.kind(**named)


def branches(value: Any) -> tuple[Made | None, Sequence[Any]]:
    """The maker of a nested value and its parts; (None, ()) for a value that is not nested."""
    kind = type(value)
    if isinstance(value, tuple | list):
        return Made(kind), value
    if kind is dict:
        return Made(dict, tuple(value)), [*value.values()]
    if isinstance(value, partial):
        return Made(partial), (value.func, value.args, value.keywords)
    if is_dataclass(value) and not isinstance(value, type):
        names = tuple(field.name for field in fields(value) if field.init)
        return Made(kind, names), [getattr(value, name) for name in names]
    return None, ()


def checked(value: Any) -> Hashable:
    """A value of which two calls can share one; not a function that reads variables of another function."""
    function = value.__func__ if isinstance(value, MethodType) else value
    if isinstance(function, FunctionType):
        around = [cell.cell_contents for cell in function.__closure__ or ()]
        lasting = not isinstance(value, MethodType) or isinstance(value.__self__, LASTING)
        if lasting and all(isinstance(content, type) for content in around):
            return value  # type: ignore[no-any-return]
    elif isinstance(value, (*PLAIN, *LASTING)):
        return value  # type: ignore[return-value]
    raise FormlessError(type(value).__name__)


def put_together(form: Hashable, tensors: Sequence[Tensor]) -> Any:
    """The value of a form with these tensors."""
    if isinstance(form, TensorPlace):
        return tensors[form.index]
    if isinstance(form, Branch):
        return form.make([put_together(part, tensors) for part in form.parts])
    assert isinstance(form, Leaf)
    return form.value
