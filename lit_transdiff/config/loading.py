"""YAML files and overrides -> checked configurations, and back.

``load_run`` merges defaults <- size preset <- base <- file <- ``dotted.key=value`` overrides and refuses
unknown keys with the field's path, the value and the nearest match.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lit_transdiff.base.files import replace_file
from lit_transdiff.config import NESTED, PRESETS, RunConfig, errors_at, expanded, require, unknown
from lit_transdiff.config.imports import import_modules
from lit_transdiff.config.paradigms import settings_class
from lit_transdiff.config.typed import typed
from lit_transdiff.config.yaml_text import read, read_file

ENVIRONMENT = re.compile(r"\$\{([A-Z][A-Z0-9_]*)\}")  # settings are lower-case
SCHEMAS = (RunConfig, *NESTED.values())  # explained by lit-transdiff settings


def load_run(path: str | Path, overrides: Sequence[str] = (), imports: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML with its ``base:`` chain, apply ``dotted.key=value`` overrides, and validate it.

    The modules of its ``imports`` and of the argument are imported first.

    Raises ``FileNotFoundError`` for a missing file and ``ValueError`` for anything that is not a valid
    setting.
    """
    settings = read_yaml(path)
    if "runs" in settings:
        raise ValueError(f"{path} is a pipeline, a list of runs; start it with: lit-transdiff run {path}")
    settings = merge(settings, parse_overrides(overrides))
    if imports:
        settings["imports"] = list(dict.fromkeys([*(settings.get("imports") or []), *imports]))
    return run_from(settings, source=str(path))


def merge(*settings: Any) -> dict[str, Any]:
    """Merge nested settings, later ones over earlier ones; values other than sections are replaced."""
    merged: dict[str, Any] = {}
    for each in settings:
        merged = laid_over(merged, plain_settings(each))
    return merged


def laid_over(below: Any, above: Any) -> Any:
    """``above`` merged over ``below``."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: laid_over(below.get(key), value) for key, value in above.items()}


def run_from(settings: DictConfig | dict[str, Any], source: str = "settings") -> RunConfig:
    """A checked ``RunConfig`` from nested settings (of a YAML file, a checkpoint, or written in Python)."""
    with refusing(source):
        given = interpolated(plain_settings(settings))
        check_keys(given, RunConfig, "", source)
        imports, asked = (plain_settings(given).get(name) for name in ("imports", "model"))
    with errors_at(source):
        import_modules(
            imports if isinstance(imports, str | list) else typed(imports or [], list[str], "imports")
        )
        schema = settings_class(asked if isinstance(asked, dict) else {})
    check_keys(given, RunConfig, "", source, NESTED | {"model": schema})
    with errors_at(source), refusing():
        size = given["model"].get("size") if "model" in given else None
        model = schema(size=typed(size, str, "model.size")) if size else schema()  # type: ignore[call-arg]
        whole = interpolated(merge(to_dict(RunConfig(model=model)), given))
        if isinstance(whole, DictConfig):
            whole = OmegaConf.to_container(whole, resolve=True)  # type: ignore[assignment]
        run = typed(whole | {"model": typed(whole["model"], schema, "model")}, RunConfig, "")
    assert isinstance(run, RunConfig)
    return run


def interpolated(settings: dict[str, Any]) -> Any:
    """The settings in which each ``${key}`` reads as the value of that setting; unchanged without any."""
    return OmegaConf.create(of_environment(settings)) if refers(settings) else settings


def refers(value: Any) -> bool:
    """Whether nested settings contain a ``${key}``, or anything but the values of a YAML file."""
    if type(value) is dict:
        return any(type(key) is not str or refers(item) for key, item in value.items())
    if type(value) is list:
        return any(map(refers, value))
    return "${" in value if type(value) is str else type(value) not in (bool, int, float, type(None))


@contextmanager
def refusing(source: str = "") -> Iterator[None]:
    """Turn errors of OmegaConf, such as an undefined ``${key}``, into one line that names the setting."""
    try:
        yield
    except (OmegaConfBaseException, RecursionError) as error:
        name = ": ".join(part for part in (source, getattr(error, "full_key", None)) if part) or "?"
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        allowed = "${name} of another setting, as in ${output_dir}/x"
        raise ValueError(f"{name}: {reason}; allowed: {allowed}.") from error


def read_yaml(path: str | Path, above: Sequence[Path] = (), *, spelled: bool = True) -> dict[str, Any]:
    """The settings of a YAML file merged over those of its ``base:`` (a path relative to the file).

    ``above`` are the files with this base; ``spelled`` as in ``Spelled``. Raises ``ValueError`` for a cycle.
    """
    path = Path(path)
    chain, asked = [*above, path], f"{above[-1]}: base" if above else "the YAML of a run"
    loop = f"a file that is not its own base, as in {' -> '.join(map(str, chain))}"
    require(path.resolve() not in map(Path.resolve, above), asked, str(path), loop)
    require(not path.is_dir(), asked, str(path), "a file, not a folder")
    if not path.is_file():
        nearby = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        prefix = f"{asked}: " if above else ""
        hint = f" In that folder: {', '.join(nearby)}." if nearby else ""
        raise FileNotFoundError(f"{prefix}{path} does not exist.{hint}")
    given = read_file(path, spelled=spelled)
    if not isinstance(given, dict):
        raise ValueError(
            f"{path}: expected settings (key: value), got {'nothing' if given is None else repr(given)[:80]}."
        )
    base = given.pop("base", None)
    with refusing(str(path)):
        interpolated(given)
    if base is None:
        return given
    allowed = "the path of one YAML file, relative to this one"
    require(isinstance(base, str) and base != "", f"{path}: base", base, allowed)
    return merge(read_yaml(path.parent / expanded(base, f"{path}: base"), chain, spelled=spelled), given)


def of_environment(settings: Any) -> Any:
    """Rewrite ``${NAME}`` of the environment for OmegaConf, where ``${name}`` is another setting."""
    if isinstance(settings, dict):
        return {key: of_environment(value) for key, value in settings.items()}
    if isinstance(settings, list):
        return [of_environment(value) for value in settings]
    return ENVIRONMENT.sub(r"${oc.env:\1}", settings) if isinstance(settings, str) else settings


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """``["model.width=192", ...]`` as nested settings; the word None (sent by W&B sweeps) becomes None."""
    settings: dict[str, Any] = {}
    for item in overrides:
        key, sign, text = item.partition("=")
        words = key.split(".")
        require(sign == "=" and all(words) and not item.startswith("-"), "override", item, "dotted.key=value")
        value = without_none(read(text, f"override {item}", spelled=True))
        for word in reversed(words):
            value = {word: value}
        with refusing(f"override {item}"):
            interpolated(value)
        settings = merge(settings, value)
    return settings


def without_none(value: Any) -> Any:
    """Nested settings with the word None replaced by None."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_none(item) for item in value]
    return None if value == "None" else value


