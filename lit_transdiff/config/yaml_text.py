"""The YAML reader of files and command-line values, by the core schema of YAML 1.2.

PyYAML follows YAML 1.1, where 010 is 8, 1:00 is 60, ``on`` is true, 1e-4 is a string, a date is an object,
and of two equal keys the later silently wins. Here numbers are decimal, true and false are the only booleans,
and all else is text.
"""

from __future__ import annotations

import codecs
import math
import re
from pathlib import Path
from typing import Any, ClassVar

import yaml

INTEGER = r"[-+]?[0-9]+(?:_[0-9]+)*"
FLOAT = r"[-+]?(?:(?:[0-9]+(?:_[0-9]+)*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
NOT_FINITE = r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
NUMBER = re.compile(f"(?:{FLOAT}|{NOT_FINITE})$")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
NULLS = ("", "~", "null", "Null", "NULL")
MAX_DIGITS = 400  # digits of a number; longer digit strings are text
MAX_BYTES = 10_000_000  # bytes of a file
MAX_NODES, MAX_DEPTH = 200_000, 60  # nodes and depth of a document, counting each use of an anchor
TAG = "tag:yaml.org,2002:"


def number_of(text: str) -> int | float | None:
    """The decimal number in a text (10, 010, +1_000, .5, 1e-4, .inf), or None for other texts."""
    if len(text) > MAX_DIGITS or not NUMBER.fullmatch(text):
        return None
    if re.fullmatch(INTEGER, text):
        return int(text)
    if re.fullmatch(NOT_FINITE, text):
        return float(text.replace(".", ""))
    number = float(text)
    return number if math.isfinite(number) else None


class Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Settings, lists, text, numbers, booleans and null; anything else is refused."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}
    yaml_constructors: ClassVar[dict[str | None, Any]] = {}
    spelled = False

    def construct_document(self, node: yaml.Node) -> Any:
        Tree().examine(node)
        return super().construct_document(node)

    def construct_number(self, node: yaml.ScalarNode) -> Any:
        number = number_of(node.value)
        return node.value if number is None or (self.spelled and str(number) != node.value) else number

    def construct_boolean(self, node: yaml.ScalarNode) -> Any:
        as_written = self.spelled and node.value not in ("true", "false")
        return node.value if as_written else BOOLEANS[node.value]

    def construct_null(self, node: yaml.ScalarNode) -> None:
        return None


class Spelled(Loader):
    """A loader for typed fields: values with another canonical spelling stay text (010, 1.10, True)."""

    spelled = True


for _name, _words, _first, _construct in (
    ("number", NUMBER, "-+.0123456789", Loader.construct_number),
    ("bool", re.compile(f"(?:{'|'.join(BOOLEANS)})$"), "tTfF", Loader.construct_boolean),
    ("null", re.compile(f"(?:{'|'.join(NULLS)})$"), ["", "~", "n", "N"], Loader.construct_null),
    ("merge", re.compile("<<$"), "<", None),
    ("str", None, "", Loader.construct_scalar),
    ("seq", None, "", Loader.construct_yaml_seq),
    ("map", None, "", Loader.construct_yaml_map),
):
    if _words:
        Loader.add_implicit_resolver(TAG + _name, _words, list(_first))
    if _construct:
        Loader.add_constructor(TAG + _name, _construct)
Loader.add_constructor(None, Loader.construct_undefined)


class Tree:
    """Refuses duplicate keys, non-scalar keys, and anchors that are recursive or too large."""

    def __init__(self) -> None:
        self.sizes: dict[yaml.Node, int] = {}
        self.open: set[yaml.Node] = set()

    def examine(self, node: yaml.Node) -> int:
        """The number of nodes of a tree, counting each use of an anchor. Keys become text."""
        if isinstance(node, yaml.ScalarNode):
            return 1
        if node not in self.sizes:
            if node in self.open:
                raise refusal("an anchor that contains itself", node)
            if len(self.open) >= MAX_DEPTH:
                raise refusal(f"more than {MAX_DEPTH} levels", node)
            self.open.add(node)
            below = keyed(node) if isinstance(node, yaml.MappingNode) else node.value
            self.sizes[node] = 1 + sum(map(self.examine, below))
            self.open.discard(node)
        if self.sizes[node] > MAX_NODES:
            raise refusal(f"more than {MAX_NODES:,} values, each use of an anchor counted", node)
        return self.sizes[node]


def keyed(node: yaml.MappingNode) -> list[yaml.Node]:
    """The values of a mapping with unique scalar keys."""
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise refusal("a key that is no word", key)
        if key.tag == TAG + "merge":
            continue
        key.tag = TAG + "str"
        if key.value in seen:
            raise refusal(f"the key {key.value!r} twice", key)
        seen.add(key.value)
    return [value for _, value in node.value]


def refusal(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=f"found {problem}", problem_mark=node.start_mark)


def read(text: str, source: str, *, spelled: bool = False) -> Any:
    """The value of a YAML text; ``spelled`` as in ``Spelled``.

    Raises ``ValueError`` with the ``source`` and the line.
    """
    try:
        return yaml.load(text, Spelled if spelled else Loader)
    except yaml.MarkedYAMLError as error:
        line = f" (line {error.problem_mark.line + 1})" if error.problem_mark else ""
        problem = ", ".join(part for part in (error.context, error.problem) if part)
        raise ValueError(
            f"{source} is not YAML: {problem}{line}. Text with special signs stands in quotes."
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{source} is not YAML: {' '.join(str(error).split())}") from error


def read_file(path: Path, *, spelled: bool = False) -> Any:
    """The value of a YAML file. Raises ``ValueError`` with the file, the line and what is allowed."""
    return read(text_of(path), str(path), spelled=spelled)


def text_of(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte-order mark.

    Raises ``ValueError`` with the line of a wrong byte.
    """
    if (size := path.stat().st_size) > MAX_BYTES:
        raise ValueError(f"{path}: got {size:,} bytes; allowed: settings as text, at most {MAX_BYTES:,}.")
    content = path.read_bytes()
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "utf-16" if content.startswith(marks) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        allowed = "text in UTF-8; iconv -f latin1 -t utf-8 makes it of Latin-1"
        raise ValueError(
            f"{path}: line {line}: got the byte 0x{content[error.start]:02x}; allowed: {allowed}."
        ) from error


class Dumper(yaml.SafeDumper):
    """Quotes text that this reader, or one of YAML 1.1, would otherwise not read as text."""


def represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = number_of(text) is None and text not in BOOLEANS
    return dumper.represent_scalar(TAG + "str", text, style=None if plain else "'")


Dumper.add_representer(str, represent_text)


def dump(value: Any) -> str:
    """A value as YAML text that ``read`` gives back, as do readers of YAML 1.1."""
    return str(yaml.dump(value, Dumper=Dumper, sort_keys=False))
