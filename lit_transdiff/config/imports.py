"""The user's own modules: when imported, each adds entries to the tables (``METRICS["mine"] = ...``)."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Sequence

from lit_transdiff.config.checks import require


def import_modules(names: Sequence[str]) -> None:
    """Import modules by their dotted names, from Python's path or else from the working directory.

    Raises ``ValueError`` for a module that does not exist or fails, with the failing line.
    """
    described = "a list of modules by their dotted names, as in [my_lab.ideas]"
    for name in [names] if isinstance(names, str) else names:
        dotted = isinstance(name, str) and all(part.isidentifier() for part in name.split("."))
        require(dotted and not isinstance(names, str), "imports", name, described)
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(f"imports: {name!r} cannot be imported: {cause(name, error)}") from error


def cause(name: str, error: Exception) -> str:
    """The reason in one line why a module cannot be imported: it is missing, or one of its lines fails."""
    if isinstance(error, ModuleNotFoundError) and error.name and f"{name}.".startswith(f"{error.name}."):
        return f"there is no module {error.name!r} on Python's path or in {os.getcwd()}. Install its package."
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({frame.filename}, line {frame.lineno})."
