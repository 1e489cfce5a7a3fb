"""A package for the user's own ideas: one entry of a table, its test, a recipe, a sweep and a notebook (``template/``)."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path

from lit_transdiff.config import require

PACKAGE_TEMPLATE, NAME = Path(__file__).with_name("template"), "my_lab"
TEXT = ".txt"  # after the name of a module of the template, which is none of this package


def write_package(folder: Path) -> list[Path]:
    """Write the template to ``folder``, under its name; the files that were written.

    Raises ``ValueError`` for a folder that is not empty, or whose name no module can have.
    """
    name = folder.resolve().name
    proposed = re.sub(r"\W", "_", name.lower()).lstrip("0123456789_") or NAME
    fits = name.isidentifier() and not keyword.iskeyword(name) and name not in sys.stdlib_module_names | {"lit_transdiff"}
    require(fits, "init", str(folder), f"a folder whose name a Python module can have, as in {folder.with_name(proposed)}")
    empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    require(empty, "init", str(folder), "a folder that does not exist yet, or is empty")
    written = []
    for source in sorted(path for path in PACKAGE_TEMPLATE.rglob("*") if path.is_file()):
        place = str(source.relative_to(PACKAGE_TEMPLATE)).removesuffix(TEXT).replace(NAME, name)
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(source.read_text().replace(NAME, name))
        written.append(folder / place)
    return written
