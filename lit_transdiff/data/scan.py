"""Reads the headers of a webdataset tar: which samples it holds, where their bytes are, and whether it is whole.

A sample is the run of members that share a key (the file name up to its dot): one image (or one ``.bin`` of latents)
and one ``.cls`` with the class number as text. Members of other kinds are passed over; pickles are refused, because
webdataset would run them.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Optional

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "bmp")
LATENT_MEMBER = "bin"
LABEL_MEMBER = "cls"
LABEL = re.compile(r"0*[0-9]{1,6}")  # ASCII digits
LABELS = "a class number, 0 to 999999"
PICKLE_MEMBERS = ("pickle", "pkl", "pyd", "pth", "pt")
END_OF_TAR = 1024  # bytes: two blocks of zeros


class ScannedSample(NamedTuple):
    """Where the image (or latent) of a sample lies in its shard: bytes ``offset`` to ``offset + size``."""

    key: str
    offset: int
    size: int
    label: int
    kind: str  # "images" or "latents"


def scan_shard(path: Path) -> list[ScannedSample]:
    """The samples of a shard in file order.

    Raises ``ValueError`` naming shard and key for a damaged or truncated tar, data after the last member, a duplicate
    key, a missing or repeated image or label, a label that is not a number, a dot in a key, and a pickle member.
    """
    samples: list[ScannedSample] = []
    seen: set[str] = set()
    key: Optional[str] = None
    members: dict[str, tarfile.TarInfo] = {}
    with path.open("rb") as file:
        for info in members_of(file, path):
            name, extension = split_name(info.name, path)
            if extension is None:
                continue
            if name != key:
                if key is not None:
                    samples.append(sample_from(file, path, key, members))
                if name in seen:
                    raise ValueError(f"{path.name}: key {name!r} is there twice; keys must differ.")
                seen.add(name)
                key, members = name, {}
            if extension in members:
                raise ValueError(f"{path.name}: sample {name!r} has two members .{extension}.")
            members[extension] = info
        if key is not None:
            samples.append(sample_from(file, path, key, members))
    return samples


def members_of(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular members; ``tarfile`` alone takes a damaged header for the end, so the rest is checked to be zeros."""
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.offset_data + info.size > size:
                    raise ValueError(f"{path.name}: truncated: member {info.name!r} ends after the file does.")
                if info.isreg():
                    yield info
                tar.members = []  # type: ignore[attr-defined]  # else memory grows with the shard
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path.name}: not a whole, uncompressed tar: {error}.") from error
    file.seek(end)
    if size - end < END_OF_TAR:
        raise ValueError(f"{path.name}: truncated: the end-of-tar blocks are missing at byte {end}.")
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise ValueError(f"{path.name}: damaged header or trailing data at byte {end}, after the last readable member.")


def split_name(name: str, path: Path) -> tuple[str, Optional[str]]:
    """``folder/key.ext`` -> (``folder/key``, ``ext`` in lower case); ``None`` for a member that is no part of a sample."""
    folder, _, base = name.rpartition("/")
    stem, *extensions = base.split(".")
    last = extensions[-1].lower() if extensions else ""
    if last in PICKLE_MEMBERS:
        raise ValueError(f"{path.name}: member {name!r} is a pickle, which could run any code; refused.")
    if last not in (*IMAGE_MEMBERS, LATENT_MEMBER, LABEL_MEMBER) or not stem:
        return name, None
    if len(extensions) > 1:
        raise ValueError(f"{path.name}: key {base.rpartition('.')[0]!r} has a dot; webdataset would cut it there.")
    return f"{folder}/{stem}" if folder else stem, last


def sample_from(file: BinaryIO, path: Path, key: str, members: dict[str, tarfile.TarInfo]) -> ScannedSample:
    """The row of one sample from its members (extension -> header)."""
    if LABEL_MEMBER not in members:
        raise ValueError(f"{path.name}: sample {key!r} has no label (.{LABEL_MEMBER}); it has .{', .'.join(members)}.")
    payloads = [extension for extension in members if extension != LABEL_MEMBER]
    if len(payloads) != 1:
        found = f"has {len(payloads)} images (.{', .'.join(payloads)})" if payloads else "has no image"
        raise ValueError(f"{path.name}: sample {key!r} {found}; allowed: one of .{', .'.join((*IMAGE_MEMBERS, LATENT_MEMBER))}.")
    label = members[LABEL_MEMBER]
    file.seek(label.offset_data)
    text = file.read(min(label.size, 32)).decode("ascii", errors="replace").strip()
    if label.size > 32 or not LABEL.fullmatch(text):
        raise ValueError(f"{path.name}: sample {key!r}: label {text!r}; allowed: {LABELS}.")
    data = members[payloads[0]]
    kind = "latents" if payloads[0] == LATENT_MEMBER else "images"
    return ScannedSample(key, data.offset_data, data.size, int(text), kind)
