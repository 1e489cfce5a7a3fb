"""The generator of docs/api.md from signatures and docstrings: ``python -m lit_transdiff.cli.api``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import lit_transdiff

SIGNATURE_WIDTH = 110  # columns; a longer signature gets one line per parameter
API_HEAD = """\
# Python

```python
from lit_transdiff import load_run, train
```

Import the names below from `lit_transdiff`. Each is loaded on first use, so that `import lit_transdiff` is
fast. All other names may change between versions.

This page is generated from the source: `python -m lit_transdiff.cli.api > docs/api.md`."""


def page() -> str:
    """The whole page: all public names in the order of ``PUBLIC``."""
    entries = (entry(name, getattr(lit_transdiff, name)) for name in lit_transdiff.PUBLIC)
    return "\n\n".join([API_HEAD, *entries, tables()]) + "\n"


def tables() -> str:
    """The section that lists the tables and their entries."""
    rows = [
        f"| `{name}` | {', '.join(f'`{key}`' for key in getattr(lit_transdiff, name))} |"
        for name in lit_transdiff.TABLES
    ]
    about = "Dictionaries that you can extend; [Your own ideas](extending.md) shows how to add entries."
    return "\n".join(["## Tables", "", about, "", "| table | names |", "|---|---|", *rows])


def entry(name: str, value: Any) -> str:
    """The heading, signature and docstring of a name, and the public members of a class or module."""
    parts = [f"## `{name}`"]
    if not isinstance(value, ModuleType):
        parts.append(code(signature(name, value)))
    parts.append(text(value))
    if value is lit_transdiff.RunConfig:
        return "\n\n".join([*parts, "[All settings](settings.md)"])
    for member, found in members(value):
        parts += [code(signature(f"{name}.{member}", found)), text(found)]
    return "\n\n".join(parts)


def members(value: Any) -> Iterator[tuple[str, Any]]:
    """The functions in a module's ``__all__``, or the documented public methods of a class itself."""
    if isinstance(value, ModuleType):
        yield from ((name, getattr(value, name)) for name in value.__all__)
    elif inspect.isclass(value):
        yield from (
            (n, found)
            for n, found in vars(value).items()
            if n[0] != "_" and inspect.isfunction(found) and found.__doc__
        )


def signature(name: str, value: Any) -> str:
    """The signature on one line or one line per parameter; a run's settings have their own page."""
    if value is lit_transdiff.RunConfig:
        return f"{name}(**settings)"
    found = inspect.signature(value)
    parameters = [parameter(p) for p in found.parameters.values() if p.name != "self"]
    keywords = [parameter(p) for p in found.parameters.values() if p.kind is p.KEYWORD_ONLY]
    if keywords:
        parameters.insert(parameters.index(keywords[0]), "*")
    returned = "" if inspect.isclass(value) else f" -> {found.return_annotation}"
    line = f"{name}({', '.join(parameters)}){returned}"
    if len(line) <= SIGNATURE_WIDTH:
        return line
    return f"{name}(\n" + "".join(f"    {p},\n" for p in parameters) + f"){returned}"


def parameter(item: inspect.Parameter) -> str:
    """One parameter as written in the source."""
    stars: dict[Any, str] = {item.VAR_POSITIONAL: "*", item.VAR_KEYWORD: "**"}
    star = stars.get(item.kind, "")
    default = getattr(item.default, "__name__", repr(item.default))
    return f"{star}{item.name}: {item.annotation}" + ("" if item.default is item.empty else f" = {default}")


def code(line: str) -> str:
    return f"```python\n{line}\n```"


def text(value: Any) -> str:
    """A docstring as Markdown."""
    return (inspect.getdoc(value) or "").replace("``", "`")


if __name__ == "__main__":
    print(page(), end="")
