"""The grammar of damage: what can be wrong in nested settings, in text, in bytes, in
archives and in tensors.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from lit_transdiff.base.files import SEAL, with_seal

NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    0.5,
    -0.0,
    1e-9,
    10**6,
    10**12,
    2**31,
    2**63,
    10**30,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
]
WORDS = [
    "",
    " ",
    "none",
    "null",
    "true",
    "NaN",
    "010",
    "1e5",
    "1_0",
    "0x10",
    "auto",
    "naïve",
    "日本",
    "a b",
    "-",
    "--help",
    "x" * 300,
]
WORDS += [
    "../neighbour",
    "/",
    ".",
    "..",
    "~",
    "~nobody/x",
    "$HOME",
    "${HOME}",
    "${nope}",
    "${output_dir}",
    "$NOPE",
    "a/b",
    "a\\b",
]
WORDS += [
    "a\nb",
    "\t",
    "\x00",
    "a\x00b",
    "{}",
    "[",
    "%s",
    "{0}",
    "*",
    "file:///etc/passwd",
    "pipe:echo",
    "ftp://a/b",
    "ftps://a",
    "neighbour/kept.txt",
]
WORDS += ["\ud800", "<b>", "\x1b[2J", "work", "work/shards", "work/run.yaml", "work/nothing"]
CONTAINERS: list[Any] = [
    None,
    True,
    False,
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": 1},
    {"": None},
    {"a": {"b": []}},
    [{}],
    [[1], [2]],
]
Change = Callable[[random.Random, Path], str]


def odd_value(draw: random.Random, near: Any = None) -> Any:
    """A value that a field may not expect; half of the time of the kind of the one ``near`` it."""
    if isinstance(near, list) and near and draw.random() < 0.5:
        return draw.choice(
            [
                near[:-1],
                near * 2,
                [*near, odd_value(draw)],
                [[*near]],
                near[0],
                {str(i): x for i, x in enumerate(near)},
            ]
        )
    if isinstance(near, int | float) and draw.random() < 0.5:
        return draw.choice(
            [*NUMBERS, -near, near + 1, near * 1000, float(near), str(near), [near], f"{near} "]
        )
    if isinstance(near, str) and draw.random() < 0.3:
        return draw.choice([near.upper(), near + " ", near[:-1], near + "/", [near], near * 2, f"{near}\n"])
    return draw.choice(
        [draw.choice(NUMBERS), draw.choice(WORDS), draw.choice(WORDS), draw.choice(CONTAINERS)]
    )


def places(tree: Any) -> list[tuple[Any, Any]]:
    """Every container in nested settings with every key or number of an item in it."""
    keys = list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else []
    return [place for key in keys for place in [(tree, key), *places(tree[key])]]


def change_tree(draw: random.Random, tree: Any) -> str:
    """Change nested settings in one place; return a description of the change."""
    found = places(tree)
    if not found:
        return "nothing to change"
    inside, key = draw.choice(found)
    before = inside[key]
    kind = draw.choice(["value", "value", "value", "value", "gone", "twice", "renamed", "moved"])
    if kind == "gone":
        del inside[key]
    elif kind == "renamed" and isinstance(inside, dict):
        inside[draw.choice([f"{key}s", str(key)[:-1], str(key).upper(), *WORDS[:8], "base", "imports"])] = (
            inside.pop(key)
        )
    elif kind == "twice" and isinstance(inside, list):
        inside.insert(draw.randrange(len(inside) + 1), before)
    elif kind == "moved":
        other, name = draw.choice(found)
        inside[key] = copy.deepcopy(other[name])
    else:
        inside[key] = copy.deepcopy(odd_value(draw, before))
    after = inside[key] if kind in ("value", "moved") else ""
    return f"{kind} {key}: {str(before)[:40]!r} -> {str(after)[:60]!r}"


def change_settings(draw: random.Random, file: Path) -> str:
    """One to three changes of a YAML file."""
    tree = yaml.safe_load(file.read_text())
    told = [change_tree(draw, tree) for _ in range(draw.choice([1, 1, 1, 2, 3]))]
    text = yaml.safe_dump(tree, allow_unicode=draw.random() < 0.5, sort_keys=False)
    file.write_text(text, errors="replace")
    return "; ".join(told)


def change_json(draw: random.Random, file: Path) -> str:
    """Change a JSON file in one place; its checksum fits or is gone, or does not."""
    tree = json.loads(file.read_text())
    told = change_tree(draw, tree)
    sealed = draw.choice(["sealed", "open", "stale"])
    if isinstance(tree, dict) and sealed != "stale":
        tree.pop(SEAL, None)
        tree.pop("crc32", None)
        tree = with_seal(tree) if sealed == "sealed" else tree
    file.write_text(json.dumps(tree))
    return f"{told} ({sealed})"


def change_text(draw: random.Random, file: Path) -> str:
    """Break a text as an editor, another system or a bad copy does."""
    text = file.read_bytes()
    lines = text.splitlines(keepends=True) or [b""]
    at = draw.randrange(len(lines))
    kind, content = draw.choice(
        [
            ("a byte order mark", b"\xef\xbb\xbf" + text),
            ("UTF-16", text.decode(errors="ignore").encode("utf-16")),
            ("CRLF", text.replace(b"\n", b"\r\n")),
            ("Latin-1", text + "# é\n".encode("latin-1")),
            ("a tab", b"\t" + text),
            ("a line twice", b"".join([*lines[: at + 1], *lines[at:]])),
            ("a line gone", b"".join([*lines[:at], *lines[at + 1 :]])),
            ("indented", b"".join([*lines[:at], b"   ", *lines[at:]])),
            ("half", text[: len(text) // 2]),
            ("an object", text + b"\nx: !!python/object/apply:os.system [touch neighbour/x]\n"),
            (
                "a bomb",
                b"a: &a [1,1,1,1,1,1,1,1,1]\n"
                + b"".join(
                    b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(9)
                ),
            ),
            ("deep", b"[" * 5000),
            ("two documents", text + b"\n---\n" + text),
            ("zeros", text + bytes(16)),
            ("nothing", b""),
            ("its own base", text + f"\nbase: {file.name}\n".encode()),
            ("a word", b"hello"),
            ("a list", b"- 1\n- 2\n"),
            ("a brace", text + b"}"),
            ("a long number", text + b"\nseed: " + b"9" * 5000 + b"\n"),
        ]
    )
    file.write_bytes(content)
    return kind


def change_bytes(draw: random.Random, file: Path) -> str:
    """Break a file as a bad disk or a bad copy does, or put something else in its place."""
    content = bytearray(file.read_bytes())
    kind = draw.choice(
        [
            "cut",
            "cut",
            "empty",
            "zeroed",
            "flipped",
            "flipped",
            "flipped",
            "longer",
            "noise",
            "folder",
            "link",
            "loop",
            "other",
            "gone",
        ]
    )
    at = draw.randrange(max(len(content), 1))
    if kind == "flipped" and content:
        for _ in range(draw.choice([1, 1, 20])):
            at = draw.randrange(len(content))
            content[at] ^= 1 << draw.randrange(8)
    new = {
        "cut": content[:at],
        "empty": b"",
        "zeroed": content[:at] + bytes(len(content) - at),
        "longer": content + draw.randbytes(99),
    }
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind in ("link", "loop"):
        file.symlink_to("nowhere" if kind == "link" else file.name)
    elif kind == "other":
        shutil.copyfile(
            draw.choice(
                sorted(path for path in file.parent.rglob("*") if path.is_file()) or [Path(__file__)]
            ),
            file,
        )
    elif kind != "gone":
        file.write_bytes(draw.randbytes(200) if kind == "noise" else new.get(kind, content))
    return f"{kind} at {at}"


def change_arrays(draw: random.Random, file: Path) -> str:
    """Change one array of an ``.npz`` file."""
    with np.load(file) as found:
        arrays: dict[str, Any] = dict(found)
    name = draw.choice(sorted(arrays))
    value = arrays[name]
    kind, new = draw.choice(
        [
            ("gone", None),
            ("NaN", np.full(value.shape, np.nan)),
            ("empty", value.reshape(-1)[:0]),
            ("one less", np.atleast_1d(value)[:-1]),
            ("flat", value.reshape(-1)),
            ("text", np.array(["a"])),
            ("objects", np.array([{"a": 1}], dtype=object)),
            ("a number", np.array(3)),
            ("negative", -np.ones(value.shape, np.int64)),
            ("complex", value.astype(complex) if value.dtype.kind in "iuf" else value),
            ("large", np.full(value.shape, 2**62, np.int64)),
            ("twice", np.concatenate([value, value]) if value.ndim else value),
            ("other type", value.astype(np.float16) if value.dtype.kind in "iuf" else value),
            ("zeros", np.zeros_like(value)),
            ("renamed", None),
        ]
    )
    old = arrays.pop(name)
    if kind == "renamed":
        arrays[f"{name}_"] = old
    elif new is not None:
        arrays[name] = new
    np.savez(file, **arrays)
    return f"{name}: {kind}"


def change_tensors(draw: random.Random, file: Path) -> str:
    """Change one tensor of a safetensors file, or its header."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(file)
    name = draw.choice(sorted(tensors))
    old = tensors.pop(name)
    kind = draw.choice(
        [
            "gone",
            "renamed",
            "one less",
            "flat",
            "half",
            "whole numbers",
            "NaN",
            "all gone",
            "extra axis",
            "empty",
        ]
    )
    new = {
        "renamed": old,
        "one less": old[:-1] if old.ndim else old,
        "flat": old.reshape(-1),
        "half": old.half(),
        "NaN": old.float() * math.nan,
    }
    new |= {"whole numbers": old.long(), "extra axis": old[None], "empty": old.reshape(-1)[:0]}
    if kind in new:
        tensors[f"{name}.x" if kind == "renamed" else name] = new[kind].contiguous().clone()
    save_file({} if kind == "all gone" else tensors, file)
    for record in ("export.json", "checksums.json"):  # else it ends at the checksum
        if (file.parent / record).is_file() and draw.random() < 0.8:
            content = json.loads((file.parent / record).read_text())
            content.pop("crc32", None)
            content.pop(SEAL, None)
            (file.parent / record).write_text(json.dumps(content))
    return f"{name}: {kind}"


