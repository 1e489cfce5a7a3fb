"""Scanning a webdataset tar: its samples, the positions of their bytes, and its integrity.

A sample is the members that share a key (the file name up to its dot): one image (or one ``.bin`` of latents)
and one ``.cls`` with the class number as text (or another label, see ``Labels``). Other members are ignored;
pickles are refused, because webdataset would execute them.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Optional

from lit_transdiff.base.files import json_of
from lit_transdiff.config import require

IMAGE_MEMBERS = ("jpg", "jpeg", "png", "webp", "bmp")
LATENT_MEMBER = "bin"
LABEL_MEMBER = "cls"
LABEL = re.compile(r"0*[0-9]{1,6}")  # ASCII digits
LABELS = "a class number, 0 to 999999"
PICKLE_MEMBERS = ("pickle", "pkl", "pyd", "pth", "pt")
MAX_CLASS_DIGITS, MAX_LABEL, MAX_JSON = 32, 256, 1 << 20  # bytes of a class number, a label, a JSON member
END_OF_TAR = 1024  # bytes: two blocks of zeros


class Place(NamedTuple):
    """The position of a member's content in its tar."""

    offset: int
    size: int


class ScannedSample(NamedTuple):
    """The position of a sample's image (or latent) in its shard: bytes ``offset`` to ``offset + size``."""

    key: str
    offset: int
    size: int
    label: int
    kind: str  # "images" or "latents"


@dataclass(frozen=True)
class Labels:
    """The place of labels: the member ``.cls`` or ``.txt``, or a ``field`` of ``.json``.

    A label is the number of a class, or one of ``names``, which are in class order.
    """

    member: str = LABEL_MEMBER
    field: str = ""
    names: tuple[str, ...] = ()

    @classmethod
    def of(cls, text: str, names: Sequence[str] = ()) -> Labels:
        """Parse ``cls``, ``txt`` or ``json:FIELD``."""
        member, _, field = text.lstrip(".").partition(":")
        fits = member in (LABEL_MEMBER, "txt", "json") and (member == "json") == bool(field)
        require(fits, "--label", text, f"{LABEL_MEMBER}, txt, or json:FIELD, as in json:label")
        return cls(member, field, tuple(names))

    def number(self, content: bytes) -> int:
        """The class number in a member's content. Raises ``ValueError`` for other content."""
        value: Any = content.decode("utf-8", errors="replace").strip()
        if self.field:
            try:
                value = json_of(content)
            except (ValueError, RecursionError) as error:
                raise ValueError(f".json: {error}; allowed: JSON with the field {self.field!r}") from error
            if not isinstance(value, dict) or self.field not in value:
                fields = ", ".join(value) if isinstance(value, dict) else "no fields"
                raise ValueError(f".json: got {fields}; allowed: with the field {self.field!r}")
            value = value[self.field]
        text = "" if isinstance(value, bool) else str(value)
        if len(text) <= MAX_CLASS_DIGITS and LABEL.fullmatch(text):
            return int(value)  # digits are a class number, even if a class has another number as its name
        if value not in self.names:
            raise ValueError(
                f"label {str(value)[:40]!r}; allowed: {LABELS}, or one of the names that --class-names gives"
            )
        return self.names.index(value)


CLS = Labels()


def scan_shard(path: Path, labels: Labels = CLS) -> list[ScannedSample]:
    """The samples of a shard in the order of their images; labels may be anywhere in the file.

    Raises ``ValueError`` with shard and key for a damaged or truncated tar, data after the last member, a
    duplicate key, a missing or repeated image or label, a label that is not a number, a dot in a key, and a
    pickle member.
    """
    members_by_key: dict[str, dict[str, Place]] = {}  # by key and extension
    before = None
    with path.open("rb") as file:
        for info in members_of(file, path):
            key, extension = split_name(info.name, path, labels.member)
            if extension is None:
                continue
            members = members_by_key.setdefault(key, {})
            if extension in members and key != before:
                raise ValueError(f"{path.name}: key {key!r} is there twice; keys must differ.")
            if extension in members:
                raise ValueError(f"{path.name}: sample {key!r} has two members .{extension}.")
            members[extension] = Place(info.offset_data, info.size)
            before = key
        samples = [sample_from(file, path, key, members, labels) for key, members in members_by_key.items()]
    return sorted(samples, key=lambda sample: sample.offset)


