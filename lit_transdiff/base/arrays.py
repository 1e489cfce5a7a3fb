"""Reading arrays from ``.npz`` files that others may have written or damaged."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lit_transdiff.base.files import Damaged


def read_arrays(path: Path | BinaryIO, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an ``.npz`` file by name, or only those in ``names``.

    Raises ``Damaged`` for any other content: each layer of the format has errors of its own for unexpected
    bytes.
    """
    shown = path if isinstance(path, Path) else "what was read"
    try:
        with zip_of_arrays(path) as file:
            arrays = {name: file[name] for name in file.files if names is None or name in names}
    except OSError:  # missing, or not readable for this user
        raise
    except Exception as error:
        raise Damaged(f"{shown} is not an .npz file, or damaged: {' '.join(str(error).split())}.") from error
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise Damaged(f"{shown} is not an .npz file, or damaged: {name} is no array.")
    return arrays


def zip_of_arrays(path: Path | BinaryIO) -> np.lib.npyio.NpzFile:
    """Open an ``.npz`` file without reading its arrays."""
    file = np.load(path, allow_pickle=False)
    if not isinstance(file, np.lib.npyio.NpzFile):
        raise ValueError("a single array")
    return file
