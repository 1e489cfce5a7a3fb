"""The JSON schema of a recipe, with which an editor completes, explains and checks settings.

It is generated from the types, names, ranges, defaults and meanings of ``config.reference``. An editor sees
one file, so checks that span several settings or a ``base:`` are left to ``lit-transdiff train --dry-run``.
"""

from __future__ import annotations

import json
import re
import types
import typing
from typing import Any, Literal, Union

from lit_transdiff.config import NESTED, RunConfig
from lit_transdiff.config.reference import Setting, all_settings, family_settings, first_paragraph

DRAFT = "http://json-schema.org/draft-07/schema#"  # the draft supported by YAML editors
TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", types.NoneType: "null"}
REFERENCE = {"type": "string", "pattern": r"\$\{"}  # ${another.setting}, allowed for any value
BOUND = r"(-?[\d,]+(?:\.\d+)?)"
RANGES = {  # text of a range -> its bounds, in order
    rf"at least {BOUND}": ("minimum",),
    rf"at most {BOUND}": ("maximum",),
    rf"above {BOUND}": ("exclusiveMinimum",),
    rf"{BOUND} or more": ("minimum",),
    rf"{BOUND} to {BOUND}": ("minimum", "maximum"),
    rf"{BOUND} <= \w+ < {BOUND}": ("minimum", "exclusiveMaximum"),
}


def recipe_schema() -> dict[str, Any]:
    """The schema of a recipe: ``base:`` and every setting."""
    sections = all_settings()
    base = {
        "type": "string",
        "description": "a YAML file, relative to this one, whose settings this one changes",
    }
    properties = {"base": base} | properties_of(sections.pop(""))
    properties |= {
        name: {"description": first_paragraph(NESTED[name]), **mapping(s)} for name, s in sections.items()
    }
    others = properties_of([setting for settings in family_settings().values() for setting in settings])
    model = properties["model"]["properties"]
    model |= {
        name: schema for name, schema in others.items() if name not in model
    }  # those of model.paradigm, whatever it is
    about = {
        "$schema": DRAFT,
        "title": "A recipe of lit_transdiff",
        "description": first_paragraph(RunConfig),
    }
    return about | {"type": "object", "properties": properties, "additionalProperties": False}


def schema_as_json() -> str:
    """The file ``docs/recipe.schema.json``."""
    return json.dumps(recipe_schema(), indent=1) + "\n"


def mapping(settings: list[Setting]) -> dict[str, Any]:
    """The schema of a section."""
    return {"type": "object", "properties": properties_of(settings), "additionalProperties": False}


def properties_of(settings: list[Setting]) -> dict[str, Any]:
    """Last part of a name -> the schema of the setting."""
    return {setting.name.rsplit(".", 1)[-1]: property_of(setting) for setting in settings}


def property_of(setting: Setting) -> dict[str, Any]:
    """The schema of a setting, which also allows ``${another.setting}``."""
    value = value_of(setting.hint, setting.names) | bounds(setting)
    about = {
        "description": f"{setting.meaning} ({setting.values.replace('`', '')})",
        "default": setting.default_value,
    }
    return about | {"anyOf": [*value.pop("anyOf", [value]), REFERENCE]}


def value_of(hint: Any, names: list[str]) -> dict[str, Any]:
    """The schema of a type.

    Names of a table are suggested, not required, because ``imports:`` may add some.
    """
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return {"enum": list(parts)}
    if origin in (Union, types.UnionType):
        return {"anyOf": [value_of(part, names) for part in parts]}
    if origin is list:
        return {"type": "array", "items": value_of(parts[0], names)}
    if origin is dict:
        keys: dict[str, Any] = {name: {} for name in names}
        return {"type": "object", "properties": keys, "additionalProperties": value_of(parts[1], [])}
    if hint is str and names:
        return {"anyOf": [{"enum": names}, {"type": "string"}]}
    return {"type": TYPES[hint]}


def bounds(setting: Setting) -> dict[str, float]:
    """The bounds of a number, parsed from the text of its range."""
    if setting.hint not in (int, float):
        return {}
    limits: dict[str, float] = {}
    for words in setting.ranges:
        for pattern, names in RANGES.items():
            if match := re.fullmatch(pattern, re.sub(r" \(.*?\)", "", words)):
                limits |= {
                    name: json.loads(number.replace(",", ""))
                    for name, number in zip(names, match.groups(), strict=True)
                }
    return limits
