"""Findings of packing for the user: unreadable images, and images and classes with pitfalls."""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lit_transdiff.base.files import read_json, replace_file, sealed
from lit_transdiff.config import are_numbers
from lit_transdiff.config.checks import listed
from lit_transdiff.data.decode import ANIMATED, ORIENTED, TRANSPARENT
from lit_transdiff.data.encode import Encoding
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.sources import listed_kinds

SKIPPED_FILE = "skipped.txt"
FINDINGS_FILE = "findings.json"
DIGITS = re.compile("[0-9]+")
NAMES_PRINTED = 5  # names printed per kind
Skipped = list[tuple[str, str]]  # unreadable images: name, reason


@dataclass
class Findings:
    """Findings about some images, serialisable as JSON."""

    skipped: Skipped = field(default_factory=list)
    # numbers of oriented, transparent and animated images
    oddities: dict[str, int] = field(default_factory=dict)
    digests: list[str] = field(default_factory=list)  # hashes of the packed images, in shard order

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> Findings:
        """The findings in a record; those of earlier versions are incomplete."""
        skipped = [(origin, reason) for origin, reason in stored.get("skipped", [])]
        return cls(skipped, stored.get("oddities", {}), stored.get("digests", []))

    def add(self, oddities: Iterable[str], content: bytes) -> None:
        """Record a readable image."""
        self.oddities = dict(Counter(self.oddities) + Counter(oddities))
        # equal for equal pictures with equal encoding
        self.digests.append(hashlib.blake2b(content, digest_size=8).hexdigest())


def joined(parts: Sequence[Findings]) -> Findings:
    """The findings of all shards, in shard order."""
    return Findings(
        [image for part in parts for image in part.skipped],
        dict(sum((Counter(part.oddities) for part in parts), Counter[str]())),
        [digest for part in parts for digest in part.digests],
    )


def in_two_classes(index: ShardIndex, digests: Sequence[str], origins: Mapping[str, str]) -> list[list[str]]:
    """The names of byte-identical images with different labels; ``origins`` by key."""
    if len(digests) != len(index):  # some shards were packed by an earlier version
        return []
    alike = defaultdict[str, list[int]](list)
    repeated = {digest for digest, count in Counter(digests).items() if count > 1}
    for sample, digest in enumerate(digests):
        if digest in repeated:
            alike[digest].append(sample)
    groups = [samples for samples in alike.values() if len(set(index.label[samples].tolist())) > 1]
    return [[origins[index.key_of(sample)] for sample in samples] for samples in groups]


@dataclass(frozen=True)
class PackReport:
    """The result of packing: the index, ``(name, reason)`` of unreadable images, and notes for the user."""

    index: ShardIndex
    skipped: Skipped
    passed_over: Counter[str]  # other files by kind
    notes: list[str] = field(default_factory=list)  # sentences

    def __str__(self) -> str:
        shards, total = self.index.shards, sum(shard.bytes for shard in self.index.shards)
        text = f"{len(self.index)} images of {self.index.num_classes} classes in {len(shards)} shards"
        text += f", {total:,} bytes"
        if self.skipped:
            text += f"; {len(self.skipped)} unreadable images skipped, listed in {SKIPPED_FILE}"
        text += f"; passed over: {listed_kinds(self.passed_over)}" if self.passed_over else ""
        return "\n".join([text, *(f"note: {note}" for note in self.notes)])


def write_findings(folder: Path, findings: Findings, twice: Sequence[Sequence[str]]) -> None:
    """Save findings beside the shards: unreadable images as text, the rest for the next report."""
    if findings.skipped:
        lines = (f"{origin}\t{reason}\n" for origin, reason in findings.skipped)
        replace_file(folder / SKIPPED_FILE, "".join(lines).encode())
    if findings.oddities or twice:
        content = {"oddities": findings.oddities, "in two classes": twice}
        replace_file(folder / FINDINGS_FILE, sealed(content))


def read_report(
    index: ShardIndex, encoding: Encoding, passed_over: Counter[str], source_names: Sequence[str] = ()
) -> PackReport:
    """The report on packed shards; ``source_names`` are the class names in the source."""
    assert isinstance(index.folder, Path)
    path = index.folder / SKIPPED_FILE
    lines = path.read_text().splitlines() if path.exists() else []
    skipped = [(origin, reason) for origin, _, reason in (line.partition("\t") for line in lines)]
    path = index.folder / FINDINGS_FILE
    findings = read_json(path) if path.exists() else {}
    notes = [
        *notes_on_images(findings.get("oddities", {}), encoding),
        *notes_on_doubles(findings.get("in two classes", [])),
        *notes_on_classes(index),
        *notes_on_names(source_names),
    ]
    return PackReport(index, skipped, passed_over, notes)


def notes_on_images(oddities: Mapping[str, int], encoding: Encoding) -> Iterator[str]:
    """Notes on images that are not stored as a viewer shows them."""
    unchanged = encoding.keeps_files
    turned = "they are turned when they are read (data.exif)" if unchanged else "they are turned"
    turned = turned if encoding.exif == "turn" else "which --exif ignore leaves as it is"
    colour, when = ("data.background", " when they are read") if unchanged else (encoding.background, "")
    for kind, what in (
        (ORIENTED, f"images lie on their side or are mirrored, and say so by an EXIF orientation: {turned}"),
        (TRANSPARENT, f"images are transparent in places: {colour} shows there{when}"),
        (ANIMATED, "images are animations, of which only the first frame counts"),
    ):
        if oddities.get(kind):
            yield f"{oddities[kind]} {what}"


def notes_on_doubles(twice: Sequence[Sequence[str]]) -> Iterator[str]:
    """Notes on images with two labels."""
    if twice:
        some = "; ".join(" = ".join(names) for names in twice[:NAMES_PRINTED])
        more = f"; all in {FINDINGS_FILE}" if len(twice) > NAMES_PRINTED else ""
        yield f"{len(twice)} images are in more than one class: {some}{more}"


def notes_on_classes(index: ShardIndex) -> Iterator[str]:
    """Notes on classes without images."""
    if empty := [f"{c} ({index.class_names[c]!r})" for c in np.flatnonzero(index.class_counts == 0)]:
        yield f"{len(empty)} classes have no images: {listed(empty, NAMES_PRINTED)}"


def notes_on_names(names: Sequence[str]) -> Iterator[str]:
    """Notes on class names (in class order) whose order or spelling may be unexpected."""
    if are_numbers([name.removeprefix("-") for name in names]):
        if moved := [f"class {c} is {name!r}" for c, name in enumerate(names) if int(name) != c]:
            yield (
                "classes are numbered from 0 without gaps, so that their numbers are not their names: "
                f"{listed(moved, NAMES_PRINTED)}"
            )
    elif wrong := next((pair for pair in pairs_by_number(names) if pair[0] != pair[1]), None):
        yield (
            f"classes are in the order of text, not of the numbers in their names: {wrong[0]!r} has the "
            f"place of {wrong[1]!r}, which is why index.json lists the names in order of the class number"
        )
    alike = Counter(name.casefold() for name in names)
    if same := [name for name in names if alike[name.casefold()] > 1]:
        yield f"names of classes differ in upper and lower case alone: {listed(same, NAMES_PRINTED)}"


def pairs_by_number(names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Pairs of names in text order and in number order, for names such as class_2 and class_10."""
    families = defaultdict[str, list[str]](list)
    for name in names:
        families[DIGITS.sub("0", name)].append(name)
    for family in families.values():
        by_number = sorted(family, key=lambda name: [int(part) for part in DIGITS.findall(name)])
        yield from zip(family, by_number, strict=True)
