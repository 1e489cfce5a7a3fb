"""Every setting of a run: name, values, default and meaning, read from the source of ``config``.

The meaning is the comment beside a field, and the range is taken from the checks of its class, so that
neither is written twice. ``lit-transdiff settings --markdown`` prints ``docs/settings.md``.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_transdiff.config import NESTED, PARADIGMS, PRESETS, SIZES, ModelConfig, RunConfig, unknown
from lit_transdiff.config.typed import quoted, type_in_words

PACKAGE = Path(__file__).parents[1]
TERMINAL = 100  # columns of the text in a terminal
# The way in which a comment names the table of an open set, as in flow.solvers.SOLVERS.
TABLE = re.compile(r"\b([a-z_.]+)\.([A-Z_]+)\b")
SETTINGS_HEAD = """\
# All settings

A YAML file, and `key=value` after a command, set any of these by its dotted name; other settings keep their
defaults. Lists are written as in `optimizer.betas=[0.9,0.99]`, a missing value as `null`.
`lit-transdiff settings` prints this in a terminal, for a section or a setting as in
`lit-transdiff settings sampling` or `lit-transdiff settings optimizer.lr`. Checks that span several settings
are not listed: a run that violates one is refused before it starts, with the field, its value and what is
allowed.

This page is made from the source: `lit-transdiff settings --markdown > docs/settings.md`."""


@dataclass(frozen=True)
class Setting:
    """One setting: dotted name, type, values, default and meaning."""

    name: str
    hint: Any  # its type
    names: list[str]  # names of its table, if any
    ranges: list[str]  # ranges allowed by its checks, as text
    default_value: Any
    meaning: str

    @property
    def values(self) -> str:
        """The allowed values, as text."""
        return ", ".join([values_of(self.hint, self.names, self.default_value), *self.ranges])

    @property
    def default(self) -> str:
        """The default as YAML."""
        return as_yaml(self.default_value)


def all_settings() -> dict[str, list[Setting]]:
    """Section -> its settings, in the order of the source; the section of a run's own fields is ``""``."""
    whole = RunConfig()
    sections = {
        name: list(settings_of_class(cls, getattr(whole, name), f"{name}.")) for name, cls in NESTED.items()
    }
    return {"": list(settings_of_class(RunConfig, whole, ""))} | sections


def family_settings() -> dict[str, list[Setting]]:
    """``model.paradigm`` -> the settings of section ``model``, for all families but the default."""
    others = {
        name: family.settings for name, family in PARADIGMS.items() if family.settings is not ModelConfig
    }
    return {name: list(settings_of_class(cls, cls(), "model.")) for name, cls in others.items()}


def settings_of_class(cls: type, defaults: Any, prefix: str) -> Iterator[Setting]:
    """The fields of a class and its bases, without sections; defaults are those of an instance."""
    hints, ranges = typing.get_type_hints(cls), Ranges({})
    meanings: dict[str, str] = {}
    for base in reversed([base for base in cls.__mro__ if dataclasses.is_dataclass(base)]):
        tree = ast.parse(inspect.getsource(base)).body[0]
        assert isinstance(tree, ast.ClassDef)
        meanings |= {
            name: meaning for name, meaning in comments(base, tree).items() if meaning or name not in meanings
        }
        ranges.known |= vars(sys.modules[base.__module__])
        ranges.visit(tree)
    for field, hint in ((field, hints[field.name]) for field in dataclasses.fields(cls)):
        if not dataclasses.is_dataclass(getattr(defaults, field.name)):
            name, meaning = prefix + field.name, meanings[field.name]
            allowed = list(ranges.found.get(name, {}) if prefix else ())
            yield Setting(name, hint, names_of(meaning), allowed, getattr(defaults, field.name), meaning)


def values_of(hint: Any, names: Sequence[str], default: Any) -> str:
    """The values of a field: the names of its table (plus a default such as ``auto``), or its type."""
    if not names:
        return type_in_words(hint)
    if hint is str:
        return quoted(names if default in names else [default, *names])
    return f"list of {quoted(names)}" if typing.get_origin(hint) is list else f"weights of {quoted(names)}"


def comments(cls: type, tree: ast.ClassDef) -> dict[str, str]:
    """Field -> the comments beside and below it, up to the next statement of the class."""
    tokens = tokenize.generate_tokens(io.StringIO(inspect.getsource(cls)).readline)
    lines = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    starts = [
        min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) for node in tree.body
    ]
    return {
        node.target.id: " ".join(text for line, text in lines.items() if start <= line < after)
        for node, start, after in zip(tree.body, starts, [*starts[1:], sys.maxsize], strict=True)
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


class Ranges(ast.NodeVisitor):
    """The constant ranges that a class's checks ``require``, by dotted name.

    ``known`` are the names defined in its module; names that the checks assign or loop over are added.
    """

    def __init__(self, known: dict[str, Any]) -> None:
        self.known = known
        self.found: dict[str, dict[str, None]] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        if isinstance(node.targets[0], ast.Name):
            self.known[node.targets[0].id] = self.value(node.value)

    def visit_For(self, node: ast.For) -> None:
        for item in self.value(node.iter) or ():
            self.known[ast.unparse(node.target)] = item
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        called = ast.unparse(node.func)
        if called == "require":
            name, allowed = self.value(node.args[1]), self.value(node.args[3])
            if name and allowed:
                self.found.setdefault(name, {})[re.sub("^(an )?integers? of ", "", allowed)] = None
        elif called == "check_positive":
            for name in map(self.value, node.args[1:]):
                self.found.setdefault(f"model.{name}", {})["at least 1"] = None
        elif called.startswith("check_") and inspect.isfunction(self.known.get(called)):
            self.visit(ast.parse(inspect.getsource(self.known[called])))

    def value(self, node: ast.expr) -> Any:
        """The value of an expression of constants and known names; None for others."""
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Tuple):
            return [self.value(item) for item in node.elts]
        if isinstance(node, ast.JoinedStr):
            parts = [
                self.value(part.value if isinstance(part, ast.FormattedValue) else part)
                for part in node.values
            ]
            return None if None in parts else "".join(map(str, parts))
        return None