def check_keys(
    given: Any, schema: type, prefix: str, source: str, nested: Mapping[str, type] = MappingProxyType({})
) -> None:
    """Refuse unknown keys, with the nearest match, also in the ``nested`` sections."""
    if not isinstance(given, DictConfig | dict):
        raise ValueError(f"{source}: {prefix.rstrip('.')}: got {given!r}; expected settings (key: value).")
    fields = {f.name: f for f in dataclasses.fields(schema)}
    for key in given:
        if key not in fields:
            explained = (
                f" Explained by: lit-transdiff settings {prefix[:-1]}".rstrip() if schema in SCHEMAS else ""
            )
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


def plain_settings(settings: Any) -> dict[str, Any]:
    """Nested settings as plain dictionaries and lists."""
    result = OmegaConf.to_container(settings) if OmegaConf.is_config(settings) else settings
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """The value of a dotted name in nested settings."""
    for part in name.split("."):
        settings = settings[part]
    return settings


def resolved(settings: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The settings with these ``names``, with each ``${key}`` replaced by its value.

    Raises ``ValueError`` for an undefined ``${key}``.
    """
    with refusing():
        whole = OmegaConf.create(of_environment(settings))
        result = OmegaConf.to_container(OmegaConf.masked_copy(whole, list(names)), resolve=True)
    assert isinstance(result, dict)
    return {str(key): value for key, value in result.items()}


def preset(name: str | None) -> list[str]:
    """The settings of a sampling preset as overrides; [] without a name."""
    return [] if name is None else [f"sampling.{key}={value}" for key, value in PRESETS[name].items()]


def override(run: RunConfig, overrides: Sequence[str], sections: Sequence[str]) -> RunConfig:
    """``run`` with ``dotted.key=value`` overrides, allowed only in some ``sections``."""
    changes = parse_overrides(overrides)
    for key in changes:
        allowed = ", ".join(f"{name}.*" for name in sections)
        require(str(key) in sections, "override", str(key), f"{allowed} for a trained model")
    return run_from(merge(to_dict(run), changes), source="overrides")
