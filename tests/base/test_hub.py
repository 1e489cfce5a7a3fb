"""Places on the Hub: their form, downloads to the cache, and one clear line for each kind of trouble."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from lit_transdiff.base.endings import HubError
from lit_transdiff.base.hub import hub_place, local, pinned
from lit_transdiff.config import RunConfig, expanded
from lit_transdiff.config.loading import run_from
from lit_transdiff.config.paths import results_folder
from tests.helpers.hub_stub import HubStub

FILES = {
    "a.json": b"{}",
    "sub/w.safetensors": b"x" * 20_000,
    "sub/export.json": b"{}",
    "big.bin": b"y" * 50_000,
}


@pytest.fixture(scope="module")
def server() -> Iterator[HubStub]:
    with HubStub() as hub:
        yield hub


@pytest.fixture
def hub(server: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStub]:
    """A Hub with one repository, ``lab/model``, and an empty cache."""
    server.repos.clear()
    server.add("lab/model", FILES)
    server.used_by(monkeypatch, tmp_path)
    server.requests.clear()
    server.downloads.clear()
    yield server
    server.trouble, server.spoil = None, lambda content: content
    assert server.unknown == []


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("hf://lab/model", ("lab/model", None, "", "model")),
        ("hf://lab/model/", ("lab/model", None, "", "model")),
        ("hf://models/lab/model@v1", ("lab/model", "v1", "", "model")),
        ("hf://lab/model@refs/pr/3/sub/x", ("lab/model", "refs/pr/3", "sub/x", "model")),
        ("hf://datasets/lab/data@main/x.npz", ("lab/data", "main", "x.npz", "dataset")),
    ],
)
def test_the_parts_of_a_place(text: str, parts: tuple[str | None, ...]):
    place = hub_place(text)
    assert (place.repo, place.revision, place.path, place.kind) == parts
    assert hub_place(str(place)) == place


@pytest.mark.parametrize(
    "text", ["hf://x", "hf://", "hf://lab/model@", "hf://lab/m/../y", "hf://lab/m l", "hf://a--b/c"]
)
def test_other_forms_are_refused_where_a_setting_has_them(text: str):
    with pytest.raises(ValueError, match=r"init_from: got 'hf://.*allowed: hf://OWNER/NAME, "):
        run_from({"init_from": text})


def test_a_place_is_a_setting_as_it_is(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TEAM", "lab")
    assert RunConfig(init_from="hf://lab/model@v1/sub").init_from == "hf://lab/model@v1/sub"
    assert expanded("hf://$TEAM/model", "init_from") == "hf://lab/model"
    assert results_folder("hf://lab/model@v1/sub") == Path("runs/hub/lab/model")


def test_only_the_files_that_are_asked_for_are_downloaded_once(hub: HubStub):
    place = pinned("hf://lab/model")
    assert place == f"hf://lab/model@{hub.repos['model', 'lab/model'].branches['main']}"
    folder = local(f"{place}/sub", ["*.safetensors"])
    assert (folder / "w.safetensors").read_bytes() == FILES["sub/w.safetensors"]
    assert hub.downloads == ["sub/w.safetensors"]
    hub.requests.clear()
    assert local(f"{place}/sub", ["*.safetensors"]) == folder
    assert pinned(place) == place
    assert hub.requests == []  # a commit in the cache needs no server
    assert local("here/or/there") == Path("here/or/there")


def test_a_file_comes_with_what_is_known_of_it(hub: HubStub):
    file = local("hf://lab/model/sub/w.safetensors")
    assert file.with_name("export.json").read_bytes() == b"{}"
    assert sorted(hub.downloads) == ["sub/export.json", "sub/w.safetensors"]


def test_a_branch_is_where_it_is_now_and_offline_where_it_was(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    before = pinned("hf://lab/model")
    local(before, ["a.json"])
    hub.add("lab/model", {"a.json": b"[]"})
    assert pinned("hf://lab/model") != before
    assert local("hf://lab/model", ["a.json"]).joinpath("a.json").read_bytes() == b"[]"
    assert local(before, ["a.json"]).joinpath("a.json").read_bytes() == b"{}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert local("hf://lab/model", ["a.json"]).joinpath("a.json").read_bytes() == b"[]"
    line = "hf://lab/model.*is not in the cache .*HF_HUB_OFFLINE .*hf download lab/model"
    with pytest.raises(FileNotFoundError, match=line):
        local(f"{before}/big.bin")


def test_data_repositories(hub: HubStub):
    hub.add("lab/data", {"x.npz": b"n" * 20_000}, kind="dataset")
    assert local("hf://datasets/lab/data/x.npz").read_bytes() == b"n" * 20_000


@pytest.mark.parametrize(
    ("place", "line"),
    [
        ("hf://lab/none", "there is no repository lab/none, or it is private and the token"),
        ("hf://lab/model@v9", "lab/model has no branch, tag or commit 'v9'"),
        (f"hf://lab/model@{'0' * 40}", "has no branch, tag or commit '0000"),
        ("hf://lab/model/nothing", "lab/model has no nothing; it has a.json, big.bin, sub"),
    ],
)
def test_what_does_not_exist(hub: HubStub, place: str, line: str):
    with pytest.raises(FileNotFoundError, match=line) as error:
        local(place)
    assert str(error.value).startswith("hf://lab/") and "\n" not in str(error.value)


def test_a_private_repository_needs_the_token(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.add("lab/secret", {"a.json": b"{}"}, private=True)
    assert local("hf://lab/secret", ["a.json"]).is_dir()
    hub.used_by(monkeypatch, tmp_path / "other", token=None)
    with pytest.raises(
        FileNotFoundError, match=r"or it is private and you are not logged in \(hf auth login"
    ):
        local("hf://lab/secret", ["a.json"])


@pytest.mark.parametrize(
    ("trouble", "line"), [(500, "answers 500"), (403, "is not allowed to"), (429, "answers 429")]
)
def test_a_server_in_trouble(hub: HubStub, trouble: int, line: str):
    hub.trouble = trouble
    with pytest.raises(ValueError if trouble == 403 else HubError, match=line) as error:
        local("hf://lab/model")
    assert "\n" not in str(error.value)


def test_a_server_that_hangs_is_not_waited_for_long(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    place = pinned("hf://lab/model")
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
    hub.trouble = 0
    for asked in ("hf://lab/other", place):
        start = time.monotonic()
        with pytest.raises(HubError, match=r"does not answer \(ReadTimeout"):
            local(asked)
        assert time.monotonic() - start < 10


def test_a_server_that_is_not_there(hub: HubStub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127.0.0.1:9 does not answer \(ConnectError"):
        pinned("hf://lab/elsewhere")


def test_a_damaged_file_of_the_cache_is_named_with_the_way_on(hub: HubStub):
    for name in ("sub/w.safetensors", "a.json"):  # whose hashes are SHA-256, and git's
        file = local(f"hf://lab/model/{name}")
        file.resolve().write_bytes(FILES[name][:-1] + b"!")
        with pytest.raises(
            ValueError, match=r"is damaged: it differs from the file on the Hub\. Remove "
        ) as error:
            local(f"hf://lab/model/{name}")
        Path(str(error.value).split("Remove ")[1].split(", and")[0]).unlink()
        assert local(f"hf://lab/model/{name}").read_bytes() == FILES[name]


def test_a_truncated_download_is_not_taken(hub: HubStub):
    hub.spoil = lambda content: content[:-1] + b"!"
    with pytest.raises(ValueError, match="is damaged"):
        local("hf://lab/model/big.bin")


def test_of_several_processes_one_downloads(hub: HubStub, tmp_path: Path):
    place = pinned("hf://lab/model")
    hub.requests.clear()
    code = f"from lit_transdiff.base.hub import local; print(local({place + '/sub'!r}))"
    environment = {**os.environ, **hub.environment(tmp_path / "home")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    places = {rank.communicate(timeout=120)[0] for rank in ranks}
    assert len(places) == 1 and "/snapshots/" in places.pop()
    assert sorted(hub.downloads) == ["sub/export.json", "sub/w.safetensors"]
