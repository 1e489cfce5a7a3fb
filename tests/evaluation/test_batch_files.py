"""The folder of sampled batches: completeness of a batch, reports of failed ranks,
and sharing by all ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_transdiff.evaluation import batch_files as module
from lit_transdiff.evaluation.batch_files import (
    BatchFiles,
    open_batch_files,
    wait_for_batches,
    wait_for_scores,
)


def make(folder: Path, with_images: bool = False) -> BatchFiles:
    parts = BatchFiles(
        folder / "parts", num_images=10, batch_size=4, published=folder / "images" if with_images else None
    )
    assert open_batch_files(parts, None) == [range(0, 4), range(4, 8), range(8, 10)]
    return parts


def test_rows_come_in_the_order_of_the_images(tmp_path: Path) -> None:
    parts = make(tmp_path)
    for batch in reversed(parts.batches()):
        parts.write(batch, {"rows": np.array(batch)})
    assert parts.missing() == [] and np.concatenate(list(parts.each("rows"))).tolist() == list(range(10))
    wait_for_batches(parts)
    parts.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_batch_is_drawn_again(tmp_path: Path) -> None:
    parts = make(tmp_path)
    for batch in parts.batches():
        parts.write(batch, {"rows": np.arange(1000)})
    file = parts.path(range(4, 8))
    file.write_bytes(file.read_bytes()[:-40])
    assert open_batch_files(parts, None) == [range(4, 8)]


def test_a_batch_whose_images_are_gone_is_drawn_again(tmp_path: Path) -> None:
    parts = make(tmp_path, with_images=True)
    for batch in parts.batches():
        parts.write(batch, {"rows": np.array(batch)})
    assert len(parts.missing()) == 3
    parts.images.mkdir()
    for i in range(8):
        (parts.images / f"{i:05d}.png").touch()
    assert parts.missing() == [range(8, 10)]
    (parts.images / "00009.png").touch()
    parts.publish_images()
    assert parts.missing() == [] and (tmp_path / "images" / "00009.png").is_file()


def test_waiting_ranks_hear_of_a_failure_and_give_up_when_nothing_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = make(tmp_path)
    monkeypatch.setattr(module, "PART_LIMIT", 0.1)
    monkeypatch.setattr(module, "SCORES_LIMIT", 0.1)
    with pytest.raises(RuntimeError, match="3 batches are missing"):
        wait_for_batches(parts)
    with pytest.raises(RuntimeError, match="rank 0 wrote no scores"):
        wait_for_scores(parts, tmp_path / "result.json")
    parts.fail("rank 3: out of memory")
    parts.fail("rank 0: because rank 3 has failed")
    for wait in (lambda: wait_for_batches(parts), lambda: wait_for_scores(parts, tmp_path / "result.json")):
        with pytest.raises(RuntimeError, match="rank 3: out of memory"):
            wait()
    assert len(open_batch_files(parts, None)) == 3  # the next start forgets it
    parts.check()
    parts.remove()
    wait_for_scores(parts, tmp_path / "result.json")
    parts.fail("too late to matter")


class SecondRank:
    """Fabric as rank 1 of 2 sees it, if rank 0 has written its token to another place."""

    is_global_zero, world_size = False, 2

    def broadcast(self, value: Any, src: int = 0) -> Any:
        if isinstance(value, tuple):
            return "token", []
        return True if src == 0 else value


def test_a_folder_that_is_not_shared_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = BatchFiles(tmp_path / "parts", 10, 4, None)
    monkeypatch.setattr(module, "SHARED_LIMIT", 0.1)
    with pytest.raises(ValueError, match="allowed: a folder that the processes of all nodes share"):
        open_batch_files(parts, SecondRank())  # type: ignore[arg-type]
    parts.folder.mkdir()
    (parts.folder / "token").write_text("token")
    assert open_batch_files(parts, SecondRank()) == []  # type: ignore[arg-type]