def change_members(draw: random.Random, file: Path) -> str:
    """Rewrite a tar or zip with one odd member."""
    return (zip_anew if file.suffix in (".zip", ".npz", ".pth", ".ckpt") else tar_anew)(draw, file)


def odd_member(draw: random.Random, names: list[str]) -> tuple[str, bytes]:
    stem = draw.choice(names) if names else "a.png"
    name = draw.choice(
        [
            stem,
            "../../neighbour/x",
            "/neighbour/x",
            "",
            ".",
            "a",
            "a/b/c.png",
            "new.cls",
            "new.png",
            "日本.png",
            "x" * 300,
            "a.b.c.png",
            "a\x00b",
            f"{stem}.json",
        ]
    )
    content = draw.choice(
        [
            b"",
            b"0",
            b"-1",
            b"99",
            b"a",
            b"1e9",
            b"99999999999999999999",
            b"\xff\xfe",
            b"{}",
            b"GIF89a",
            draw.randbytes(50),
            bomb(),
        ]
    )
    return name, content


def bomb() -> bytes:
    """A PNG file of a few bytes whose header gives 60,000 pixels in width and height."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(1000)))
        + chunk(b"IEND", b"")
    )


def tar_anew(draw: random.Random, file: Path) -> str:
    with tarfile.open(file) as archive:
        members = [(member.name, archive.extractfile(member).read()) for member in archive if member.isfile()]  # type: ignore[union-attr]
    odd = odd_member(draw, [name for name, _ in members])
    at = draw.randrange(len(members) + 1)
    kind = draw.choice(
        ["added", "added", "replaced", "gone", "link", "folder", "shuffled", "compressed", "huge"]
    )
    if kind == "shuffled":
        draw.shuffle(members)
    elif kind in ("gone", "replaced") and members:
        name, _ = members.pop(min(at, len(members) - 1))
        odd = (name, odd[1])
    if kind in ("added", "replaced"):
        members.insert(at, odd)
    mode = "w:gz" if kind == "compressed" else "w"
    with tarfile.open(file, mode, format=draw.choice([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        if kind in ("link", "folder", "huge"):
            info = tarfile.TarInfo(odd[0] or "x")
            info.type = {
                "link": draw.choice([tarfile.SYMTYPE, tarfile.LNKTYPE]),
                "folder": tarfile.DIRTYPE,
                "huge": tarfile.REGTYPE,
            }[kind]
            info.linkname = "../../neighbour/kept.txt" if kind == "link" else ""
            archive.addfile(info)
    if kind == "huge":  # a member that says that it is longer than the file
        content_ = bytearray(file.read_bytes())
        content_[124:136] = b"77777777777\0"
        file.write_bytes(content_)
    return f"{kind} {odd[0][:40]!r} {odd[1][:20]!r}"


def zip_anew(draw: random.Random, file: Path) -> str:
    with zipfile.ZipFile(file) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    odd = odd_member(draw, [name for name, _ in members])
    at = draw.randrange(len(members)) if members else 0
    kind = draw.choice(["added", "cut", "gone", "replaced", "all gone"])
    name, content = members.pop(at) if members and kind != "added" else odd
    if kind != "gone":
        members.insert(
            at, odd if kind == "added" else (name, content[: len(content) // 2] if kind == "cut" else odd[1])
        )
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in [] if kind == "all gone" else members:
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return f"{kind} {name[-40:]!r}"
