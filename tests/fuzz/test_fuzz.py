"""Broken recipes, sweeps, indexes, archives and checkpoints, drawn from a grammar: whatever is given, a command ends with a
status of its own, in one line, without a traceback, and changes nothing but the folders that it was told to write to.

An attempt that fails is repeated by its seed: ``FUZZ_SEED=123 FUZZ_COUNT=1 pytest tests/fuzz -m slow``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import os
import random
import resource
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_transdiff.__main__ import RESUMABLE, main
from tests.fuzz.grammar import KINDS, draw_attempt
from tests.fuzz.world import picture_of

STATUSES = (0, 1, 2, 75, 76, 130)
PATIENCE, GRACE = 5, 40  # seconds after which a command is asked to stop, and after which it hangs
MEMORY = 4 << 30  # bytes that an attempt may take: sizes that cannot work are refused before
FAST = range(120)
SEED, COUNT = int(os.environ.get("FUZZ_SEED", 10_000)), int(os.environ.get("FUZZ_COUNT", 1500))
NAMES = [f"{function.__name__.removesuffix('_command')}" for function in RESUMABLE]


class Hangs(BaseException):
    """A command did not end when it was asked to."""


@contextlib.contextmanager
def asked_to_stop(command: str, patience: float) -> Iterator[None]:
    """After a while the command is asked to stop; when it does not, ``Hangs``."""
    asked = signal.SIGTERM if command in NAMES else signal.SIGINT
    rings = iter(["ask", "hang"])

    def ring(number: int, frame: object) -> None:
        if next(rings) == "hang":
            faulthandler.dump_traceback()
            raise Hangs
        signal.setitimer(signal.ITIMER_REAL, GRACE)
        os.kill(os.getpid(), asked)

    def too_late(number: int, frame: object) -> None:
        """The command has ended by itself just before it was asked to."""

    before = {signal.SIGALRM: signal.signal(signal.SIGALRM, ring), asked: signal.signal(asked, too_late)}
    signal.setitimer(signal.ITIMER_REAL, patience)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def told_by(words: list[str], patience: float = PATIENCE) -> tuple[object, str]:
    """The status of a command and what it wrote to standard error; a traceback where it ended in one."""
    said = io.StringIO()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with contextlib.redirect_stderr(said), quiet, little_memory(), asked_to_stop(words[0], patience):
        try:
            return main(words), said.getvalue()
        except SystemExit as end:
            return end.code, said.getvalue()
        except (Exception, Hangs, KeyboardInterrupt):
            return "none", said.getvalue() + traceback.format_exc()


def faults_of(seed: int, world: Path) -> tuple[str, list[str]]:
    """Run the attempt of a seed; its kind and what is wrong with how it ended."""
    draw = random.Random(seed)
    for name in ("work", "out", "runs"):
        shutil.rmtree(name, ignore_errors=True)
    shutil.copytree("healthy", "work", symlinks=True)
    Path("out").mkdir()
    attempt = draw_attempt(draw, draw.choice(list(KINDS)))
    before = picture_of(world, attempt.writes)
    start = time.monotonic()
    status, said = told_by(attempt.words)
    took = time.monotonic() - start
    after = picture_of(world, attempt.writes)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    lines = [line for line in said.replace("\r", "\n").splitlines() if line.startswith(("lit-transdiff:", "lit-transdiff "))]
    faults = []
    if status not in STATUSES:
        faults.append(f"status {status}")
    if "Traceback" in said:
        faults.append("a traceback")
    if status in STATUSES[1:] and len([line for line in lines if not line.startswith("lit-transdiff settings")]) != 1:
        faults.append(f"{len(lines)} lines of error")
    if changed:
        faults.append(f"changed {changed}")
    told = f"seed {seed}: {attempt.kind}: {' '.join(attempt.words)!r} after {attempt.done!r} ({status}, {took:.1f} s)"
    return told, [f"{', '.join(faults)}\n{said[-3000:]}"] if faults else []


def check(seeds: range, world: Path) -> None:
    counts: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        told, faults = faults_of(seed, world)
        counts[told.split(": ")[1]] += 1
        if os.environ.get("FUZZ_SHOW"):
            print(told, *faults, flush=True)
        failed += [f"{told}: {fault}" for fault in faults]
    print(dict(counts))
    assert not failed, "\n\n".join([f"{len(failed)} of {len(seeds)} attempts", *failed])


def test_what_is_broken_ends_in_one_line(world: Path) -> None:
    check(FAST, world)


@pytest.mark.slow
def test_more_that_is_broken_ends_in_one_line(world: Path) -> None:
    check(range(SEED, SEED + COUNT), world)