def names_of(meaning: str) -> list[str]:
    """The names in the tables that a comment mentions."""
    return [name for module, table in TABLE.findall(meaning) for name in table_keys(module, table)]


def table_keys(module: str, table: str) -> list[str]:
    """The keys of a table of this package, as imported (with added entries) or else from its source."""
    loaded = sys.modules.get(f"lit_transdiff.{module}")
    if loaded is not None:
        return list(getattr(loaded, table))
    place = PACKAGE.joinpath(*module.split("."))
    file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == table:
            assert isinstance(node.value, ast.Dict)
            return [str(ast.literal_eval(key)) for key in node.value.keys if key is not None]
    raise ValueError(f"{file}: has no table {table}.")


def as_yaml(value: Any) -> str:
    """A default as in a YAML file."""
    return value if isinstance(value, str) and value else json.dumps(value)


def settings_as_markdown() -> str:
    """The page of all settings."""
    parts = [SETTINGS_HEAD]
    for section, settings in all_settings().items():
        about = first_paragraph(NESTED[section] if section else RunConfig)
        parts.append(f"## {f'`{section}`' if section else 'The run'}\n\n{as_markdown(about)}")
        parts.append(settings_table(settings))
        parts += extra_tables(section)
        parts += family_tables() if section == "model" else []
    return "\n\n".join(parts) + "\n"


def settings_table(settings: Iterable[Setting]) -> str:
    rows = [(f"`{s.name}`", s.values, f"`{s.default}`", as_markdown(s.meaning)) for s in settings]
    return markdown_table(("setting", "values", "default", "meaning"), rows)


def family_tables() -> list[str]:
    """The section ``model`` of every other family."""
    parts = []
    for name, settings in family_settings().items():
        parts += [
            f"### `model.paradigm: {name}`",
            as_markdown(first_paragraph(PARADIGMS[name].settings)),
            settings_table(settings),
        ]
        if sizes := getattr(PARADIGMS[name].settings, "sizes", {}):
            parts += sizes_table(sizes)
    return parts


def sizes_table(sizes: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A table of the sizes of a family."""
    columns = list(next(iter(sizes.values())))
    rows = [(f"`{name}`", *map(str, size.values())) for name, size in sizes.items()]
    table = markdown_table(("`model.size`", *columns), rows)
    return ["Sizes (fields that are given take precedence):", table]


def extra_tables(section: str) -> list[str]:
    """The tables of sizes and presets."""
    if section == "model":
        return sizes_table(SIZES)
    if section == "sampling":
        rows = [
            (f"`{name}`", quoted(f"sampling.{key}={as_yaml(value)}" for key, value in preset.items()))
            for name, preset in PRESETS.items()
        ]
        return ["Presets of `sample` and `evaluate`:", markdown_table(("`--preset`", "sets"), rows)]
    return []


def first_paragraph(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def as_markdown(text: str) -> str:
    """Source text as Markdown in a table."""
    return text.replace("``", "`").replace("|", "\\|")


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def settings_as_text(word: str | None = None) -> str:
    """The settings for a terminal: all, a section's, a ``model.paradigm``'s, or one by its name.

    Raises ``ValueError`` for an unknown name.
    """
    everything = [setting for settings in all_settings().values() for setting in settings]
    families = family_settings()
    here = {setting.name for setting in everything}
    others = {s.name: s for settings in families.values() for s in settings if s.name not in here}
    everywhere = [*everything, *others.values()]
    chosen = [s for s in everything if word is None or s.name == word or s.name.startswith(f"{word}.")]
    chosen = chosen or families.get(word or "", [])
    chosen = chosen or [
        s for s in everywhere if word in (s.name, s.name.rsplit(".", 1)[-1])
    ]  # by its last word, wherever it is
    if not chosen:
        raise unknown("setting", word, [*NESTED, *families, *(setting.name for setting in everywhere)])
    lines = []
    for s in chosen:
        values, meaning = s.values.replace("`", ""), s.meaning.replace("``", "")
        for text in (f"{s.name} = {s.default}    ({values})", f"    {meaning}"):
            lines += textwrap.wrap(text, TERMINAL, subsequent_indent="    ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"
