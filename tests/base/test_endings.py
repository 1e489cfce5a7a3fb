"""How commands end when they are asked to, and when something is wrong."""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.base.endings import (
    EXIT_INTERRUPTED,
    EXIT_REQUEUE,
    STOP_SIGNALS,
    Preempted,
    ending_when_asked,
)
from lit_transdiff.cli import commands, pipeline
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.training import trainer
from lit_transdiff.training.preemption import stop_request
from tests.helpers.small import ROOT, small_run


def asked(number: signal.Signals) -> None:
    """A long task that is interrupted by a signal; libraries in between catch any exception that they can."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(5)
    except Exception:
        pytest.fail("kept by a library")


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("during", ["set-up", "evaluation"])
def test_a_signal_outside_the_steps_asks_for_a_requeue(
    tmp_path: Path,
    during: str,
    number: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = [signal.getsignal(one) for one in STOP_SIGNALS]
    save_yaml(small_run(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setattr(pipeline, "check_evaluation", lambda *settings, **options: None)
    monkeypatch.setattr(pipeline, "train", lambda run: None)
    monkeypatch.setattr(pipeline, "load_generator", lambda *arguments: asked(number))
    monkeypatch.setattr(trainer, "build", lambda run, **own: asked(number))
    options = ["--evaluate"] if during == "evaluation" else []
    start = time.monotonic()
    code = EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_REQUEUE
    assert main(["train", str(tmp_path / "run.yaml"), *options]) == code
    assert time.monotonic() - start < 4
    assert f"asked to stop ({number.name}): the same command goes on" in capsys.readouterr().err
    assert [signal.getsignal(one) for one in STOP_SIGNALS] == before


@pytest.mark.parametrize(
    "command", ["sample --checkpoint x", "index x", "verify x", "convert a b", "export x", "compare x"]
)
def test_ctrl_c_ends_any_command_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = command.split()

    def long(args: object) -> None:
        asked(signal.SIGINT)

    long.__name__ = f"{name}_command"
    monkeypatch.setattr(commands, long.__name__, long)
    assert main([name, *words]) == EXIT_INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "lit-transdiff: asked to stop (SIGINT): nothing is finished; the same command begins anew."


def test_a_signal_in_a_finalizer_is_not_lost() -> None:
    """Python drops exceptions that are raised in a finalizer."""

    class Slow:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Preempted, match="SIGTERM"), ending_when_asked():
        Slow()
        for _ in range(500):
            time.sleep(0.01)


TWICE = """
import os, signal, sys, threading, time
from lit_transdiff.base.endings import Preempted, ending_when_asked

def press(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()

with ending_when_asked(lambda number, frame: print("first", flush=True)):
    for seconds in (0.1, 0.2, {second}):  # a terminal and a launcher both send the first
        press(seconds)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    signal.sigtimedwait([signal.SIGUSR2], 4)
    threading.Event().wait(0.1)
    print("waited to the end", flush=True)
"""


@pytest.mark.parametrize("second, code", [(1.6, EXIT_INTERRUPTED), (0.5, 0)])
def test_the_second_ctrl_c_quits_at_once(second: float, code: int) -> None:
    def ignore_nothing() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    line = [sys.executable, "-c", TWICE.format(second=second)]
    done = subprocess.run(
        line, cwd=ROOT, capture_output=True, text=True, preexec_fn=ignore_nothing, timeout=60
    )
    assert done.returncode == code, done.stderr
    assert ("quit at once" in done.stderr) == (code != 0) == ("waited to the end" not in done.stdout)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with ending_when_asked():
            os.kill(os.getpid(), signal.SIGHUP)  # of a closed terminal, under nohup
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_after_the_last_step_is_not_lost() -> None:
    with pytest.raises(Preempted, match="SIGUSR1"), ending_when_asked(), stop_request() as request:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request.received == "SIGUSR1"  # between two steps it would be looked at


@pytest.mark.parametrize("number, code", [(errno.EACCES, 2), (errno.EROFS, 2), (errno.EIO, 1)])
def test_a_file_that_cannot_be_used_is_named_in_one_line(
    tmp_path: Path,
    number: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(run: object, **own: object) -> None:
        raise OSError(number, os.strerror(number), str(tmp_path / "place"))

    save_yaml(small_run(tmp_path), tmp_path / "run.yaml")
    monkeypatch.setattr(trainer, "build", refused)
    assert main(["train", str(tmp_path / "run.yaml")]) == code
    assert (
        capsys.readouterr().err.splitlines()[-1]
        == f"lit-transdiff: {tmp_path / 'place'}: {os.strerror(number)}"
    )


def test_a_folder_below_a_file_and_a_name_that_is_none_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_yaml(small_run(tmp_path), tmp_path / "run.yaml")
    assert main(["train", str(tmp_path / "run.yaml"), f"output_dir={tmp_path / 'run.yaml'}"]) == 2
    assert f"lit-transdiff: {tmp_path / 'run.yaml' / 'small'}: Not a directory" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "name=a/b"]) == 2
    assert "name: got 'a/b'; allowed: the name of one folder" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "run.yaml"), "name=on", "--dry-run"]) == 0


def test_messages_about_which_a_user_can_do_nothing_are_silent() -> None:
    """In a separate process, like the filters; all other messages are still shown."""
    program = """
import logging, warnings
from lit_transdiff.__main__ import quiet_libraries
quiet_libraries()
logging.getLogger("DeepSpeed").warning("**** You are using ZeRO with an untested optimizer ****")
logging.getLogger("DeepSpeed").warning("heard of DeepSpeed")
logging.getLogger("lightning.pytorch.accelerators.cuda").info("LOCAL_RANK: 0 - CUDA_VISIBLE_DEVICES: [0]")
warnings.warn("`torch.distributed.all_gather_into_tensor` is deprecated. Use another.", FutureWarning)
warnings.warn("heard of torch", FutureWarning)
"""
    told = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stderr
    assert "heard of DeepSpeed" in told and "heard of torch" in told
    assert "untested" not in told and "LOCAL_RANK" not in told and "all_gather" not in told
