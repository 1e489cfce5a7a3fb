"""How ranks that torchrun has started again find each other."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
import torch.distributed


def rejoin(backend: str, timeout: timedelta) -> None:
    """Meet in a part of torchrun's store that belongs to this attempt alone; nothing to do at the first one.

    The store outlives the ranks. Where PyTorch gives every attempt the same place in it (as 2.15 does), ranks read the addresses
    that those of the attempt before have left there, and wait for them or fail.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    if attempt == 0 or world == 1 or torch.distributed.is_initialized():
        return
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    store = torch.distributed.TCPStore(
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout
    )
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.PrefixStore(f"attempt-{attempt}", store),
        rank=int(os.environ["RANK"]),
        world_size=world,
        timeout=timeout,
    )
