import re
import shutil

import pytest
import torch

from lit_transdiff.config import DataConfig
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import index_shards, read_index
from lit_transdiff.data.order import BatchLayout
from lit_transdiff.data.stream import StreamDataset
from tests.helpers.datamodule import fit, module_for
from tests.helpers.shards import bad_shards, png, write_tar


def remote(folder, name="train", last=9):
    """The settings that read local tars as if they were far away."""
    return dict(
        train=f"pipe:cat {folder}/{name}-{{000000..{last:06d}}}.tar", index=str(folder / "index.json")
    )


def streamed(shards, rank=0, world=1, steps=12, num_references=1, batch=8, **data):
    layout = BatchLayout(batch, batch // world, rank, world)
    config = DataConfig(**(remote(shards) | dict(image_size=8, image_channels=1) | data))
    return StreamDataset(read_index(shards, check_files=False), config, 0, layout, steps, num_references)


@pytest.mark.parametrize("num_references", [1, 2])
@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_a_resumed_stream_reads_what_the_uninterrupted_one_does(
    shards, tmp_path, accumulation, workers, num_references
):
    def new():
        return module_for(
            shards,
            accumulation=accumulation,
            num_workers=workers,
            num_references=num_references,
            **remote(shards),
        )

    whole = fit(new(), tmp_path / "whole", 6, accumulation).rows
    assert [p for positions, _, _ in whole for p in positions] == list(range(96))
    for step in (1, 5):  # in the first and in the second epoch
        rest = fit(new(), tmp_path / str(step), 6, accumulation, tmp_path / f"whole/step={step}.ckpt").rows
        assert rest == whole[step * accumulation :]


def test_each_sample_once_an_epoch_over_ranks(shards):
    index = read_index(shards)
    orders = []
    for rank in range(2):
        samples = (
            torch.cat([batch.samples for batch in streamed(shards, rank, 2, steps=40)]).flatten().tolist()
        )
        orders.append(samples)
    first_epoch = [order[: len(order) // 5] for order in orders]  # 32 of about 32 samples of a rank and epoch
    for order in first_epoch:
        assert len(order) - len(set(order)) <= 3
    assert not set(orders[0][:25]) & set(orders[1][:25])
    alone = torch.cat([batch.samples for batch in streamed(shards, steps=25)]).flatten().tolist()
    assert sorted(alone[:65]) == sorted(alone[65:130]) == list(range(len(index)))
    assert alone[:65] != alone[65:130]


@pytest.mark.parametrize("world", [1, 2])
def test_groups_are_of_one_class_and_use_every_image_of_an_epoch(shards, world):
    index = read_index(shards)
    used, per_epoch = [], 0
    for rank in range(world):
        dataset = streamed(shards, rank, world, steps=8, num_references=3)
        rows = torch.cat([batch.samples for batch in dataset]).tolist()
        for row in rows:
            assert len(set(row)) == 3 and len(set(index.label[row])) == 1
        counts = dataset.share(0, rank, world)[1]
        share = int((-(-counts // 3)).sum())
        used += [sample for row in rows[:share] for sample in row]
        per_epoch += share
        assert rows[:share] != rows[share : 2 * share]
    assert set(used) == set(range(len(index))) and len(used) == 3 * per_epoch


def test_what_a_reader_has_too_few_of_is_left_out_with_a_warning(shards, caplog):
    """Two shards hold 14 images: of some of the five classes fewer than three."""
    index = read_index(shards)
    dataset = streamed(shards, world=5, steps=20, num_references=3, batch=10)
    share = re.search(
        r"data\.train: (\d+)% of the images are left out .* one of 5 readers has fewer than 3", caplog.text
    )
    assert share is not None and 0 < int(share[1]) < 60
    rows = torch.cat([batch.samples for batch in dataset]).tolist()
    assert len(rows) == 40
    assert all(len(set(row)) == 3 and len(set(index.label[row])) == 1 for row in rows)
    with pytest.raises(
        ValueError, match=r"model\.num_references: got 7, but no class is as often in 1 of 10 shards"
    ):
        streamed(shards, world=10, num_references=7, batch=10)


def test_values_are_those_of_the_local_reader(shards):
    local = {}
    for batch in module_for(shards, horizontal_flip=False).train_dataloader():
        local |= dict(
            zip(batch.samples[:, 0].tolist(), zip(batch.values, batch.labels, strict=True), strict=True)
        )
    for batch in streamed(shards, horizontal_flip=False):
        for sample, values, label in zip(
            batch.samples[:, 0].tolist(), batch.values, batch.labels, strict=True
        ):
            assert torch.equal(local[sample][0], values) and local[sample][1] == label


def test_a_truncated_shard_is_noticed(shards, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(shards, copy)
    third = copy / "train-000003.tar"
    third.write_bytes(third.read_bytes()[:5200])  # two whole samples
    with pytest.raises(ValueError, match=r"train-000003\.tar: only 2 of 7 samples"):
        list(streamed(copy))
    dataset = streamed(copy, on_bad_sample="skip")
    whole = list(dataset)
    first_epoch = torch.cat([batch.samples for batch in whole]).flatten().tolist()[:65]
    start = int(dataset.index.starts[3])
    assert set(range(65)) - set(first_epoch) >= set(range(start + 2, start + 7))
    assert "train-000003.tar" in caplog.text and "(5 skipped by this process)" in caplog.text
    for step in range(12):
        dataset.first_micro_step = step
        rest = list(dataset)
        assert [b.samples.tolist() for b in rest] == [b.samples.tolist() for b in whole[step:]]


def test_a_bad_image_goes_by_the_same_rule(tmp_path, caplog):
    bad_shards(tmp_path, b"not an image")
    (tmp_path / "a.tar").rename(tmp_path / "train-000000.tar")
    index_shards(tmp_path, progress=False)
    settings = dict(train=f"pipe:cat {tmp_path}/train-000000.tar")
    with pytest.raises(ValueError, match=r"train-000000\.tar/1: not a readable image"):
        list(streamed(tmp_path, **settings))
    batches = list(streamed(tmp_path, on_bad_sample="skip", **settings))
    assert len(batches) == 12 and all(1 not in batch.samples for batch in batches)
    assert "bad sample train-000000.tar/1" in caplog.text


def test_pickles_and_other_shards_are_refused(tmp_path, shards):
    write_tar(tmp_path / "train-000000.tar", ("1.png", png()), ("1.cls", b"0"))
    index_shards(tmp_path, progress=False)
    settings = dict(train=f"pipe:cat {tmp_path}/train-000000.tar", on_bad_sample="skip")
    write_tar(tmp_path / "train-000000.tar", ("1.png", png()), ("1.cls", b"0"), ("1.pyd", b"any code"))
    with pytest.raises(ValueError, match=r"train-000000\.tar: sample '1' has a pickle \(\.pyd\)"):
        list(streamed(tmp_path, **settings))
    with pytest.raises(ValueError, match=r"data\.train: URLs: got 9; allowed: 10"):
        streamed(shards, **remote(shards, last=8))
    with pytest.raises(ValueError, match=r"data\.train: got 'pipe:cat .*other-000000\.tar'"):
        streamed(shards, **remote(shards, name="other"))
    for url in ("PIPE:cat {a}", "{pipe,pipe}:cat", "http://x/{0..1}.tar::pipe:cat", "s3://x/{0..1}"):
        url = url.replace("{0..1}", "{000000..000007}").replace("{a}", "{000000..000009}")
        with pytest.raises(ValueError, match=r"data\.train: "):
            streamed(shards, train=url, index=str(shards / "index.json"))
    with pytest.raises(ValueError, match=r"data\.num_workers: got 6; allowed: at most 10 shards / 2 ranks"):
        streamed(shards, world=2, num_workers=6)


def test_a_failing_command_is_reported(shards):
    with pytest.raises(ValueError, match="only 0 of 7 samples"):
        list(streamed(shards, train=remote(shards)["train"].replace("cat ", "cat /nowhere")))


def test_without_trainer(shards):
    options = dict(num_references=1, num_classes=5, global_batch_size=8, max_steps=2, seed=0)
    module = DataModule(DataConfig(**remote(shards), image_size=8, image_channels=1), **options)
    assert len(module.train_dataloader()) == len(list(module.train_dataloader())) == 2
