"""The process group of ranks that torchrun has started or restarted."""

from __future__ import annotations

import atexit
import os
import time
import uuid
from datetime import timedelta

import torch
import torch.distributed
from torch.distributed import PrefixStore, Store, TCPStore

from lit_transdiff.base.endings import RankFailed

MEETING = "lit-transdiff/meeting"
MEETING_POLL = 0.1  # seconds


def join(backend: str, timeout: timedelta) -> None:
    """Make the process group in a part of torchrun's store that only the ranks of this attempt use.

    The store outlives the ranks, and PyTorch uses the same part for every attempt: ranks would read the
    addresses of the previous attempt and wait for them. Without a store of torchrun there is nothing to do.
    """
    world = int(os.environ.get("WORLD_SIZE", 1))
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not shared or world == 1 or torch.distributed.is_initialized():
        return
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    rank, address, port = int(os.environ["RANK"]), os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        store = TCPStore(address, port, is_master=False, timeout=timeout)
        place = PrefixStore(agree(store, rank, world, timeout), store)
    except RuntimeError as error:
        raise RankFailed(
            f"rank {rank} of {world} does not meet the others at {address}:{port}: {error}"
        ) from error
    torch.distributed.init_process_group(backend, store=place, rank=rank, world_size=world, timeout=timeout)
    atexit.register(close_connections)


def close_connections() -> None:
    """Close the connections before Python unloads the libraries."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def agree(store: Store, rank: int, world: int, timeout: timedelta) -> str:
    """A name shared by the ``world`` ranks of this attempt and by no earlier ones.

    Raises ``RankFailed``, or the store's ``RuntimeError``, after ``timeout``. torchrun's count of restarts
    cannot serve, because each node counts its own. Instead the first rank writes a new name, every other rank
    answers it with a word of its own, and accepts the name when the first rank has repeated this word: the
    author of an older name cannot know it.
    """
    word, deadline = uuid.uuid4().hex, time.monotonic() + timeout.total_seconds()
    if rank == 0:
        store.set(MEETING, word)
        others = range(1, world)
        store.wait([f"{word}/{other}" for other in others], timeout)
        for other in others:
            store.set(f"{word}/{other}/heard", store.get(f"{word}/{other}").decode())
        return word
    store.wait([MEETING], timeout)
    while time.monotonic() < deadline:
        name = store.get(MEETING).decode()
        store.set(f"{name}/{rank}", word)
        for _ in range(10):
            if store.check([f"{name}/{rank}/heard"]) and store.get(f"{name}/{rank}/heard").decode() == word:
                return name
            time.sleep(MEETING_POLL)
    raise RankFailed(f"rank {rank} has not met the other {world - 1} ranks within {timeout}.")
