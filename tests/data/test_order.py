import numpy as np
import pytest

from lit_transdiff.data.index import read_index
from lit_transdiff.data.order import (
    BatchLayout,
    TrainPlan,
    coin_flips,
    epoch_order,
    evaluation_batches,
    generator,
)


def global_batches(plan, global_batch, world, micro_batch, steps):
    """Rows of each global batch, put together from what every rank reads."""
    layouts = [BatchLayout(global_batch, micro_batch, rank, world) for rank in range(world)]
    batches = []
    for step in range(steps):
        parts = []
        for part in range(layouts[0].accumulation):
            starts = [layout.start(step * layout.accumulation + part) for layout in layouts]
            parts += [plan.rows(start, start + micro_batch) for start in starts]
        batches.append([np.concatenate(column) for column in zip(*(rows[:3] for rows in parts), strict=True)])
    return batches


def test_coin_flips_are_fair_and_independent_of_each_other_and_of_other_epochs_and_seeds():
    first, *others = (coin_flips(seed, epoch, 10_000) for seed, epoch in ((0, 0), (0, 1), (1, 0), (-1, 0)))
    assert np.array_equal(first, coin_flips.__wrapped__(0, 0, 10_000))
    for other in others:
        assert abs(first.mean() - 0.5) < 0.025 and abs((first == other).mean() - 0.5) < 0.025  # 5 sigma
    assert abs((first[1:] == first[:-1]).mean() - 0.5) < 0.025


@pytest.mark.parametrize("num_references", [1, 3])
def test_global_batches_do_not_depend_on_how_they_are_cut(shards, num_references):
    plan = TrainPlan(read_index(shards), 5, num_references=num_references, block=3)
    whole = global_batches(plan, 64, 1, 64, 4)
    for world, micro_batch in [(2, 32), (4, 16), (2, 8), (1, 16), (4, 4)]:
        for expected, found in zip(whole, global_batches(plan, 64, world, micro_batch, 4), strict=True):
            for a, b in zip(expected, found, strict=True):
                assert np.array_equal(a, b)


def test_every_item_once_an_epoch_and_batches_straddle(shards):
    index = read_index(shards)
    plan = TrainPlan(index, 0, block=2)
    rows = plan.rows(0, 3 * len(index))
    for epoch in range(3):
        assert sorted(rows.samples[rows.epochs == epoch, 0]) == list(range(len(index)))
    straddling = plan.rows(len(index) - 2, len(index) + 2)
    assert straddling.epochs.tolist() == [0, 0, 1, 1]
    assert np.array_equal(straddling.samples, rows.samples[len(index) - 2 : len(index) + 2])
    assert not np.array_equal(rows.samples[: len(index)], rows.samples[len(index) : 2 * len(index)])


def test_order_depends_on_seed_and_epoch_and_keeps_blocks_of_shards_together(shards):
    starts = read_index(shards).starts
    orders = [epoch_order(starts, seed, epoch, 2).tolist() for seed in (0, 1, -1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 6
    shard_of = np.searchsorted(starts, orders[0], side="right")
    assert len(set(shard_of[:14])) <= 3  # two whole shards of 7 (or a last one that is shorter)
    assert (
        generator(0, 0).integers(1 << 60)
        != generator(0, 0, 0).integers(1 << 60)
        != generator(0, 0, 1).integers(1 << 60)
    )


def test_micro_batch_must_divide():
    with pytest.raises(ValueError, match=r"training\.micro_batch_size: got 24"):
        BatchLayout(64, 24, 0, 2)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_reads_each_sample_once(shards, world, batch_size):
    index = read_index(shards)
    ranks = [
        evaluation_batches(
            index, num_references=1, batch_size=batch_size, rank=r, world=world, seed=0, num_samples=None
        )
        for r in range(world)
    ]
    assert sorted(int(p) for batches in ranks for rows in batches for p in rows.positions) == list(
        range(len(index))
    )
    assert len({len(batches) for batches in ranks}) == 1
    assert all(
        0 < len(rows.positions) <= batch_size + (batch_size == 1) for batches in ranks for rows in batches
    )


def test_first_evaluation_samples_are_a_fixed_mixture(shards):
    index = read_index(shards)
    options = dict(num_references=1, batch_size=8, seed=3, num_samples=40)
    alone = np.concatenate([rows.positions for rows in evaluation_batches(index, rank=0, world=1, **options)])
    pair = [
        np.concatenate([rows.positions for rows in evaluation_batches(index, rank=r, world=2, **options)])
        for r in (0, 1)
    ]
    assert len(set(alone)) == 40 and set(index.label[alone]) == set(range(5))
    assert set(alone) == set(np.concatenate(pair))
