"""One process at a time in a folder."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from lit_transdiff.base import locks
from lit_transdiff.base.endings import Preempted, ending_when_asked
from lit_transdiff.base.locks import FolderLock


def hold(folder: Path, held: threading.Event, free: threading.Event, remove: bool = False) -> None:
    with FolderLock(folder) as lock:
        lock.take()
        held.set()
        free.wait(30)
        if remove:
            (folder / "lock").unlink()


@pytest.mark.parametrize("remove", [False, True])
def test_the_second_waits_and_holds_the_file_that_is_there(tmp_path: Path, remove: bool) -> None:
    held, free = threading.Event(), threading.Event()
    first = threading.Thread(target=hold, args=(tmp_path, held, free, remove))
    first.start()
    held.wait(30)
    threading.Timer(0.5, free.set).start()
    with FolderLock(tmp_path) as lock:
        assert lock.take()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(locks, "LOCK_PATIENCE", 0.0)
            with pytest.raises(ValueError, match=r"another process trains this run .*pid"):
                FolderLock(tmp_path).take()
    first.join()


def test_those_of_a_group_may_take_the_file_that_one_of_them_made(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        with FolderLock(tmp_path) as lock:
            lock.take()
    finally:
        os.umask(before)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o664
    assert (tmp_path / "lock").read_text().endswith(f", pid {os.getpid()}\n")  # who was the last


def test_a_signal_ends_the_wait_at_once(tmp_path: Path) -> None:
    with FolderLock(tmp_path) as first, FolderLock(tmp_path) as second:
        first.take()
        start = time.monotonic()
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        with ending_when_asked(), pytest.raises(Preempted, match="asked to stop"):
            second.take()
        assert time.monotonic() - start < 3
