"""YAML means what it looks like: in a recipe, on the command line, in a sweep's file and in what earlier
versions wrote.
"""

import math
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_transdiff.cli.pipeline import load_pipeline
from lit_transdiff.config.loading import load_run, parse_overrides, run_from, save_yaml
from lit_transdiff.config.typed import typed
from lit_transdiff.config.yaml_text import dump, number_of, read, read_file
from lit_transdiff.study.folders import read_folder
from lit_transdiff.sweep.file import load_sweep

NO = "refused"
# What is written: as an integer (seed), a number (stall_seconds), true or false (compile), and text (name).
SCALARS: list[tuple[str, Any, Any, Any, Any]] = [
    ("10", 10, 10.0, NO, "10"),
    ("010", 10, 10.0, NO, "010"),
    ("0", 0, 0.0, NO, "0"),
    ("1", 1, 1.0, NO, "1"),
    ("08", 8, 8.0, NO, "08"),
    ("+10", 10, 10.0, NO, "+10"),
    ("-0", 0, 0.0, NO, "-0"),
    ("  10  ", 10, 10.0, NO, "10"),
    ("1_000", 1000, 1000.0, NO, "1_000"),
    ("1e3", 1000, 1000.0, NO, "1e3"),
    ("1E+3", 1000, 1000.0, NO, "1E+3"),
    ("10.0", 10, 10.0, NO, "10.0"),
    ("1.10", NO, 1.1, NO, "1.10"),
    ("10.5", NO, 10.5, NO, "10.5"),
    (".5", NO, 0.5, NO, ".5"),
    ("1.", 1, 1.0, NO, "1."),
    ("1e-4", NO, 1e-4, NO, "1e-4"),
    ("1.e-4", NO, 1e-4, NO, "1.e-4"),
    ("1.0e-05", NO, 1e-5, NO, "1.0e-05"),
    ('"10"', 10, 10.0, NO, "10"),
    ('"010"', 10, 10.0, NO, "010"),
    ('" 10 "', NO, NO, NO, " 10 "),
    ("0x10", NO, NO, NO, "0x10"),
    ("0o10", NO, NO, NO, "0o10"),
    ("0b10", NO, NO, NO, "0b10"),
    ("1:00", NO, NO, NO, "1:00"),
    ("1:30.5", NO, NO, NO, "1:30.5"),
    ("1__0", NO, NO, NO, "1__0"),
    ("1_", NO, NO, NO, "1_"),
    ("1,000", NO, NO, NO, "1,000"),
    ("1 000", NO, NO, NO, "1 000"),
    ("\uff11\uff10", NO, NO, NO, "\uff11\uff10"),
    ("inf", NO, NO, NO, "inf"),
    ("nan", NO, NO, NO, "nan"),
    (".inf", NO, math.inf, NO, ".inf"),
    ("1e999", NO, NO, NO, "1e999"),
    ("1e-99999999999999999999", NO, 0.0, NO, "1e-99999999999999999999"),
    ("9" * 30, NO, NO, NO, "9" * 30),
    ("9" * 5000, NO, NO, NO, "9" * 5000),
    ("true", NO, NO, True, "true"),
    ("True", NO, NO, True, "True"),
    ("FALSE", NO, NO, False, "FALSE"),
    ("on", NO, NO, NO, "on"),
    ("Off", NO, NO, NO, "Off"),
    ("yes", NO, NO, NO, "yes"),
    ("no", NO, NO, NO, "no"),
    ("y", NO, NO, NO, "y"),
    ("null", NO, NO, NO, NO),
    ("~", NO, NO, NO, NO),
    ("", NO, NO, NO, NO),
    ("2026-11-27", NO, NO, NO, "2026-11-27"),
    ("[1]", NO, NO, NO, NO),
    ("{a: 1}", NO, NO, NO, NO),
    ("=", NO, NO, NO, "="),
    ("!!int 010", NO, NO, NO, NO),
    ("!!python/name:os.system", NO, NO, NO, NO),
]


