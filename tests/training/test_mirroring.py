"""A run whose machine is lost goes on from its mirror, bit for bit."""

import dataclasses
import itertools
import os
import shutil
import signal
import time
from contextlib import suppress

import lightning.pytorch as pl
import pytest

from lit_transdiff.base.endings import CheckpointError
from lit_transdiff.base.files import read_json, replace_file, sealed, unsealed
from lit_transdiff.base.remote import RemoteFolder
from lit_transdiff.base.remote_errors import RemoteError
from lit_transdiff.checkpoints import mirror as mirror_module
from lit_transdiff.checkpoints import mirror_holder
from lit_transdiff.checkpoints.export import export_checkpoint, read_export
from lit_transdiff.checkpoints.format import MARKER, checkpoint_folder, complete_checkpoints
from lit_transdiff.checkpoints.mirror import Mirror
from lit_transdiff.checkpoints.mirror_holder import Hold, MirrorTaken, start_of
from lit_transdiff.config.loading import save_yaml
from lit_transdiff.training.mirroring import mirror_results, mirrored
from lit_transdiff.training.trainer import train
from tests.helpers.forks import PROGRAM, forked
from tests.helpers.processes import assert_same_weights, until, values
from tests.helpers.small import small_run


class PowerCut(BaseException):
    """An end of the process without any cleanup."""


class CutAfter(pl.Callback):
    """Ends the process at a step (from 0), as soon as something has happened."""

    def __init__(self, step, happened):
        self.step, self.happened = step, happened

    def on_train_batch_start(self, trainer, stage, batch, i):
        if trainer.global_step == self.step:
            self.happened()
            raise PowerCut


def quiet(text):
    pass


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(mirror_module, "MIRROR_POLL", 0.05)
    monkeypatch.setattr(mirror_module, "MIRROR_RETRY", 0.05)
    monkeypatch.setattr(mirror_module, "MIRROR_PATIENCE", 1.0)


