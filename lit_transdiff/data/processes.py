"""Parallel work: a function over many tasks in several processes, an iterator in a thread."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from lit_transdiff.base.endings import STOP_SIGNALS
from lit_transdiff.config import require

T = TypeVar("T")
# Slow imports, once for all processes, and a module that makes them ignore signals.
PRELOAD = ["lit_transdiff.data.server", "lit_transdiff.data.stream", "lit_transdiff.data.pack"]


def clean_context() -> Any:
    """The context for new processes: a clean server process, because a fork of this one may hang."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def most_processes() -> int:
    """The maximal useful number of processes on this machine."""
    return max(64, 4 * (os.cpu_count() or 1))


def in_processes(function: Callable[..., T], tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[T]:
    """``function(*task)`` of every task in order of completion; with 0 workers in this process.

    ``tasks`` may be an iterator, of which few wait at a time. An exception in a task is raised here. The
    processes end when this one is killed or asked to stop, which interrupts their tasks.
    """
    most = most_processes()
    require(0 <= workers <= most, "workers", workers, f"0 (this process alone) to {most} on this machine")
    if workers == 0:
        yield from (function(*task) for task in tasks)
        return
    context = clean_context()
    pipe, own_end = context.Pipe(duplex=False)  # the processes end when this process closes its own end
    with ProcessPoolExecutor(
        workers, mp_context=context, initializer=exit_with_parent, initargs=(pipe,)
    ) as pool:
        waiting: set[Future[T]] = set()
        try:
            for task in tasks:
                waiting.add(pool.submit(function, *task))
                if len(waiting) >= 2 * workers:
                    done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                    yield from (future.result() for future in done)
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        except Exception:
            raise
        except BaseException:  # asked to stop
            own_end.close()
            raise
        finally:
            for future in waiting:
                future.cancel()


def ahead(items: Iterator[T], number: int) -> Iterator[T]:
    """Iterate over ``items``, of which a thread prepares up to ``number`` in advance."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(number))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]


def exit_with_parent(pipe: Connection | None = None) -> None:
    """End this process when its parent dies, asks for it, or closes its end of ``pipe``.

    Otherwise it would wait for tasks forever. Signals are ignored, because terminals, launchers and
    schedulers send them to all processes, while the parent may still want the current result.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    for number in STOP_SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel, *([pipe] if pipe else [])])
        os._exit(1)

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
            continue
        os._exit(1)

    for target in (watch, obey):
        threading.Thread(target=target, daemon=True).start()
