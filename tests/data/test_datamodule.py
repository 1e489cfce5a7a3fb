import logging

import numpy as np
import pytest
import torch

from lit_transdiff.config import DataConfig
from lit_transdiff.data.datamodule import DataModule
from tests.helpers.datamodule import fit, module_for

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


@pytest.mark.parametrize(("accumulation", "workers"), [(1, 0), (2, 0), (1, 2), (2, 2)])
def test_a_resumed_run_reads_what_the_uninterrupted_one_does(shards, tmp_path, accumulation, workers):
    def new():
        return module_for(shards, accumulation=accumulation, num_workers=workers, crop="random")

    whole = fit(new(), tmp_path / "whole", 6, accumulation).rows
    first = fit(new(), tmp_path / "part", 4, accumulation).rows
    rest = fit(new(), tmp_path / "rest", 6, accumulation, tmp_path / "part/step=4.ckpt").rows
    assert len(whole) == 6 * accumulation and first + rest == whole
    assert [p for positions, _, _ in whole for p in positions] == list(range(96))
    early = fit(new(), tmp_path / "early", 6, accumulation, tmp_path / "whole/step=1.ckpt").rows
    assert early == whole[accumulation:]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_finished_run_can_be_made_longer(shards, tmp_path, accumulation):
    whole = fit(module_for(shards, 6, accumulation), tmp_path / "whole", 6, accumulation).rows
    fit(module_for(shards, 3, accumulation), tmp_path / "short", 3, accumulation)
    rest = fit(
        module_for(shards, 6, accumulation),
        tmp_path / "more",
        6,
        accumulation,
        tmp_path / "short/step=3.ckpt",
    ).rows
    assert rest == whole[3 * accumulation :]


def test_validation_in_training_does_not_move_the_order(shards, tmp_path):
    whole = fit(module_for(shards), tmp_path / "a", 6).rows
    options = dict(limit_val_batches=None, val_check_interval=2, num_sanity_val_steps=1)
    recorder = fit(module_for(shards), tmp_path / "b", 5, **options)
    rest = fit(module_for(shards), tmp_path / "c", 6, ckpt_path=tmp_path / "b/step=5.ckpt", **options)
    assert recorder.rows + rest.rows == whole
    assert sorted(rest.validated[-65:]) == list(range(65))


def test_same_rows_whatever_the_accumulation_and_workers(shards):
    expected = [batch for batch in module_for(shards).train_dataloader()]
    for accumulation, workers in [(1, 1), (4, 0), (2, 2)]:
        loader = module_for(shards, accumulation=accumulation, num_workers=workers).train_dataloader()
        assert len(loader) == 6 * accumulation
        found = list(loader)
        for name in ("values", "labels", "samples", "positions"):
            a, b = (torch.cat([getattr(batch, name) for batch in batches]) for batches in (expected, found))
            assert torch.equal(a, b)


def test_resuming_with_another_batch_is_refused(shards, tmp_path):
    fit(module_for(shards), tmp_path, 2)
    other = module_for(shards)
    other.global_batch_size = other.micro_batch_size = 8
    with pytest.raises(ValueError, match="resuming with another global_batch_size: got 8; allowed: 16"):
        fit(other, tmp_path / "other", 3, ckpt_path=tmp_path / "step=2.ckpt")
    with pytest.raises(ValueError, match=r"Trainer\(accumulate_grad_batches\): got 1; allowed: 2"):
        fit(module_for(shards, accumulation=2), tmp_path / "other", 3)
    with pytest.raises(ValueError, match=r"Trainer\(max_steps\): got 7; allowed: at most 6"):
        fit(module_for(shards), tmp_path / "other", 7)


def test_a_run_of_an_earlier_version_is_told_of_the_new_rule_of_augmentation(shards, caplog):
    loader = module_for(shards).train_dataloader()
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert not caplog.records
    del state["rule of augmentation"]
    loader.load_state_dict(state)
    assert "mirrored and cropped other images" in caplog.text
    caplog.clear()
    module_for(shards, horizontal_flip=False).train_dataloader().load_state_dict(state)
    assert not caplog.records


def test_batches_and_names(shards):
    module = module_for(shards, num_references=3)
    batch = next(iter(module.train_dataloader()))
    assert batch.values.shape == (16, 3, 1, 8, 8) and batch.values.dtype == torch.float32
    assert batch.values.min() >= -1 and batch.values.max() <= 1
    index = module.train_index
    assert torch.equal(
        torch.from_numpy(index.label[batch.samples.numpy()]).long(), batch.labels[:, None].expand(-1, 3)
    )
    assert module.keys(batch.samples)[1] == index.name_of(int(batch.samples[0, 1]))
    assert batch.to("meta").values.device.type == "meta"
    assert module.class_names[0] == "ant"


def test_flips_are_seeded_and_evaluation_has_none(shards):
    module, plain = module_for(shards), module_for(shards, horizontal_flip=False)
    flips = []
    for a, b in zip(module.train_dataloader(), plain.train_dataloader(), strict=True):
        assert torch.equal(a.samples, b.samples)
        for x, y in zip(a.values, b.values, strict=True):
            assert torch.equal(x, y) or torch.equal(x, y.flip(-1))
            flips.append(not torch.equal(x, y))
    assert 0.3 < np.mean(flips) < 0.7
    assert flips[:31] != flips[65:96]  # another epoch
    for a, b in zip(module.val_dataloader(), plain.val_dataloader(), strict=True):
        assert torch.equal(a.values, b.values) and torch.equal(a.positions, a.samples[:, 0])


def test_validation_sizes(shards):
    module = module_for(shards, num_references=2)
    assert sum(len(batch.labels) for batch in module.val_dataloader()) == 30  # 6 pairs of each class of 13
    module.num_validation_samples = 12
    (batch,) = module.val_dataloader()
    assert batch.samples.shape == (6, 2) and len(batch.samples.unique()) == 12
    module.num_validation_samples = 0
    assert module.val_dataloader() == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train="/nowhere"), "lit-transdiff pack SRC /nowhere"),
        (dict(train="ftps://host/x"), "ftps://host/x: got 'ftps'; allowed: a folder, or a URL of s3://"),
        (dict(train=""), "data.train: got None"),
        (dict(index="index.json"), "data.index: got 'index.json'"),
        (dict(num_references=14), "has only 13 images"),
        (dict(num_classes=10), r"data.train: classes in .*: got 5; allowed: model.num_classes=10"),
        (dict(micro_batch_size=5), "training.micro_batch_size: got 5"),
        (dict(train="pipe:cat x.tar"), "data.index: got None"),
        (
            dict(train="pipe:cat x.tar", index="index.json", groups="groups.jsonl"),
            "data.groups: got 'groups.jsonl'; allowed: null",
        ),
        (dict(evaluation="http://host/x.tar"), "data.evaluation: got 'http"),
    ],
)
def test_errors_before_training(shards, changes, message):
    settings = dict(train=str(shards), image_size=8)
    options = dict(num_references=1, num_classes=5, global_batch_size=16, max_steps=2, seed=0)
    settings |= {k: v for k, v in changes.items() if k not in {*options, "micro_batch_size"}}
    options |= {k: v for k, v in changes.items() if k not in settings}
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DataModule(DataConfig(**settings), **options).train_dataloader()