def members_of(file: BinaryIO, path: Path) -> Iterator[tarfile.TarInfo]:
    """The regular members. ``tarfile`` takes a damaged header for the end, so the rest must be zeros."""
    size = path.stat().st_size
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (info := tar.next()) is not None:
                if info.offset_data + info.size > size:
                    raise ValueError(
                        f"{path.name}: truncated: member {info.name!r} ends after the file does."
                    )
                if info.isreg():
                    yield info
                tar.members = []  # type: ignore[attr-defined]  # otherwise memory grows with the shard
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{path.name}: not a whole, uncompressed tar: {error}.") from error
    file.seek(end)
    if size - end < END_OF_TAR:
        raise ValueError(f"{path.name}: truncated: the end-of-tar blocks are missing at byte {end}.")
    while block := file.read(1 << 20):
        if block.count(0) != len(block):
            raise ValueError(
                f"{path.name}: damaged header or trailing data at byte {end}, after the last readable member."
            )


def split_name(name: str, path: Path, label: str) -> tuple[str, Optional[str]]:
    """``folder/key.ext`` -> (``folder/key``, lower-case ``ext``); ``None`` if it belongs to no sample."""
    folder, _, base = name.rpartition("/")
    stem, *extensions = base.split(".")
    last = extensions[-1].lower() if extensions else ""
    if last in PICKLE_MEMBERS:
        raise ValueError(f"{path.name}: member {name!r} is a pickle, which could run any code; refused.")
    if last not in (*IMAGE_MEMBERS, LATENT_MEMBER, label) or not stem:
        return name, None
    if len(extensions) > 1:
        raise ValueError(
            f"{path.name}: key {base.rpartition('.')[0]!r} has a dot; webdataset would cut it there. "
            "Rename the members, or unpack them and make shards of the images with: lit-transdiff pack"
        )
    return f"{folder}/{stem}" if folder else stem, last


def sample_from(
    file: BinaryIO, path: Path, key: str, members: dict[str, Place], labels: Labels
) -> ScannedSample:
    """A sample from its members (by extension)."""
    where = f"{path.name}: sample {key!r}"
    if labels.member not in members:
        hint = " (index --label txt, or json:FIELD, takes it from another member)"
        other = hint if labels.member == LABEL_MEMBER else ""
        raise ValueError(f"{where} has no label (.{labels.member}); it has .{', .'.join(members)}{other}.")
    payloads = [extension for extension in members if extension != labels.member]
    if len(payloads) != 1:
        problem = f"has {len(payloads)} images (.{', .'.join(payloads)})" if payloads else "has no image"
        raise ValueError(
            f"{where} {problem}; allowed: one of .{', .'.join((*IMAGE_MEMBERS, LATENT_MEMBER))}."
        )
    label = members[labels.member]
    most = MAX_JSON if labels.field else MAX_LABEL
    require(label.size <= most, f"{where}: bytes of .{labels.member}", label.size, f"at most {most}")
    file.seek(label.offset)
    try:
        number = labels.number(file.read(label.size))
    except ValueError as error:
        raise ValueError(f"{where}: {error}.") from error
    data = members[payloads[0]]
    kind = "latents" if payloads[0] == LATENT_MEMBER else "images"
    return ScannedSample(key, data.offset, data.size, number, kind)


def require_class_0(where: str, labels: Sequence[int]) -> None:
    """Refuse labels from 1 on without class names, because class 0 would be empty."""
    allowed = (
        "class numbers from 0 on: subtract 1, or give --class-names a name for each, also for a missing 0"
    )
    require(min(labels) != 1, f"{where}: labels", f"{min(labels)} to {max(labels)}", allowed)
