"""Kernels whose memory is counted on tensors that have shapes and no values: nothing is launched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_counting: ContextVar[bool] = ContextVar("counting", default=False)


def is_counting() -> bool:
    """Whether kernels are counted instead of launched."""
    return _counting.get()


@contextmanager
def counted_kernels() -> Iterator[None]:
    """Let blocks take their kernels, and kernels launch nothing."""
    token = _counting.set(True)
    try:
        yield
    finally:
        _counting.reset(token)
