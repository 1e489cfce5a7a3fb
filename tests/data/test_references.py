import json

import numpy as np
import pytest

from lit_transdiff.data.index import read_index
from lit_transdiff.data.plan import TrainPlan
from lit_transdiff.data.references import group_references, read_groups


@pytest.mark.parametrize("num_references", [2, 4, 7])
def test_groups_are_of_one_class_without_repeats(num_references):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 3000)
    expected = int((np.bincount(labels) // num_references).sum())
    for _ in range(3):
        groups, left_over = group_references(labels, rng.permutation(3000), num_references)
        assert groups.shape == (expected, num_references) and groups.dtype == np.int64
        assert (labels[groups] == labels[groups[:, :1]]).all()
        assert len(np.unique(groups)) == groups.size
        assert left_over == 3000 - groups.size


def test_groups_follow_the_order_one_by_one():
    """The same groups as a plain loop with one open group a class."""
    rng = np.random.default_rng(1)
    labels, order = rng.integers(0, 5, 200), rng.permutation(200)
    waiting, expected = {c: [] for c in range(5)}, []
    for sample in order:
        waiting[labels[sample]].append(sample)
        if len(waiting[labels[sample]]) == 4:
            expected.append(waiting[labels[sample]])
            waiting[labels[sample]] = []
    assert group_references(labels, order, 4)[0].tolist() == expected


def test_one_reference_passes_through():
    order = np.array([2, 0, 1])
    groups, left_over = group_references(np.zeros(3, int), order, 1)
    assert groups.tolist() == [[2], [0], [1]] and left_over == 0


def test_imagenet_scale():
    rng = np.random.default_rng(0)
    groups, _ = group_references(rng.integers(0, 1000, 1_281_167).astype(np.int32), rng.permutation(1_281_167), 4)
    assert len(groups) > 319_000


def test_a_class_smaller_than_a_group_is_an_error(shards):
    with pytest.raises(ValueError, match=r"model\.num_references: got 14, but class 'ant' .* has only 13 images"):
        TrainPlan(read_index(shards), 0, num_references=14)


def test_fixed_groups(shards, tmp_path):
    index = read_index(shards)
    keys = [[index.key_of(s) for s in np.flatnonzero(index.label == c)[:3]] for c in range(5)]
    path = tmp_path / "groups.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in keys))
    groups = read_groups(path, index, 3)
    plan = TrainPlan(index, 0, num_references=3, groups=groups)
    assert sorted(plan.rows(0, 5).samples.tolist()) == sorted(groups.tolist()) == sorted(plan.rows(5, 10).samples.tolist())
    (a, b, c), other = keys[0], keys[1][0]
    for line, message in [
        ([a, b], "number of keys: got 2"),
        ([a, b, "nobody"], "key: got 'nobody'"),
        ([a, b, b], "different images"),
        ([a, b, other], r"classes: got \['ant', 'bee'\]"),
        ("a", "a list of sample keys"),
    ]:
        path.write_text(json.dumps([a, b, c]) + "\n" + json.dumps(line))
        with pytest.raises(ValueError, match=f"line 2.*{message}"):
            read_groups(path, index, 3)
    path.write_text("[")
    with pytest.raises(ValueError, match="line 1: not JSON"):
        read_groups(path, index, 3)