@pytest.fixture
def s3(network):
    return "s3://lab/runs"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing interrupted."""
    run = small_run(tmp_path_factory.mktemp("whole"), checkpoint={"keep_last": 2})
    train(run, say=quiet)
    return run


def run_with(folder, mirror, **training):
    return small_run(folder, checkpoint={"mirror": str(mirror)}, training=training)


def complete_steps(run):
    place = Mirror(run.folder, f"{run.checkpoint.mirror}/{run.name}")
    place.look()
    return place.steps()


def until_mirrored(run, step):
    def wait():
        deadline = time.monotonic() + 60
        while step not in complete_steps(run):
            assert time.monotonic() < deadline
            time.sleep(0.05)

    return wait


def test_a_lost_run_goes_on_from_its_mirror(s3, whole, tmp_path, monkeypatch):
    run, said = run_with(tmp_path / "runs", s3), []
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "finish", lambda self: "")  # the power fails: nothing is uploaded at the end
        with pytest.raises(PowerCut):
            train(run, say=quiet, callbacks=[CutAfter(5, until_mirrored(run, 4))])
    shutil.move(run.folder, tmp_path / "lost")

    new = run_with(tmp_path / "new", s3)
    train(new, say=said.append)
    assert f"small: its checkpoint of step 4 comes from {s3}/small" in said
    assert any("continuing from" in text for text in said)
    assert_same_weights(whole, new)
    assert complete_steps(new) == [6]  # the older ones are removed as locally

    shutil.rmtree(new.folder)  # a finished run comes back as well
    last = run_with(tmp_path / "last", s3)
    assert train(last, say=said.append).step == 6 and "already trained to step 6" in said[-1]
    assert_same_weights(whole, last)
    there = set(RemoteFolder(f"{s3}/small").files())
    assert {"config.yaml", "environment.json", "metrics.csv", "export/export.json"} <= there
    assert not [name for name in there if name.startswith(("lock", "wandb", ".mirror"))]


@pytest.fixture
def trained(whole, tmp_path):
    """A copy of a trained run with its two checkpoints, and its mirror in a folder."""
    folder = tmp_path / "runs" / "small"
    shutil.copytree(whole.folder, folder)
    return Mirror(folder, str(tmp_path / "mirror" / "small"))


def places(mirror):
    mirror.look()
    return {name for name in mirror.there if name != mirror_holder.HOLDER}


def test_only_complete_checkpoints_are_visible(trained, monkeypatch):
    order, put = [], RemoteFolder.put

    def noted(self, file, name):
        order.append(name)
        put(self, file, name)

    monkeypatch.setattr(RemoteFolder, "put", noted)
    trained.upload()
    last = [name for name in order if name.startswith("checkpoints/step-00000006/")]
    assert len(last) > 2 and last[-1].endswith(MARKER)
    assert order.index("export/export.json") > order.index("export/model.safetensors")
    assert order.index("metrics.csv") < order.index(last[0])
    trained.upload()
    assert len(order) == len(set(order))  # nothing is uploaded twice

    # a failure in the middle leaves no marker, and the next attempt completes it
    shutil.rmtree(trained.remote.url)
    other = Mirror(trained.folder, trained.remote.url)
    with monkeypatch.context() as patch:
        without_network(patch, lambda name: name.endswith("training.pt"))
        assert not other.attempt() and "no network" in other.problem
    other.look()
    assert other.steps() == []
    assert other.attempt() and other.steps() == [4, 6]


def without_network(monkeypatch, lost):
    """Uploads of the files that are ``lost`` fail."""
    put = RemoteFolder.put

    def some(self, file, name):
        if lost(name):
            raise RemoteError("no network")
        put(self, file, name)

    monkeypatch.setattr(RemoteFolder, "put", some)


def test_what_the_run_folder_drops_is_removed(trained):
    trained.upload()
    assert trained.steps() == [4, 6]
    shutil.rmtree(trained.folder / "checkpoints" / "step-00000004")
    trained.upload()
    trained.look()
    assert trained.steps() == [6] and not [name for name in places(trained) if "step-00000004" in name]
    shutil.rmtree(trained.folder / "checkpoints" / "step-00000006")
    trained.upload()
    assert trained.steps() == [6]  # an empty folder removes nothing


@pytest.fixture
def younger(whole, trained, tmp_path):
    """The run folder of ``trained`` as it may have been at step 4, with an export."""
    folder = tmp_path / "younger" / "small"
    shutil.copytree(trained.folder, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000006")
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(line for line in lines if not line.startswith(("5,", "6,"))))
    export_checkpoint(complete_checkpoints(folder / "checkpoints")[0].index(), folder / "export", own=True)
    return folder


def cut_at(monkeypatch, number):
    """The power fails at a change of the mirror (from 0)."""
    left = iter(range(number))

    def or_cut(act):
        def change(self, *files):
            if next(left, None) is None:
                raise PowerCut
            act(self, *files)

        return change

    for act in (RemoteFolder.put, RemoteFolder.remove):
        monkeypatch.setattr(RemoteFolder, act.__name__, or_cut(act))


@pytest.mark.parametrize("restarted", [False, True])
def test_whenever_the_power_fails_the_mirror_is_of_one_moment(
    trained, younger, tmp_path, monkeypatch, restarted
):
    for number in itertools.count():
        place, folder = str(tmp_path / "mirror" / str(number)), tmp_path / "changing" / str(number)
        shutil.copytree(younger, folder)
        mirror = Mirror(folder, place)
        mirror.upload()
        shutil.copytree(trained.folder, folder, dirs_exist_ok=True)  # goes on to step 6
        if restarted:
            mirror = Mirror(folder, place)
            mirror.look()
        with monkeypatch.context() as patch:
            cut_at(patch, number)
            with suppress(PowerCut):
                mirror.upload()
                break
        check_fetched(place, tmp_path / "new" / str(number))
    assert number > 5 and mirror.steps() == [4, 6]
    assert check_fetched(place, tmp_path / "new" / "last") == (6, 6)


def check_fetched(place, folder):
    """A run as it comes back: undamaged, with the rows before its checkpoint; its step and its export's."""
    new = Mirror(folder, place)
    new.look()
    step = new.fetch()
    [*_, checkpoint] = complete_checkpoints(folder / "checkpoints")
    assert checkpoint.step == step and checkpoint.damaged_file() is None
    assert {2, 4, step} <= set(values(folder))
    if not (folder / "export").exists():
        return step, None
    export = read_export(folder)  # checks its files
    return step, export.info["step"]


def test_a_checkpoint_brings_the_rows_before_it(trained, younger, tmp_path, monkeypatch):
    """Also one that is written while another is uploaded."""
    put, order, mirror = RemoteFolder.put, [], Mirror(younger, trained.remote.url)

    def trains_on(self, file, name):
        put(self, file, name)
        order.append(name)
        if name == f"checkpoints/step-00000004/{MARKER}":
            shutil.copytree(trained.folder, younger, dirs_exist_ok=True)

    monkeypatch.setattr(RemoteFolder, "put", trains_on)
    mirror.upload()
    last = next(number for number, name in enumerate(order) if "step-00000006" in name)
    assert "metrics.csv" in order[:last][-10:] and order.count("metrics.csv") == 2
    assert mirror.steps() == [4, 6]


