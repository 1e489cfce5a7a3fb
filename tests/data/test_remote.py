"""Shards in a bucket: the same batches as from a folder, whatever the network does."""

import os
import threading
import time

import numpy as np
import pytest
import s3fs
import torch

from lit_transdiff.base import remote
from lit_transdiff.base.remote_errors import RemoteError
from lit_transdiff.config import DataConfig
from lit_transdiff.data.dataset import PlannedDataset
from lit_transdiff.data.index import index_shards, read_index
from lit_transdiff.data.loaders import PlanSampler
from lit_transdiff.data.order import BatchLayout, Rows, TrainPlan
from lit_transdiff.data.remote_shards import CachedReader, RangeReader, ShardsAhead, reader_of
from lit_transdiff.data.shard_cache import ShardCache
from lit_transdiff.data.verify import verify
from tests.helpers.buckets import upload
from tests.helpers.datamodule import fit, module_for
from tests.helpers.hub_stub import HubStub

BLOCK = 3  # shards that are shuffled together
HF = "hf://datasets/lab/data/train"


pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def urls(bucket, shards):
    """The shards by scheme."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment().items():
            patch.setenv(name, value)
        upload(shards, "s3://lab/data/train")
    web = f"{bucket.http}/lab/data/train"
    return {"s3": "s3://lab/data/train", "http": web, "file": f"file://{shards}", "hf": HF}


@pytest.fixture(scope="module")
def hub(shards, tmp_path_factory):
    """The shards in a dataset on a Hub."""
    with pytest.MonkeyPatch.context() as patch, HubStub() as server:
        server.used_by(patch, tmp_path_factory.mktemp("home"))
        server.add(
            "lab/data", {f"train/{file.name}": file.read_bytes() for file in shards.iterdir()}, "dataset"
        )
        yield server
        assert server.unknown == []


def batches(module):
    return [
        (batch.positions.tolist(), batch.samples.tolist(), batch.values)
        for batch in module.train_dataloader()
    ]


def assert_equal_batches(one, other):
    assert len(one) == len(other) > 0
    for (positions, samples, values), (others, other_samples, other_values) in zip(one, other, strict=True):
        assert positions == others and samples == other_samples and torch.equal(values, other_values)


def gigabytes(shards, count):
    """The size of a cache for ``count`` shards."""
    return count * max(shard.bytes for shard in read_index(shards).shards) / 1e9


def kept(cache):
    return sorted(path for path in cache.iterdir() if path.name != "lock")


@pytest.mark.parametrize(
    ("scheme", "workers", "num_references"), [("hf", 0, 1), ("s3", 0, 3), ("http", 1, 3)]
)
def test_batches_are_those_of_a_folder(urls, hub, shards, tmp_path, scheme, workers, num_references):
    def module(place, **data):
        return module_for(
            place,
            max_steps=20,
            num_references=num_references,
            num_workers=workers,
            shuffle_block=BLOCK,
            **data,
        )

    options = dict(cache_dir=str(tmp_path), cache_gb=gigabytes(shards, 8))
    assert_equal_batches(batches(module(urls[scheme], **options)), batches(module(shards)))
    assert 0 < len(kept(tmp_path)) <= 8


def test_ranks_of_a_machine_share_a_cache(urls, shards, bucket, tmp_path):
    index, local = read_index(urls["s3"]), read_index(shards)
    data = DataConfig(cache_dir=str(tmp_path), image_size=8, image_channels=1)
    plan = TrainPlan(index, 0, num_references=2, block=BLOCK)
    expected = PlannedDataset(local, data, training=True)
    found = {}

    def read(rank):
        layout, dataset = BatchLayout(8, 4, rank, 2), PlannedDataset(index, data, training=True)
        sampler = PlanSampler(plan, layout, 12, lambda: 0, ShardsAhead(plan, 10**9))
        found[rank] = [dataset[rows] for rows in sampler]

    threads = [threading.Thread(target=read, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for step in range(12):
        batch = expected[plan.rows(8 * step, 8 * step + 8)]
        for name in ("values", "samples", "positions"):
            halves = [getattr(found[rank][step], name) for rank in range(2)]
            assert torch.equal(torch.cat(halves), getattr(batch, name))
    reads = [path for method, path in bucket.requests if method == "GET" and path.endswith(".tar")]
    assert len(reads) == len(set(reads)) == 10


def test_a_resumed_run_reads_what_the_uninterrupted_one_does(urls, shards, tmp_path):
    def new(place, **data):
        return module_for(place, shuffle_block=BLOCK, **data)

    data = dict(cache_dir=str(tmp_path / "cache"), cache_gb=gigabytes(shards, 4))
    whole = fit(new(shards), tmp_path / "local", 6).rows
    first = fit(new(urls["s3"], **data), tmp_path / "part", 4).rows
    rest = fit(new(urls["s3"], **data), tmp_path / "rest", 6, ckpt_path=tmp_path / "part/step=4.ckpt").rows
    assert first + rest == whole


def test_validation_reads_only_its_samples(urls, shards, bucket, tmp_path):
    def found(place, **data):
        module = module_for(place, evaluation=str(place), **data)
        module.num_validation_samples = 12
        return [(batch.samples.tolist(), batch.values) for batch in module.val_dataloader()]

    local, away = found(shards), found(urls["s3"], cache_dir=str(tmp_path))
    for (samples, values), (others, other_values) in zip(local, away, strict=True):
        assert samples == others and torch.equal(values, other_values)
    reads = [path for method, path in bucket.requests if method == "GET" and path.endswith(".tar")]
    assert len(reads) == 12 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("fault", ["drop", "truncate", "503"])
def test_faults_of_the_network_pass(urls, shards, bucket, tmp_path, fault):
    bucket.faults["train-000003.tar"] = [fault, fault]
    bucket.faults["index.npz"] = [fault]
    index = read_index(urls["s3"])
    reader = reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4)
    assert isinstance(reader, CachedReader)
    local = reader_of(read_index(shards), DataConfig(), max_open=4)
    sample = int(index.starts[3])
    assert reader.read(sample) == local.read(sample)
    assert not bucket.faults["train-000003.tar"] and not bucket.faults["index.npz"]


def test_a_server_that_ignores_ranges(urls, shards, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_BYTES", 4096)
    index, asked = read_index(urls["http"]), len(bucket.requests)
    local = reader_of(read_index(shards), DataConfig(), max_open=4)
    for few in (False, True):
        reader = reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4, few=few)
        bucket.faults["train-000006.tar"] = ["whole"]
        sample = int(index.starts[6]) + 2
        assert reader.read(sample) == local.read(sample)
    assert len(bucket.requests) == asked + 2  # not a whole file for each part of it


def test_a_server_that_hangs_is_asked_again(urls, shards, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_LIMIT", 1.0)
    bucket.delay, bucket.faults["index.json"] = 5.0, ["hang"]
    assert len(read_index(urls["s3"])) == len(read_index(shards))
    bucket.faults["index.json"] = ["hang"] * 10
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(RemoteError, match=r"index.json: failed after 2 attempts: "):
        read_index(urls["s3"])


@pytest.mark.parametrize("scheme", ["s3", "http"])
def test_a_server_that_trickles_is_asked_again(urls, shards, bucket, monkeypatch, scheme):
    index = read_index(urls[scheme])
    monkeypatch.setattr(remote, "REQUEST_LIMIT", 0.2)
    reader, local = (
        reader_of(index, DataConfig(), 4, few=True),
        reader_of(read_index(shards), DataConfig(), 4),
    )
    bucket.delay, bucket.faults["train-000005.tar"] = 0.05, ["trickle"]  # each read of a byte succeeds
    sample = int(index.starts[5])
    assert reader.read(sample) == local.read(sample)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    bucket.faults["train-000005.tar"] = ["trickle"] * 2
    with pytest.raises(
        RemoteError, match=r"train-000005.tar: failed after 2 .*: no complete answer within 0.2"
    ):
        reader.read(sample)


def test_a_dataset_on_the_hub_is_read_by_ranges_and_bounded_in_time(hub, shards, monkeypatch):
    sizes = []
    monkeypatch.setattr(hub, "spoil", lambda content: (sizes.append(len(content)), content)[1])
    index = read_index(HF)
    reader, local = (
        reader_of(index, DataConfig(), 4, few=True),
        reader_of(read_index(shards), DataConfig(), 4),
    )
    sizes.clear()
    assert reader.read(9) == local.read(9)
    assert sizes == [index.size[9] + 1]  # not the shard behind it
    monkeypatch.setattr(remote, "REQUEST_LIMIT", 0.1)
    monkeypatch.setattr(hub, "spoil", lambda content: (time.sleep(0.1 + 0.2 * (not sizes)), content)[1])
    with pytest.raises(RemoteError, match=r"tar: failed after 5 attempts: no complete answer within 0.1 s"):
        reader.read(9)
    for place, said in (("lab/none", "has no index.json"), ("lab/data@v9/train", "has no index.json")):
        with pytest.raises(FileNotFoundError, match=said):
            read_index(f"hf://datasets/{place}")
    hub.trouble = 403
    with pytest.raises(RemoteError, match="access refused"):
        read_index(HF)
    hub.trouble = None


def test_a_large_index_comes_in_parts(urls, bucket, monkeypatch):
    monkeypatch.setattr(remote, "REQUEST_BYTES", 1000)
    asked = len(bucket.requests)
    assert len(read_index(urls["s3"])) == 65
    assert sum("index.npz" in path for _, path in bucket.requests[asked:]) > 2


def test_a_shard_that_arrives_damaged_is_downloaded_again(urls, shards, bucket, tmp_path):
    index = read_index(urls["http"])
    reader = reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4)
    bucket.faults["train-000002.tar"] = ["damage", "damage"]
    sample = int(index.starts[2])
    assert reader.read(sample) == reader_of(read_index(shards), DataConfig(), 4).read(sample)
    assert [path.suffix for path in kept(tmp_path)] == [".tar"]

    bucket.faults["train-000004.tar"] = ["damage"] * 3  # as if at its source
    with pytest.raises(ValueError, match=r"train-000004.tar/.*: the sample at byte .* is damaged"):
        reader.read(int(index.starts[4]))
    assert len(kept(tmp_path)) == 1
    asked = len(bucket.requests)
    with pytest.raises(ValueError, match=r"is damaged"):
        reader.read(int(index.starts[4]) + 1)  # not downloaded once more
    assert len(bucket.requests) == asked


def test_without_checksums_of_samples_that_of_the_shard_is_compared(shards, bucket, tmp_path):
    import dataclasses

    index = dataclasses.replace(read_index(f"file://{shards}"), checksum=None)
    assert ShardCache(index, DataConfig(cache_dir=str(tmp_path))).open(1) > 0
    wrong = dataclasses.replace(index, shards=(dataclasses.replace(index.shards[0], sha256="0" * 64),))
    with pytest.raises(RemoteError, match=r"its SHA-256 differs from that in the index after 3 downloads"):
        ShardCache(wrong, DataConfig(cache_dir=str(tmp_path))).open(0)


def test_a_shard_that_is_damaged_in_the_cache_is_downloaded_again(urls, tmp_path):
    index = read_index(urls["file"])
    reader = reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4)
    right = reader.read(0)
    [file] = kept(tmp_path)
    file.write_bytes(bytes(file.stat().st_size))
    assert reader.read(0) == right
    file.write_bytes(b"short")
    assert reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4).read(0) == right


def test_the_cache_stays_below_its_limit_and_keeps_what_was_read_last(urls, shards, tmp_path):
    data = DataConfig(cache_dir=str(tmp_path), cache_gb=gigabytes(shards, 3))
    for name in ("mine.tar", "mine.partial"):
        (tmp_path / name).write_bytes(bytes(100_000))
    cache = ShardCache(read_index(urls["file"]), data)
    for shard in (0, 1, 2, 0, 3):
        os.close(cache.open(shard))
    assert [shard for shard in range(10) if cache.holds(shard)] == [0, 2, 3]
    mine = [path for path in kept(tmp_path) if path.stem == "mine"]
    assert len(mine) == 2  # files of others are left alone
    assert sum(path.stat().st_size for path in kept(tmp_path) if path not in mine) <= cache.limit


def test_a_killed_download_leaves_nothing_wrong(urls, shards, tmp_path):
    cache = ShardCache(read_index(urls["file"]), DataConfig(cache_dir=str(tmp_path)))
    left, other = cache.path(0).with_suffix(".partial"), cache.path(1).with_suffix(".partial")
    left.write_bytes(b"half")  # nobody holds it any more
    other.write_bytes(b"half")
    os.close(cache.open(0))
    assert cache.path(0).read_bytes() == (shards / cache.index.shards[0].name).read_bytes()
    assert not left.exists() and not other.exists()


def test_processes_download_a_shard_once(urls, bucket, tmp_path):
    index = read_index(urls["s3"])
    caches = [ShardCache(index, DataConfig(cache_dir=str(tmp_path))) for _ in range(4)]
    threads = [threading.Thread(target=lambda c=c: os.close(c.open(5))) for c in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    reads = [path for method, path in bucket.requests if method == "GET" and "train-000005" in path]
    assert len(reads) == 1


def test_shards_are_downloaded_before_they_are_read(urls, bucket, tmp_path):
    index = read_index(urls["s3"])
    reader = reader_of(index, DataConfig(cache_dir=str(tmp_path)), max_open=4)
    assert isinstance(reader, CachedReader)
    nothing = np.zeros((0, 1), np.int64)
    reader.expect(Rows(nothing[:, 0], nothing[:, 0], nothing, ahead=(7, 2, 9)))
    for _ in range(400):
        if all(reader.cache.holds(shard) for shard in (7, 2, 9)):
            break
        threading.Event().wait(0.05)
    asked = len(bucket.requests)
    for shard in (7, 2, 9):
        reader.read(int(index.starts[shard]))
    assert len(bucket.requests) == asked


def test_what_is_ahead(shards):
    module = module_for(shards, shuffle_block=BLOCK)
    module.train_dataloader()
    sizes = np.array([shard.bytes for shard in module.train_index.shards])
    order, first, last = (ahead := ShardsAhead(module.plan, int(sizes.sum()))).uses(0)
    assert sorted(order) == list(range(len(sizes))) and (first <= last).all()
    assert ahead.at_once() == max(sizes[order[i : i + BLOCK]].sum() for i in range(0, len(sizes), BLOCK))
    assert ahead(0) == tuple(order) and ahead(1) == ()
    few = ShardsAhead(module.plan, int(4 * sizes.max()))
    assert few(0) == tuple(order[:4])
    assert few(int(last[order[:1]].max()) + 1)[0] != order[0] or len(few.last) == 4


def test_latents_by_range_requests(latents, tmp_path):
    folder = latents
    index, samples = read_index(f"file://{folder}"), np.array([3, 0, 5])
    length = index.latents.sample_bytes // 2
    first = np.array([0, length, length])
    found, expected = np.empty((2, 3, length), np.uint8)
    reader = reader_of(index, DataConfig(), max_open=4, few=True)
    assert isinstance(reader, RangeReader)
    reader.read_parts(samples, first, found)
    reader_of(read_index(folder), DataConfig(), max_open=4).read_parts(samples, first, expected)
    assert (found == expected).all()


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    from lit_transdiff.data.index import LatentInfo
    from lit_transdiff.data.shards import ShardWriter

    folder = tmp_path_factory.mktemp("latents")
    for shard in range(2):
        with ShardWriter(folder / f"{shard}.tar") as writer:
            for i in range(4):
                content = np.random.default_rng(10 * shard + i).standard_normal((2, 4, 2, 2))
                writer.write(f"{shard}-{i}", i % 2, "bin", content.astype(np.float16).tobytes())
    index_shards(folder, latents=LatentInfo((4, 2, 2), 2, "some", 8), progress=False)
    return folder


def test_verify_names_damage_in_a_bucket(urls, bucket):
    assert len(verify(urls["http"])) == 65
    bucket.faults["train-000001.tar"] = ["", "damage", "damage"]  # its size is asked first
    with pytest.raises(
        ValueError, match=r"1 of 10 shards differ from their SHA-256: train-000001.tar. Damaged"
    ):
        verify(urls["http"])


class TestErrors:
    """Each is one line, before anything is read."""

    def test_no_index(self, urls):
        for url in ("s3://lab/elsewhere", "s3://nowhere/data", urls["http"] + "/elsewhere"):
            with pytest.raises(
                FileNotFoundError, match=r"has no index.json, or does not exist. Index the shards"
            ):
                read_index(url)

    def test_no_credentials(self, monkeypatch, tmp_path):
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.delenv(name)
        s3fs.S3FileSystem.clear_instance_cache()
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(RemoteError, match=r"redentials.*AWS_ACCESS_KEY_ID"):
            read_index("s3://lab/data/train")
        s3fs.S3FileSystem.clear_instance_cache()

    def test_refused(self, urls, bucket):
        bucket.faults["index.json"] = ["403"] * 2  # to HEAD and GET
        with pytest.raises(RemoteError, match=r"index.json: access refused \("):
            read_index(urls["http"])

    def test_missing_package(self):
        with pytest.raises(ValueError, match=r"gs:// needs a package: pip install gcsfs"):
            read_index("gs://bucket/data")

    def test_unknown_scheme(self):
        with pytest.raises(ValueError, match=r"got 'ftps'; allowed: a folder, or a URL of s3://, gs://"):
            read_index("ftps://host/data")

    def test_wrong_host(self):
        with pytest.raises(
            RemoteError, match=r"127.0.0.1:9/data/index.json: failed after 5 attempts: Cannot conn"
        ):
            read_index("http://127.0.0.1:9/data")

    def test_missing_and_truncated_shards(self, shards, tmp_path):
        import shutil

        shutil.copytree(shards, tmp_path / "copy")
        file = tmp_path / "copy" / "train-000004.tar"
        file.write_bytes(file.read_bytes()[:-512])
        with pytest.raises(ValueError, match=r"train-000004.tar: .* in index.json: the shard is damaged"):
            read_index(f"file://{tmp_path}/copy")
        file.unlink()
        with pytest.raises(
            FileNotFoundError, match=r"train-000004.tar is in index.json but not in the folder"
        ):
            read_index(f"file://{tmp_path}/copy")

    def test_small_cache(self, urls, shards, tmp_path):
        for count, what in ((0.5, "the largest shard of file://"), (2, "the shards that are read at a time")):
            data = dict(cache_dir=str(tmp_path), cache_gb=gigabytes(shards, count))
            with pytest.raises(ValueError, match=rf"data.cache_gb: got .*; allowed: at least .*, {what}"):
                batches(module_for(urls["file"], shuffle_block=BLOCK, **data))

    def test_full_disk(self, urls, monkeypatch, tmp_path):
        from lit_transdiff.data import shard_cache

        data = DataConfig(cache_dir=str(tmp_path))
        cache = ShardCache(read_index(urls["file"]), data)
        full = tmp_path / "full"
        monkeypatch.setattr(
            ShardCache, "download", lambda *_: os.write(os.open("/dev/full", os.O_WRONLY), b"x")
        )
        with pytest.raises(RemoteError, match=r"data.cache_dir: the disk of .* is full"):
            cache.open(0)
        assert not kept(tmp_path) and not full.exists()
        monkeypatch.setattr(shard_cache, "free_bytes", lambda folder: 100)
        with pytest.raises(
            ValueError, match=r"data.cache_gb: got 50, but on the disk of .* only 100 bytes are free"
        ):
            ShardCache(read_index(urls["file"]), data)

    def test_a_stream_is_not_a_folder(self, urls):
        with pytest.raises(
            ValueError, match=r"data.index: got 'index.json'; allowed: null when data.train is"
        ):
            module_for(urls["s3"], index="index.json").setup()
        with pytest.raises(
            ValueError, match=r"data.evaluation: got 'http.*tar'; allowed: a folder of shards"
        ):
            module_for(urls["file"], evaluation="http://host/shard.tar").setup()
