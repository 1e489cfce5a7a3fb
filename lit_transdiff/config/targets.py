"""What may be written where, and what may be removed: nothing outside of a folder, and nothing that others wrote."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lit_transdiff.base.files import json_of, partial_name, remove, to_disk
from lit_transdiff.config import require

HEAD = 4096  # bytes of a file by which it is known
SHOWN = 3  # entries of a folder that a message names


def below(root: Path, name: Any, what: str) -> Path:
    """``root / name``, of a name that a file, an archive or a server gives. ``what`` says where it stands, for the error.

    Raises ``ValueError`` for a name that is absolute or leads out of ``root``, also through a link to another folder. The last
    part may be a link to a file: reading follows it, and writing (``files.whole``) puts a file in its place.
    """
    require(isinstance(name, str) and "\0" not in name, what, name, "the name of a file")
    path = root / name
    inside = not Path(name).is_absolute() and Path(name).name not in ("", "..")
    inside = inside and path.parent.resolve().is_relative_to(root.resolve())
    require(inside, what, name, f"a name that stays in {root}")
    return path


def contents(folder: Path) -> list[str]:
    """What lies in a folder, by name; nothing where there is none. Raises ``ValueError`` for a file."""
    require(folder.is_dir() or not os.path.lexists(folder), "output", str(folder), "a folder, or a name that does not exist yet")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def refuse_foreign(folder: Path, names: Collection[str], what: str) -> None:
    """Raise ``ValueError``: a folder holds ``names``, which do not belong to ``what`` is to be written there."""
    some = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    raise ValueError(
        f"{folder} holds {some}, which {what} did not write. Nothing is overwritten: choose another name, or an empty folder."
    )


def check_replaces(file: Path, signs: Iterable[str], what: str) -> None:
    """Refuse to replace a file unless its beginning has one of the ``signs`` of ``what`` this program writes there."""
    if os.path.lexists(file):
        beginning = file.open("rb").read(HEAD).decode(errors="replace") if file.is_file() else ""
        ours = any(sign in beginning for sign in signs)
        require(ours, "output", str(file), f"a name that is free, or of {what} that this program wrote")


def check_replaces_json(file: Path, key: str, value: str) -> None:
    """Refuse to replace a JSON file that does not hold ``value`` at ``key``; a damaged one that says it, or nothing, is ours."""
    text = file.read_bytes() if file.exists() else b""
    try:
        content = json_of(text)
    except ValueError:
        ours = value.encode() in text or not text.strip(b"\0 \n")
    else:
        ours = not content or (isinstance(content, dict) and content.get(key) == value)
    require(ours, str(file), "a file of another program", "one of this program, which is replaced; move that one elsewhere")


def fresh_folder(path: Path) -> Path:
    """Make the folder ``path``, or where something lies in it ``path-2``, ``path-3``, ..., and give the one that was made."""
    number, folder = 1, path
    while contents(folder):
        number += 1
        folder = path.with_name(f"{path.name}-{number}")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def remove_written(folder: Path, patterns: Iterable[str]) -> None:
    """Remove the files of a folder that match ``patterns``, then the folder, unless something else lies in it.

    Of a link, the link alone: what it leads to belongs to others.
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
    """A folder on the disk of ``folder``, in which its new files are made; what is left in it at the end is removed."""
    partial = partial_name(folder / folder.name if folder.is_dir() else folder)
    remove(partial)  # left behind by an earlier process of the same number
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        remove(partial)


def put_files(made: Path, folder: Path, earlier: Collection[str], last: str, begin: Callable[[], None]) -> None:
    """Put the files that were ``made`` into ``folder``, over the ``earlier`` ones; what else lies there stays.

    Each is on disk before it has its name, and the file ``last`` comes last. A new folder appears whole. In one that is there,
    ``begin`` is called before the first file is replaced. Raises ``ValueError`` when a file of another origin is in the way.
    """
    names = files_in(made)
    for name in names:
        to_disk(made / name)
    if not contents(folder):
        os.replace(made, folder)
        return to_disk(folder.parent)
    taken = [name for name in names if name not in earlier and os.path.lexists(folder / name)]
    if taken:
        refuse_foreign(folder, taken, "an earlier export")
    begin()
    for name in sorted(names, key=lambda name: name == last):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / name, folder / name)
    for name in set(earlier) - set(names):
        (folder / name).unlink(missing_ok=True)
    to_disk(folder)


def files_in(folder: Path) -> list[str]:
    """The files in a folder and below it, by their paths in it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def save_tensors(tensors: Mapping[str, Any], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file whose mode follows the umask, like that of any other file."""
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata=metadata)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """Give a file the mode that new files get there: safetensors makes its own for their owner alone."""
    new = path.with_name(f"{path.name}.mode-{os.getpid()}")
    new.touch()
    path.chmod(new.stat().st_mode & 0o777)
    new.unlink()
