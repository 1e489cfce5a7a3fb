import os
import threading
from itertools import count, islice

import pytest

from lit_transdiff.data.processes import ahead, in_processes


def divide(a, b):
    return os.getpid(), a / b


@pytest.mark.parametrize("workers", [0, 2])
def test_every_task_is_done_once_and_errors_come_back(workers):
    asked = []

    def tasks():
        for i in range(20):
            asked.append(i)
            yield i, 2

    results = in_processes(divide, tasks(), workers)
    first = next(results)
    assert len(asked) <= 2 * workers + 1  # a few at a time
    found = [first, *results]
    assert sorted(value for _, value in found) == [i / 2 for i in range(20)]
    assert (os.getpid() in {pid for pid, _ in found}) == (workers == 0)
    with pytest.raises(ZeroDivisionError):
        list(in_processes(divide, [(1, 1), (1, 0)], workers))
    with pytest.raises(ValueError, match="workers: got -1"):
        list(in_processes(divide, [], -1))


def test_a_thread_makes_items_ahead_in_order():
    made, threads = [], set()

    def items(fail_at=None):
        for i in count():
            if i == fail_at:
                raise ZeroDivisionError
            made.append(i)
            threads.add(threading.get_ident())
            yield i

    assert list(islice(ahead(items(), 2), 10)) == list(range(10))
    assert 10 <= len(made) <= 12 and threading.get_ident() not in threads
    assert list(ahead(iter(range(3)), 5)) == [0, 1, 2] and list(ahead(iter(()), 2)) == []
    failing, seen = ahead(items(fail_at=4), 2), []
    with pytest.raises(ZeroDivisionError):
        for item in failing:
            seen.append(item)
    assert seen == [0, 1, 2, 3]