HINTS = {"seed": int, "safety.stall_seconds": float, "training.compile": bool, "name": str}
BOTH_WAYS = (
    "010",
    "1:00",
    "1e3",
    "on",
    "true",
    "null",
    "1.10",
    "!!int 010",
    "",
)  # also through a file and the command line


def check(field: str, wanted: Any, make: Callable[[], Any]) -> None:
    if wanted is NO:
        with pytest.raises(ValueError, match=rf"{field}|is not YAML.*\(line 2\)") as error:
            make()
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
    else:
        found = make()
        assert found == wanted and type(found) is type(wanted)


@pytest.mark.parametrize("row", SCALARS, ids=[repr(row[0])[:20] for row in SCALARS])
def test_a_scalar_is_what_it_looks_like_or_refused(row: tuple[str, Any, Any, Any, Any]):
    text, *wanted = row
    for (field, hint), value in zip(HINTS.items(), wanted, strict=True):
        check(field, value, lambda f=field, h=hint: typed(read(text, f, spelled=True), h, f))


@pytest.mark.parametrize("row", [row for row in SCALARS if row[0] in BOTH_WAYS], ids=lambda row: repr(row[0]))
def test_it_is_so_in_a_file_and_on_the_command_line(tmp_path: Path, row: tuple[str, Any, Any, Any, Any]):
    text, *wanted = row
    path = tmp_path / "run.yaml"
    for field, value in zip(HINTS, wanted, strict=True):
        section, _, name = field.rpartition(".")
        path.write_text(
            f"# a recipe\n{section}: {{{name}: {text}}}\n" if section else f"# a recipe\n{name}: {text}\n"
        )
        check(field, value, lambda f=field: attrgetter(f)(load_run(path)))
        check(field, value, lambda f=field: attrgetter(f)(run_from(parse_overrides([f"{f}={text}"]))))


@pytest.mark.parametrize("word", [".inf", "-.inf", ".nan", ".NaN"])
def test_numbers_that_are_not_finite_are_refused_by_name(word: str):
    with pytest.raises(ValueError, match=r"optimizer\.weight_decay: got -?(inf|nan); allowed: "):
        run_from(parse_overrides([f"optimizer.weight_decay={word}"]))


