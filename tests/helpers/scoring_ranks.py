"""Two ranks that score together, each a process that can be killed on its own; forked from a server that has
done the imports.
"""

from __future__ import annotations

import json
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric

from lit_transdiff.evaluation.evaluate import evaluate
from tests.helpers.forks import CONTEXT
from tests.helpers.judge import SAMPLING, tiny_generator, tiny_settings
from tests.helpers.processes import free_port

SETTINGS = {"num_images": 43, "batch_size": 4, "label_mode": "random"}


def score(files: Path, output: Path, pause: float, threads: int, environment: dict[str, str]) -> None:
    """Draw and score, with so many seconds before each batch; ``output/rankN.json`` gets the number of
    batches and the result.
    """
    os.environ |= environment
    torch.set_num_threads(threads)
    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    generator, num_batches = tiny_generator(), 0
    at_once = generator.images

    def images(*arguments: Any) -> Any:
        nonlocal num_batches
        num_batches += 1
        time.sleep(pause)
        return at_once(*arguments)

    generator.images = images  # type: ignore[method-assign]
    result = evaluate(
        generator,
        tiny_settings(files, **SETTINGS),
        SAMPLING,
        output=output,
        fabric=fabric,
        save_images="both",
    )
    (output / f"rank{fabric.global_rank}.json").write_text(json.dumps([num_batches, result]))
    fabric.barrier()
    torch.distributed.destroy_process_group()


def two_ranks(files: Path, output: Path, pause: float) -> list[BaseProcess]:
    common = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    common |= {"GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    arguments = files, output, pause, torch.get_num_threads()
    ranks = [
        CONTEXT.Process(target=score, args=(*arguments, {**common, "RANK": r, "LOCAL_RANK": r})) for r in "01"
    ]
    for rank in ranks:
        rank.start()
    return ranks  # type: ignore[return-value]
