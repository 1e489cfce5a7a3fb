"""YAML files and overrides -> checked configurations, and back.

``load_run`` merges defaults <- size preset <- base <- file <- ``dotted.key=value`` overrides and refuses anything it does not
know, with the field's path, the value, and the nearest match.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_transdiff.base.files import replace_file
from lit_transdiff.config import NESTED, PRESETS, ModelConfig, RunConfig, require, unknown
from lit_transdiff.config.imports import import_modules

SCHEMAS = (RunConfig, *NESTED.values())  # of which lit-transdiff settings knows every field


def load_run(path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML (with its ``base:`` chain), apply ``dotted.key=value`` overrides, and check the whole.

    The modules of its ``imports``, to which those given here are added, are imported first.

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` for anything that is not a valid setting.
    """
    settings = read_yaml(path)
    if "runs" in settings:
        raise ValueError(f"{path} is a pipeline, a list of runs; start it with: lit-transdiff run {path}")
    settings = merge(settings, parse_overrides(overrides))
    if imports:
        settings["imports"] = list(dict.fromkeys([*(settings.get("imports") or []), *imports]))
    return run_from(settings, source=str(path))


def merge(*settings: Any) -> DictConfig:
    """Nested settings, the later over the earlier."""
    merged = OmegaConf.merge(*settings)
    assert isinstance(merged, DictConfig)
    return merged


def run_from(settings: DictConfig | dict[str, Any], source: str = "settings") -> RunConfig:
    """A checked ``RunConfig`` from nested settings (of a YAML file, a checkpoint, or written in Python)."""
    given = OmegaConf.create(settings)
    check_keys(given, RunConfig, "", source)
    name = given.get("name", "")
    quoted = "a word; in quotes where YAML takes it for something else, as in name='\"on\"'"
    require(isinstance(name, str), f"{source}: name", name, quoted)
    import_modules(plain(given).get("imports") or [])
    size = OmegaConf.select(given, "model.size")
    try:
        model = ModelConfig(size=size) if size else ModelConfig()
        run = OmegaConf.to_object(merge(OmegaConf.structured(RunConfig(model=model)), given))
        assert isinstance(run, RunConfig)
        return run
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        value = OmegaConf.select(given, key) if key != "?" else None
        raise ValueError(f"{source}: {key}: got {value!r}; {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def read_yaml(path: str | Path) -> DictConfig:
    """The settings of a YAML file merged over those of its ``base:`` (a path relative to the file)."""
    path = Path(path)
    require(not path.is_dir(), "the YAML of a run", str(path), "a file, not a folder")
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} does not exist." + (f" In that folder: {', '.join(nearby)}." if nearby else ""))
    try:
        settings = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, DictConfig):
        raise ValueError(f"{path}: expected settings (key: value), got a {type(settings).__name__}.")
    base = settings.pop("base", None)
    return settings if base is None else merge(read_yaml(path.parent / base), settings)


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """``["model.width=192", ...]`` as nested settings; the word None (which W&B sweeps send) means nothing."""
    for item in overrides:
        require("=" in item and not item.startswith("-"), "override", item, "dotted.key=value")
    return OmegaConf.create(without_none(plain(OmegaConf.from_dotlist(list(overrides)))))


def without_none(value: Any) -> Any:
    """Nested settings with the word None, which Python writes for nothing, as nothing."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return None if value == "None" else value


def check_keys(given: Any, schema: type, prefix: str, source: str) -> None:
    """Refuse a key that the dataclass does not have, naming the nearest one that it has."""
    if not isinstance(given, DictConfig | dict):
        raise ValueError(f"{source}: {prefix.rstrip('.')}: got {given!r}; expected settings (key: value).")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    nested = NESTED if schema is RunConfig else {}
    for key in given:
        if key not in fields:
            explained = f" Explained by: lit-transdiff settings {prefix[:-1]}".rstrip() if schema in SCHEMAS else ""
            raise ValueError(f"{source}: {unknown(f'setting {prefix}{key!s}', key, fields)}{explained}")
        if key in nested:
            check_keys(given[key], nested[str(key)], f"{prefix}{key!s}.", source)


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain nested dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def to_yaml(config: Any) -> str:
    """A configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))


def save_yaml(config: Any, path: str | Path) -> None:
    """Write a configuration so that ``load_run`` reads back an equal one."""
    replace_file(Path(path), to_yaml(config).encode())


def plain(settings: Any) -> dict[str, Any]:
    """Nested settings as plain dictionaries and lists."""
    result = OmegaConf.to_container(settings)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def resolved(settings: DictConfig, names: Sequence[str]) -> dict[str, Any]:
    """The settings of these ``names``, each ``${key}`` in them replaced by what stands at ``key``.

    Raises ``ValueError`` for a ``${key}`` that stands for nothing.
    """
    try:
        result = OmegaConf.to_container(OmegaConf.masked_copy(settings, list(names)), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{getattr(error, 'full_key', None) or '?'}: {str(error).splitlines()[0]}") from error
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def preset(name: str | None) -> list[str]:
    """The settings of a sampler's name as overrides; none without a name."""
    return [] if name is None else [f"sampling.{key}={value}" for key, value in PRESETS[name].items()]


def override(run: RunConfig, overrides: Sequence[str], sections: Sequence[str]) -> RunConfig:
    """``run`` with ``dotted.key=value`` overrides of some of its sections only."""
    given = parse_overrides(overrides)
    for key in given:
        allowed = ", ".join(f"{name}.*" for name in sections)
        require(str(key) in sections, "override", str(key), f"{allowed} for a trained model")
    return run_from(merge(OmegaConf.create(to_dict(run)), given), source="overrides")
