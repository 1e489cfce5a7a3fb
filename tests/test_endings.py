"""How commands end when they are asked to, and when something is wrong."""

import os
import signal
import time
from pathlib import Path

import pytest

from lit_transdiff import pipeline, trainer
from lit_transdiff.__main__ import main
from lit_transdiff.distributed.preemption import stop_request
from lit_transdiff.endings import EXIT_REQUEUE, STOP_SIGNALS, Preempted, ending_when_asked
from lit_transdiff.loading import save_yaml
from tests.small import small_run


def asked(number: signal.Signals) -> None:
    """What takes long, and is signalled in it; libraries in between catch what they can."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    except Exception:
        pytest.fail("kept by a library")


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("during", ["set-up", "evaluation"])
def test_a_signal_outside_the_steps_asks_for_a_requeue(
    tmp_path: Path, during: str, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    save_yaml(small_run(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setattr(pipeline, "train", lambda run: None)
    monkeypatch.setattr(pipeline, "load_generator", lambda *arguments: asked(number))
    monkeypatch.setattr(trainer, "build", lambda run: asked(number))
    options = ["--evaluate"] if during == "evaluation" else []
    start = time.monotonic()
    assert main(["train", str(tmp_path / "run.yaml"), *options]) == EXIT_REQUEUE
    assert time.monotonic() - start < 4
    assert f"asked to stop ({number.name}): the same command goes on" in capsys.readouterr().err
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


def test_a_signal_after_the_last_step_is_not_lost() -> None:
    with pytest.raises(Preempted, match="SIGUSR1"), ending_when_asked(), stop_request() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.received == "SIGUSR1"  # between two steps it would be looked at
