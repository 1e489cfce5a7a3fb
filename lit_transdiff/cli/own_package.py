"""Write a package for a user's own ideas: a table entry, its test, a recipe, a sweep, a notebook."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from lit_transdiff.config import require

PACKAGE_TEMPLATE, NAME = Path(__file__).with_name("template"), "my_lab"
TEXT = ".txt"  # suffix of the template's modules, so that they do not count as modules of this package


def write_package(folder: Path) -> list[Path]:
    """Write the template to ``folder``, with its name as the package name, and return the written files.

    Raises ``ValueError`` for a folder that is not empty, or whose name is not a valid module name.
    """
    name = folder.resolve().name
    proposed = re.sub(r"\W", "_", name.lower()).lstrip("0123456789_") or NAME
    taken = {*keyword.kwlist, *sys.stdlib_module_names, "lit_transdiff"}
    fits = name.isidentifier() and name not in taken
    allowed = f"a folder whose name a Python module can have, as in {folder.with_name(proposed)}"
    require(fits, "init", str(folder), allowed)
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "init", str(folder), "a folder that does not exist yet, or is empty")
    written = []
    for source in sorted(path for path in PACKAGE_TEMPLATE.rglob("*") if path.is_file()):
        place = str(source.relative_to(PACKAGE_TEMPLATE)).removesuffix(TEXT).replace(NAME, name)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(source.read_text().replace(NAME, name))
        written.append(folder / place)
    return written
