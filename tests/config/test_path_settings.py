"""``~`` and variables in paths are replaced or refused, and files of the package are
found from any folder.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.cli.pipeline import read_pipeline
from lit_transdiff.config import RunConfig, expanded, shipped
from lit_transdiff.config.loading import load_run, run_from
from tests.helpers.small import ROOT


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SCRATCH", str(tmp_path / "scratch"))
    monkeypatch.delenv("NOTHING", raising=False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "found"),
    [("~/runs", "home/runs"), ("$SCRATCH/runs", "scratch/runs"), ("${SCRATCH}/x/runs", "scratch/x/runs")],
)
def test_paths_of_settings_are_expanded(home: Path, given: str, found: str):
    run = run_from(
        {"output_dir": given, "data": {"train": "${output_dir}/shards"}, "evaluation": {"reference": given}}
    )
    assert run.output_dir == run.evaluation.reference == str(home / found)
    assert run.data.train == str(home / found / "shards")
    (home / "here" / "pipeline.yaml").write_text(
        f"output_dir: {given}\ncache: [{{source: '{given}/a', dest: latents}}]\nruns: [{{recipe: a.yaml}}]\n"
    )
    pipeline = read_pipeline("pipeline.yaml", [])
    assert pipeline.output_dir == str(home / found) and pipeline.cache[0].source == str(home / found / "a")
    if "{" not in given:  # written in Python, there is no other setting that it could name
        assert RunConfig(output_dir=given).folder == home / found / "run"


@pytest.mark.parametrize("given", ["$NOTHING/runs", "${NOTHING}/runs", "~nobody-of-this-name/runs"])
def test_what_stands_for_nothing_is_refused_by_name(home: Path, given: str):
    with pytest.raises(ValueError, match=r"output_dir|NOTHING"):
        run_from({"output_dir": given})
    assert not list((home / "here").iterdir())


def test_names_that_exist_and_urls_are_what_they_say(home: Path):
    (home / "here" / "cost$5").mkdir()
    for name in ("cost$5", "pipe:cat $NOTHING", "https://a.b/~c/x-{000..012}.tar", "data/~x", "a~"):
        assert expanded(name, "x") == name
    assert expanded("~/x-{000..012}.tar", "x") == str(home / "home" / "x-{000..012}.tar")


def test_options_are_expanded(home: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["compare", "~/runs", "--output=$NOTHING/x"]) == 2
    assert capsys.readouterr().err.startswith(
        "lit-transdiff: output: got '$NOTHING/x'; allowed: variables that are set; $NOTHING"
    )
    assert not list((home / "here").iterdir())


@pytest.mark.parametrize("dest", ["../outside", "/outside", "a/../../b"])
def test_a_cache_lies_below_its_pipeline(home: Path, dest: str):
    Path("pipeline.yaml").write_text(f"cache: [{{source: a, dest: {dest}}}]\nruns: [{{recipe: a.yaml}}]\n")
    with pytest.raises(ValueError, match=r"cache\[0\]\.dest"):
        read_pipeline("pipeline.yaml", [])


def test_what_is_shipped_is_found_from_any_folder(home: Path):
    run = load_run(shipped("experiments/fashion/ar_pretrain.yaml"))
    assert run.autoencoder.path == str(ROOT / "data/fashion/autoencoder") and run.output_dir == "runs/fashion"
    assert shipped("experiments/none.yaml") == "experiments/none.yaml" and shipped("tests") == "tests"
    (home / "here" / "data").mkdir()
    assert shipped("data") == "data"
    assert RunConfig(output_dir="experiments").output_dir == "experiments"