@pytest.mark.parametrize(
    "word",
    ["08", "1e3", "1e+16", "1_000", "0o10", "True", "on", "null", "~", "", ".inf", "2026-11-27", "1:00"],
)
def test_text_that_looks_like_something_else_is_written_in_quotes(tmp_path: Path, word: str):
    assert read(dump({"a": [word]}), "x") == yaml.safe_load(dump({"a": [word]})) == {"a": [word]}
    run = run_from({"tracking": {"tags": [word], "group": word}, "optimizer": {"lr": 1e-5, "eps": 1.5e-20}})
    save_yaml(run, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run


def test_numbers_of_every_size_are_read_back():
    for number in (1e-5, 1e16, 1.5e300, 0.1, 123456789, -3, 2**62, 5e-324):
        assert read(dump([number]), "x") == [number] and number_of(repr(number)) == number
    assert math.isinf(read("-.inf", "x"))


def test_what_earlier_versions_wrote_reads_as_before(tmp_path: Path):
    text = (
        "name: '010'\nstage: ar_pretrain\noptimizer:\n  lr: 1.0e-05\n  betas:\n  - 0.9\n  - "
        "0.95\ntraining:\n  max_steps: 7\n"
    )
    (tmp_path / "config.yaml").write_text(
        text + "tracking:\n  wandb: false\n  group: null\n  tags:\n  - 'on'\n"
    )
    (tmp_path / "metrics.csv").write_text("")
    found = read_folder(tmp_path)
    assert found.config == yaml.safe_load((tmp_path / "config.yaml").read_text())
    run = load_run(tmp_path / "config.yaml")
    assert (run.name, run.optimizer.lr, run.tracking.tags, run.tracking.group) == ("010", 1e-5, ["on"], None)


def test_numbers_of_a_sweep(tmp_path: Path):
    spec = (
        "lr: {distribution: log_uniform_values, min: 1e-4, max: 1.e-2}\n  seed: {values: [008, 009, 010]}\n  "
        "name: {values: [on]}"
    )
    (tmp_path / "sweep.yaml").write_text(f"method: random\nprogram: x\nparameters:\n  {spec}\n")
    parameters = load_sweep(tmp_path / "sweep.yaml").parameters
    assert parameters["lr",] == {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-2}
    assert parameters["seed",] == {"values": [8, 9, 10]} and parameters["name",] == {"values": ["on"]}


def test_anchors_and_merge_keys_work():
    text = "a: &x {p: 1, q: 2}\nb: {<<: *x, q: 3}\nc: *x\nd: {<<: [*x, {r: 4}]}"
    given = read(text, "x")
    assert (
        given["b"] == {"p": 1, "q": 3}
        and given["c"] == {"p": 1, "q": 2}
        and given["d"] == {"p": 1, "q": 2, "r": 4}
    )


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BROKEN: list[tuple[bytes, str]] = [
    (b"seed: 1\nseed: 2", r"run\.yaml is not YAML: .*the key 'seed' twice \(line 2\)"),
    (BOMB.encode(), r"run\.yaml is not YAML: .*200,000 values"),
    (b"a: &a [*a]", r"run\.yaml is not YAML: .*contains itself"),
    (b"a: " + b"[" * 500 + b"]" * 500, r"run\.yaml is not YAML: .*60 levels"),
    (b"a: " + b"[" * 90_000, r"run\.yaml is not YAML"),
    (b"? [a]\n: 1", r"a key that is no word"),
    (b"3: 1", r"setting 3: '3' is not known"),
    (b"null: 1", r"setting null: 'null' is not known"),
    ("name: b\u00e4r".encode("latin-1"), r"run\.yaml: line 1: got the byte 0xe4; allowed: text in UTF-8"),
    (b"seed: 1\nname: \xff", r"run\.yaml: line 2: got the byte 0xff"),
    (b"name: a\0b", r"run\.yaml is not YAML"),
    (b"model:\n\twidth: 3", r"run\.yaml is not YAML: .*\(line 2\)"),
    (b"a: 1\n---\nb: 2", r"run\.yaml is not YAML"),
    (b"name: !!python/object/apply:os.system [ls]", r"run\.yaml is not YAML"),
    (b"name: @x", r"run\.yaml is not YAML: .*quotes"),
    (b"", r"run\.yaml: expected settings \(key: value\), got nothing"),
    (b"# only words", r"got nothing"),
    (b"just words", r"run\.yaml: expected settings \(key: value\), got 'just words'"),
    (b"[1, 2]", r"expected settings"),
    (b"model: null", r"run\.yaml: model: got None; expected settings"),
    (b"model: {width: null}", r"run\.yaml: model\.width: got None; allowed: integer"),
    (b"name: ${nope}", r"run\.yaml: name: .*nope"),
    (b"name: ${", r"run\.yaml: name: .*allowed: \$\{name\} of another setting"),
    (b"name: ${name}", r"run\.yaml: name: .*ecursive"),
    (b"name: ${nope:1}", r"run\.yaml: name: .*nope"),
    (b"model: {size: [base]}", r"run\.yaml: model\.size: got \['base'\]; allowed: text"),
    (b"optimizer: {betas: 0.9}", r"optimizer\.betas: got 0\.9; allowed: list of numbers"),
    (b"optimizer: {betas: [0.9, high]}", r"optimizer\.betas\[1\]: got 'high'"),
    (b"optimizer: {betas: {a: 1}}", r"optimizer\.betas: got \{'a': 1\}"),
    (b"data: {crop: centre}", r"data\.crop: got 'centre'; allowed: none, center, .*did you mean center"),
    (b"base: [a.yaml]", r"run\.yaml: base: got \['a\.yaml'\]; allowed: the path of one YAML file"),
    (b"base: 3", r"run\.yaml: base: got 3; allowed"),
    (b"base: {a: 1}", r"run\.yaml: base: got"),
    (b"base: ''", r"run\.yaml: base: got ''"),
    (b"base: run.yaml", r"run\.yaml: base: got '.*run\.yaml'; allowed: a file that is not its own base"),
    (b"base: ./sub/../run.yaml", r"run\.yaml: base: got"),
    (
        b"base: other.yaml",
        r"third\.yaml: base: got .*its own base, as in .*run\.yaml -> .*other\.yaml -> .*run\.yaml",
    ),
    (b"base: .", r"run\.yaml: base: got '.*'; allowed: a file, not a folder"),
]


@pytest.mark.parametrize("content, message", BROKEN, ids=[repr(row[0])[:30] for row in BROKEN])
def test_a_broken_recipe_is_refused_in_one_line(tmp_path: Path, content: bytes, message: str):
    (tmp_path / "sub").mkdir()
    (tmp_path / "other.yaml").write_text("base: third.yaml")
    (tmp_path / "third.yaml").write_text("base: run.yaml")
    (tmp_path / "run.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_run(tmp_path / "run.yaml")
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


def test_a_base_that_is_not_there_is_named_with_the_file_that_asks_for_it(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("base: rnu.yaml")
    with pytest.raises(
        FileNotFoundError, match=r"run\.yaml: base: .*rnu\.yaml does not exist\. In that folder: .*run\.yaml"
    ):
        load_run(tmp_path / "run.yaml")


def test_a_base_may_be_the_base_of_two(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("seed: 3")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nname: b")
    (tmp_path / "c.yaml").write_text("base: b.yaml")
    assert (load_run(tmp_path / "c.yaml").seed, load_run(tmp_path / "c.yaml").name) == (3, "b")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_files_with_a_mark_are_read(tmp_path: Path, encoding: str):
    (tmp_path / "run.yaml").write_bytes("name: b\u00e4r\r\nseed: 3\r\n".encode(encoding))
    run = load_run(tmp_path / "run.yaml")
    assert (run.name, run.seed) == ("b\u00e4r", 3)


def test_a_file_that_is_no_text_is_not_read_whole(tmp_path: Path):
    with open(tmp_path / "run.yaml", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(
        ValueError, match=r"run\.yaml: got 1,099,511,627,776 bytes; allowed: settings as text"
    ):
        read_file(tmp_path / "run.yaml")


@pytest.mark.parametrize(
    "item, message",
    [
        ("name=[", r"override name=\[ is not YAML"),
        ("name=a: b: c", "override name=a: b: c is not YAML"),
        ("name=@x", "override name=@x is not YAML"),
        ("=3", "override: got '=3'"),
        ("a..b=3", r"override: got 'a\.\.b=3'"),
        ("seed.x=3", r"seed: got \{'x': 3\}; allowed: integer"),
        ("name=${", r"override name=\$\{: "),
    ],
)
def test_a_broken_override_is_refused_in_one_line(item: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        run_from(parse_overrides([item]))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("runs: 3", r"runs: got 3; allowed: list of settings"),
        ("runs: [a.yaml]", r"runs\[0\]"),
        ("runs: [{}]", r"runs\[0\]\.recipe: got None; allowed: text"),
        ("runs: [{recipe: a.yaml, overrides: x}]", r"runs\[0\]\.overrides: got 'x'; allowed: list of names"),
        (
            "runs: [{recipe: a.yaml}]\nsamples_per_class: many",
            r"samples_per_class: got 'many'; allowed: integer",
        ),
        (
            "runs: [{recipe: a.yaml}]\ncache: [{source: a, dest: b, flips: on}]",
            r"cache\[0\]\.flips: got 'on'; allowed: true or false",
        ),
        ("runs: null", r"runs: got None"),
    ],
)
def test_a_broken_pipeline_is_refused_in_one_line(tmp_path: Path, text: str, message: str):
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_pipeline(tmp_path / "pipeline.yaml")
    assert "pipeline.yaml" in str(error.value) and "\n" not in str(error.value)
