"""Files are written whole or not at all, and not where they have no room."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lit_transdiff.base import files
from lit_transdiff.base.files import free_bytes, is_full, partial_name, replace_file, require_space, whole


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_what_fails_half_way_leaves_nothing(tmp_path: Path, folder: bool):
    def write(path: Path, text: str) -> None:
        if folder:
            path.mkdir()
        (path / "part" if folder else path).write_text(text)

    dest = tmp_path / "dest.npz"
    write(partial_name(dest), "of a process that was killed and had this number")
    with pytest.raises(RuntimeError), whole(dest) as partial:
        assert partial.parent == tmp_path and not partial.exists() and not partial.match("*.npz")
        write(partial, "half")
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with whole(dest) as partial:
        write(partial, "all")
        assert not dest.exists()
    assert (dest / "part" if folder else dest).read_text() == "all" and list(tmp_path.iterdir()) == [dest]


def test_a_file_that_is_not_replaced_stays(tmp_path: Path):
    replace_file(tmp_path / "a", b"old")
    with pytest.raises(KeyboardInterrupt), whole(tmp_path / "a") as partial:
        partial.write_bytes(b"half of the new")
        raise KeyboardInterrupt
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"old"]
    replace_file(tmp_path / "a", b"new")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"new"]


def test_too_little_room_is_a_bad_setting_and_an_error_of_the_disk(tmp_path: Path):
    require_space(tmp_path / "not" / "there", free_bytes(tmp_path) // 2)
    with pytest.raises(
        ValueError, match=r"there: [\d.,]+ \w+ are to be written, but only [\d.,]+ \w+ are free"
    ) as error:
        require_space(tmp_path / "not" / "there", free_bytes(tmp_path) * 2)
    assert isinstance(error.value, OSError) and error.value.errno == errno.ENOSPC


@contextmanager
def full_at_1000_bytes() -> Iterator[None]:
    """Limit the size of all files of this process, even of the tests' own report, so use it only around the
    failing call.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_an_error_that_names_the_file_whoever_writes(tmp_path: Path) -> None:
    """Safetensors gives the errno only in its message."""
    (tmp_path / "model.safetensors").write_bytes(b"before")
    said = r"File too large \(.* free\): '.*/model.safetensors'"
    with (
        full_at_1000_bytes(),
        pytest.raises(OSError, match=said) as told,
        whole(tmp_path / "model.safetensors") as partial,
    ):
        save_file({"a": torch.zeros(1000)}, partial)
    assert is_full(told.value) and [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_writer_that_does_not_say_why_is_asked_for_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Like ``torch.save``."""
    for free, kind in ((500, OSError), (1 << 30, RuntimeError)):
        monkeypatch.setattr(files, "free_bytes", lambda folder, free=free: free)
        with (
            pytest.raises(kind, match="500 bytes free" if kind is OSError else "unexpected pos"),
            whole(tmp_path / "a"),
        ):
            raise RuntimeError("unexpected pos 64 vs 0")
