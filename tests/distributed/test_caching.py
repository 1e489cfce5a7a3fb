"""A cache over several processes that is killed with SIGKILL, and continued by another number of them."""

import os
import signal
import time
from pathlib import Path

import pytest

from lit_transdiff.data.verify import verify
from tests.helpers.forks import PROGRAM, forked, run_forked
from tests.helpers.small import FASHION, ROOT

RECIPE = str(ROOT / "experiments/fashion/ar_pretrain.yaml")


@pytest.mark.slow
def test_killed_and_continued_is_as_uninterrupted(tmp_path: Path):
    images = str(FASHION / "evaluation")
    options = ["data.num_workers=1", "--flips", "--batch-size", "16"]
    run_forked(1, PROGRAM, "cache", RECIPE, images, str(tmp_path / "whole"), *options)
    part = ["cache", RECIPE, images, str(tmp_path / "part"), *options]
    process = forked(2, PROGRAM, *part, log=tmp_path / "log")
    end = time.monotonic() + 120
    while not list((tmp_path / "part").glob("finished/*.npz")):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.join()
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}
    assert before and not (tmp_path / "part/index.json").exists()
    run_forked(3, PROGRAM, *part)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "part").glob("*.tar")}
    recorded = [name for name in before if before[name] == after[name]]
    assert recorded and len(after) > len(before)
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "part" / path.name).read_bytes()
    assert len(list((tmp_path / "part").iterdir())) == len(list((tmp_path / "whole").iterdir()))
    assert len(verify(tmp_path / "part")) == 2000