def test_checkpoints_that_are_written_faster_than_uploaded_do_not_pile_up(trained, younger, monkeypatch):
    put, seen, mirror = RemoteFolder.put, [], Mirror(younger, trained.remote.url)

    def trains_on(self, file, name):
        put(self, file, name)
        seen.append(len(mirror.steps()))
        if name.endswith(MARKER) and (step := int(name.split("-")[1][:8])) < 10:
            old, new = (checkpoint_folder(younger / "checkpoints", n) for n in (step, step + 2))
            shutil.move(old, new)
            replace_file(new / MARKER, sealed(unsealed(read_json(new / MARKER)) | {"step": step + 2}))

    monkeypatch.setattr(RemoteFolder, "put", trains_on)
    mirror.upload()
    assert mirror.steps() == [10] and max(seen) == 1


def test_an_export_that_is_replaced_meanwhile_is_not_there_by_halves(trained, younger, tmp_path, monkeypatch):
    mirror, put = Mirror(younger, trained.remote.url), RemoteFolder.put

    def replaced(self, file, name):
        put(self, file, name)
        if name == "export/model.safetensors":
            shutil.copytree(trained.folder / "export", younger / "export", dirs_exist_ok=True)

    with monkeypatch.context() as patch:
        patch.setattr(RemoteFolder, "put", replaced)
        mirror.upload_files()
    assert "export/model.safetensors" in places(mirror) and "export/export.json" not in places(mirror)
    mirror.upload()
    assert check_fetched(trained.remote.url, tmp_path / "new") == (4, 6)


def test_damage_in_the_mirror_is_noticed(trained, tmp_path, caplog):
    trained.upload()
    file = next((tmp_path / "mirror/small/checkpoints/step-00000006").glob("rank-*.safetensors"))
    file.write_bytes(bytes(file.stat().st_size))
    new = Mirror(tmp_path / "new" / "small", trained.remote.url)
    new.look()
    assert new.fetch() == 4
    assert "step-00000006/rank-00000.safetensors is damaged" in caplog.text
    assert file.exists() and new.steps() == [4]


def test_a_failing_mirror_does_not_stop_training_and_is_told_at_the_end(whole, tmp_path, monkeypatch):
    run = run_with(tmp_path / "runs", tmp_path / "mirror")
    with monkeypatch.context() as patch:
        without_network(patch, lambda name: name != "mirror.json")
        with pytest.raises(CheckpointError, match=r"mirror/small is not complete: no network What"):
            train(run, say=quiet)
    assert_same_weights(whole, run)
    train(run, say=quiet)  # finished, and uploads the rest
    assert complete_steps(run) == [6]


def test_results_of_later_commands_are_mirrored(whole, tmp_path):
    run = run_with(tmp_path / "runs", tmp_path / "mirror")
    shutil.copytree(whole.folder, run.folder)
    (run.folder / "evaluations").mkdir()
    (run.folder / "evaluations" / "one.json").write_text("{}")
    mirror_results(run)
    assert (tmp_path / "mirror/small/evaluations/one.json").is_file()
    assert complete_steps(run) == [4, 6]


@pytest.fixture
def hold_of():
    """Makes holds of other processes, by default on another machine; they end with the test."""
    made = []

    def make(url, folder, **of):
        hold = Hold(RemoteFolder(url), folder)
        hold.own = dataclasses.replace(hold.own, **({"host": "node7", "machine": "node7", "pid": 4711} | of))
        made.append(hold)
        return hold

    yield make
    for hold in made:
        hold.released.set()


