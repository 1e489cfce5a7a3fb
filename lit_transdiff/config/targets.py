"""Safe writing and removal: nothing outside of a folder, and no files of other programs."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, partial_name, remove, to_disk
from lit_transdiff.config import require

HEAD = 4096  # bytes at the start of a file that identify it
SHOWN = 3  # number of entries of a folder in a message


def below(root: Path, name: Any, what: str) -> Path:
    """``root / name`` for a name from a file, an archive or a server; ``what`` is its origin, for the error.

    Raises ``ValueError`` for a name that is absolute or leads out of ``root``, also through a link to another
    folder. The last part may be a link to a file: reading follows it, and writing (``files.whole``) replaces
    it.
    """
    require(isinstance(name, str) and "\0" not in name, what, name, "the name of a file")
    path = root / name
    inside = not Path(name).is_absolute() and Path(name).name not in ("", "..")
    inside = inside and path.parent.resolve().is_relative_to(root.resolve())
    require(inside, what, name, f"a name that stays in {root}")
    return path


def contents(folder: Path) -> list[str]:
    """The names of a folder's entries; [] if it does not exist. Raises ``ValueError`` for a file."""
    allowed = "a folder, or a name that does not exist yet"
    require(folder.is_dir() or not os.path.lexists(folder), "output", str(folder), allowed)
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refuse_foreign(folder: Path, names: Collection[str], what: str) -> None:
    """Raise ``ValueError``: the folder contains ``names`` that do not belong to ``what``."""
    some = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    way = "Nothing is overwritten: choose another name, or an empty folder."
    raise ValueError(f"{folder} holds {some}, which {what} did not write. {way}")


def check_replaces(file: Path, signs: Iterable[str], what: str) -> None:
    """Refuse to replace a file whose beginning has none of the ``signs`` of this program's ``what``."""
    if os.path.lexists(file):
        beginning = file.open("rb").read(HEAD).decode(errors="replace") if file.is_file() else ""
        ours = any(sign in beginning for sign in signs)
        require(ours, "output", str(file), f"a name that is free, or of {what} that this program wrote")


def check_replaces_json(file: Path, key: str, value: str) -> None:
    """Refuse to replace a JSON file unless it has ``value`` at ``key``, or is empty or our damaged one."""
    text = file.read_bytes() if file.exists() else b""
    try:
        content = json_of(text)
    except ValueError:
        ours = value.encode() in text or not text.strip(b"\0 \n")
    else:
        ours = not content or (isinstance(content, dict) and content.get(key) == value)
    allowed = "one of this program, which is replaced; move that one elsewhere"
    require(ours, str(file), "a file of another program", allowed)


def fresh_folder(path: Path) -> Path:
    """Make and return the folder ``path`` or, if it is not empty, ``path-2``, ``path-3``, ..."""
    number, folder = 1, path
    while contents(folder):
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_written(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files of a folder that match ``patterns``, then the folder if it is empty.

    Of a link only the link is removed, because its target belongs to others.
    """
    if folder.is_symlink():
        return folder.unlink()
    for pattern in patterns:
        for file in folder.glob(pattern):
            if not file.is_dir():
                file.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A temporary folder on the disk of ``folder`` for its new files; removed at the end."""
    partial = partial_name(folder / folder.name if folder.is_dir() else folder)
    remove(partial)  # left by an earlier process with the same id
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        remove(partial)


def put_files(
    source: Path, folder: Path, earlier: Collection[str], last: str, begin: Callable[[], None]
) -> None:
    """Move the files of ``source`` into ``folder``, replacing the ``earlier`` ones; other files stay.

    Each file is flushed to disk before it is renamed, and the file ``last`` comes last. A new folder appears
    at once. In an existing one, ``begin`` is called before the first file is replaced. Raises ``ValueError``
    if a foreign file is in the way.
    """
    names = files_in(source)
    for name in names:
        to_disk(source / name)
    if not contents(folder):
        os.replace(source, folder)
        return to_disk(folder.parent)
    taken = [name for name in names if name not in earlier and os.path.lexists(folder / name)]
    if taken:
        refuse_foreign(folder, taken, "an earlier export")
    begin()
    for name in sorted(names, key=lambda name: name == last):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(source / name, folder / name)
    for name in set(earlier) - set(names):
        (folder / name).unlink(missing_ok=True)
    to_disk(folder)


def files_in(folder: Path) -> list[str]:
    """The relative paths of all files in a folder and below it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose mode follows the umask, like that of any other file."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Give a file the mode of new files, because safetensors makes files that only the owner can read."""
    new = path.with_name(f"{path.name}.mode-{os.getpid()}")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()
