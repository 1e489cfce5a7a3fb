"""Broken recipes, sweeps, indexes, archives and checkpoints, drawn from a grammar: whatever is given, a
command ends with a status of its own, in one line, without a traceback, and changes nothing but the folders
that it was told to write to.

An attempt that fails is repeated by its seed: ``FUZZ_SEED=123 FUZZ_COUNT=1 pytest tests/fuzz -m slow``.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.helpers.fuzz.ending import told_by
from tests.helpers.fuzz.grammar import KINDS, draw_attempt
from tests.helpers.fuzz.world import picture_of

STATUSES = (0, 1, 2, 75, 76, 130)
FAST = range(50)
SEED, COUNT = int(os.environ.get("FUZZ_SEED", 10_000)), int(os.environ.get("FUZZ_COUNT", 500))


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
    lines = [
        line
        for line in said.replace("\r", "\n").splitlines()
        if line.startswith(("lit-transdiff:", "lit-transdiff "))
    ]
    faults = []
    if status not in STATUSES:
        faults.append(f"status {status}")
    if "Traceback" in said:
        faults.append("a traceback")
    if (
        status in STATUSES[1:]
        and len([line for line in lines if not line.startswith("lit-transdiff settings")]) != 1
    ):
        faults.append(f"{len(lines)} lines of error")
    if changed:
        faults.append(f"changed {changed}")
    told = (
        f"seed {seed}: {attempt.kind}: {' '.join(attempt.words)!r} after {attempt.done!r} ({status}, "
        f"{took:.1f} s)"
    )
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