class TestOneWriter:
    """A mirror is written by one process at a time."""

    @pytest.fixture(autouse=True)
    def soon(self, monkeypatch):
        for name, seconds in {"REFRESH": 0.2, "PATIENCE": 0.4, "POLL": 0.1}.items():
            monkeypatch.setattr(mirror_holder, f"HOLDER_{name}", seconds)

    @pytest.fixture(params=["s3", "folder"])
    def url(self, request, s3, tmp_path):
        return f"{s3}/{tmp_path.name}" if request.param == "s3" else str(tmp_path / "mirror")

    def test_a_second_machine_waits_for_silence(self, hold_of, url, tmp_path, monkeypatch, caplog):
        first, second = (hold_of(f"{url}/small", tmp_path, host=host, machine=host) for host in "ab")
        first.take()
        run = run_with(tmp_path / "runs", url)
        line = (
            r"another process writes to .*/small \(a, pid 4711, run .*, last seen 20.*\)\..* in 5 minutes; "
            rf"to take its place now, remove {url}/small/mirror.json\.$"
        )
        with pytest.raises(ValueError, match=line):
            train(run, say=quiet)
        assert not run.folder.exists() and not first.lost
        first.released.set()  # it is killed
        first.thread.join()
        monkeypatch.setattr(mirror_holder, "HOLDER_STALE", 0.5)
        second.take()
        assert "gives no sign of life" in caplog.text
        first.released.clear()  # it was only cut off
        first.keep()
        with pytest.raises(
            RemoteError, match=r"mirror.json is now that of b, .*: this process uploads no more"
        ):
            first.check()
        second.release()
        first.release()
        hold_of(f"{url}/small", tmp_path).take()

    def test_who_removes_the_file_takes_the_place(self, hold_of, url, tmp_path):
        first, second = hold_of(url, tmp_path), hold_of(url, tmp_path)
        first.take()
        first.remote.remove(mirror_holder.HOLDER)
        second.take(patience=0)
        first.keep()
        second.keep()
        assert first.lost and not second.lost

    def test_of_two_at_once_one_holds_it(self, hold_of, url, tmp_path):
        first, second = hold_of(url, tmp_path), hold_of(url, tmp_path)
        assert first.there() is None and second.there() is None
        first.write()
        second.write()
        first.keep()
        second.keep()
        assert bool(first.lost) != bool(second.lost)

    def test_processes_of_this_machine(self, hold_of, url, tmp_path):
        mine = Hold(RemoteFolder(url), tmp_path)
        here, parent = {"host": mine.own.host, "machine": mine.own.machine}, os.getppid()
        ended = hold_of(url, tmp_path, **here, pid=parent, started=1)  # its number is another's now
        ended.write()
        mine.take(patience=0)
        mine.release()
        alive = hold_of(url, tmp_path, **here, pid=parent, started=start_of(parent))
        alive.take()
        with pytest.raises(MirrorTaken, match=f"pid {parent}"):
            mine.take(patience=0)

    def test_results_wait_for_the_run_that_trains(self, hold_of, trained, caplog):
        hold_of(trained.remote.url, trained.folder).take()
        mirror_results(run_with(trained.folder.parent, trained.remote.url.removesuffix("/small")))
        assert "another process writes to" in caplog.text and not places(trained)


class TestErrors:
    def test_another_run(self, trained, tmp_path):
        trained.upload()
        run = small_run(
            tmp_path / "other", checkpoint={"mirror": str(tmp_path / "mirror")}, optimizer={"lr": 0.5}
        )
        with (
            pytest.raises(ValueError, match=r"mirror/small holds a run with other settings \(optimizer.lr"),
            mirrored(run, quiet),
        ):
            pass
        assert not run.folder.exists()

    def test_its_own_folder(self, tmp_path):
        run = run_with(tmp_path / "runs", tmp_path / "runs")
        with pytest.raises(ValueError, match=r"checkpoint.mirror: got .*; allowed: another folder"):
            train(run, say=quiet)

    def test_places_that_cannot_be_written(self, s3, tmp_path):
        for place in ("http://host", "hf://lab/runs"):
            with pytest.raises(ValueError, match=rf"checkpoint.mirror: got '{place}'; allowed: a URL to"):
                run_with(tmp_path, place)
        with pytest.raises(FileNotFoundError, match=r"s3://nowhere/small/mirror.json: no such file"):
            train(run_with(tmp_path / "runs", "s3://nowhere"), say=quiet)


@pytest.mark.slow
def test_a_killed_run_goes_on_on_another_machine(whole, bucket, s3, tmp_path):
    run, said = run_with(tmp_path / "runs", "s3://lab/killed", max_steps=6), []
    save_yaml(run, tmp_path / "run.yaml")
    words = ("train", str(tmp_path / "run.yaml"), "training.max_steps=400")
    process = forked(1, PROGRAM, *words, log=tmp_path / "log", **bucket.environment())
    until(lambda: complete_steps(run), process, 300)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    shutil.rmtree(run.folder)
    step = complete_steps(run)[-1]  # those before it may not have been removed yet
    new = run_with(tmp_path / "new", "s3://lab/killed", max_steps=step + 3)
    train(new, say=said.append)
    assert f"small: its checkpoint of step {step} comes from s3://lab/killed/small" in said
    plain = small_run(tmp_path / "plain", training={"max_steps": step + 3})
    train(plain, say=quiet)
    assert_same_weights(plain, new)
