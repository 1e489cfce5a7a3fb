"""Runs at a W&B server that does not answer, or answers with an error: a bounded wait, and one line with a
way on.
"""

from __future__ import annotations

import time

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.study.runs import runs
from tests.helpers.wandb_stub import Stub

HANGS = 0  # a server that takes questions and does not answer


@pytest.fixture
def kept(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> Stub:
    """A server with one run, which has a row and a picture."""
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", "6")
    run = stub.state.run("p", "r")
    picture = {"_type": "image-file", "path": "media/images/samples.png"}
    run["history"] = [{"_step": 0, "trainer/global_step": 1, "train/loss": 1.0, "samples": picture}]
    stub.state.files["/run_files/p/r/media/images/samples.png"] = b"no picture"
    return stub


@pytest.mark.parametrize(
    "trouble", [HANGS, pytest.param(401, marks=pytest.mark.slow), pytest.param(500, marks=pytest.mark.slow)]
)
def test_a_project_is_not_waited_for(kept: Stub, trouble: int, capsys: pytest.CaptureFixture[str]) -> None:
    kept.server.trouble = trouble
    start = time.monotonic()
    assert main(["report", "team/p"]) == 2 and time.monotonic() - start < 60
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lit-transdiff:")]
    assert "team/p is neither a folder nor a project at W&B" in line


def test_what_the_client_waits_for_without_end_is_one_line(kept: Stub) -> None:
    run, other = runs("team/p")[0], runs("team/p")[0]
    assert list(other.history()["train/loss"]) == [1.0]
    kept.server.trouble = HANGS
    start = time.monotonic()
    with pytest.raises(
        ConnectionError, match=r"W&B does not give the metrics of r \(no answer in 6 s\)\. Try again later"
    ):
        run.history()
    with pytest.raises(
        ConnectionError, match=r"W&B does not give the picture media/images/samples\.png of r"
    ):
        other.samples()
    assert time.monotonic() - start < 60
    kept.server.trouble = None
    assert list(runs("team/p")[0].history()["train/loss"]) == [1.0]  # the service is another


@pytest.mark.parametrize("said", ["abc", "0", "-1", "inf"])
def test_a_wait_that_is_none_is_refused(kept: Stub, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    monkeypatch.setenv("WANDB_HTTP_TIMEOUT", said)
    with pytest.raises(
        FileNotFoundError, match=f"WANDB_HTTP_TIMEOUT: got '{said}'; allowed: seconds above 0"
    ):
        runs("team/p")
