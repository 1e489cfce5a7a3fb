"""Sampling: results are a function of label and seed alone."""

import gc
import weakref

import pytest
import torch
from torch import nn

from lit_transdiff.base.randomness import GlobalBatchNormal, PerImageNormal, mix
from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.models.context import ContextStream, null_contexts
from lit_transdiff.models.fusion import fused, fusion_pattern
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.loop import check_sampling, generate
from tests.helpers.small import small_run
from tests.helpers.small_model import build

pytestmark = pytest.mark.numeric

LABELS, SEEDS = torch.tensor([0, 3, 1]), [11, 12, 13]
SAMPLING = SamplingConfig(num_steps=3, guidance_scale=1.5)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_references", [1, 4])
def test_an_image_does_not_depend_on_its_batch(num_references: int):
    model = build(num_references)
    together = generate(model, LABELS, SAMPLING, SEEDS)
    assert together.shape == (3, num_references, 2, 4, 4)
    for i in range(3):
        alone = generate(model, LABELS[i : i + 1], SAMPLING, SEEDS[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_seeds_and_labels_matter_and_the_global_generator_does_not():
    model = build()
    torch.manual_seed(1)
    first = generate(model, LABELS, SAMPLING, SEEDS)
    torch.manual_seed(2)
    assert torch.equal(first, generate(model, LABELS, SAMPLING, SEEDS))
    assert not torch.allclose(first, generate(model, LABELS, SAMPLING, [1, 2, 3]))
    assert not torch.allclose(first, generate(model, LABELS.flip(0), SAMPLING, SEEDS))


def test_references_share_the_initial_noise_unless_told_otherwise():
    """With the velocity switched off, a deterministic solver gives the initial noise back."""
    model = build(4)
    nn.init.zeros_(model.decoder.final.linear.weight)
    images = generate(model, LABELS, SamplingConfig(solver="euler", num_steps=2), SEEDS)
    assert all(torch.equal(images[:, 0], images[:, r]) for r in range(1, 4))
    images = generate(model, LABELS, SamplingConfig(solver="euler", num_steps=2, reuse_noise=False), SEEDS)
    assert not torch.equal(images[:, 0], images[:, 1])


def test_guidance_of_each_reference():
    model = build(4)
    plain = generate(model, LABELS, SamplingConfig(num_steps=2), SEEDS)
    last = generate(model, LABELS, SamplingConfig(num_steps=2, reference_guidance=[1, 1, 1, 3.0]), SEEDS)
    assert torch.equal(plain[:, :3], last[:, :3])
    assert not torch.allclose(plain[:, 3], last[:, 3])


def test_earlier_references_may_take_fewer_steps():
    model, rows = build(4), []
    model.decoder.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    fewer = SamplingConfig(num_steps=5, reference_steps=[1, 1, 2, 5])
    images = generate(model, LABELS, fewer, SEEDS)
    assert len(rows) == 9
    one = generate(model, LABELS, SamplingConfig(num_steps=1), SEEDS)
    assert torch.equal(images[:, 0], one[:, 0]) and not torch.allclose(images[:, 3], one[:, 3])


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize("num_references", [1, 4])
@pytest.mark.parametrize(
    "labels", [torch.tensor([2, 0, 2]), torch.tensor([3, 3, 3]), None], ids=["two", "one", "null"]
)
@pytest.mark.parametrize("asked", [(0, 1, 2, 3), (0, 2, 3), (3,)], ids=str)
def test_a_context_made_in_groups_is_the_one_made_at_once(
    num_references: int, labels: torch.Tensor | None, asked: tuple[int, ...]
):
    model, images = build(num_references), torch.randn(3, 3, 2, 4, 4)
    asked = tuple(r for r in asked if r < num_references) or (0,)
    stream = ContextStream(model, labels)
    parts = [stream.advance(images[:, :r]) for r in asked]
    drop = None if labels is not None else torch.ones(3, dtype=torch.bool)
    whole = model.encode(
        torch.zeros(3, dtype=torch.long) if labels is None else labels, images[:, : asked[-1]], drop
    )
    torch.testing.assert_close(torch.cat([part.expand(3, -1, -1) for part in parts], dim=1), whole)


@torch.no_grad()
def test_sampling_computes_nothing_twice():
    """Each token of the encoder once, for each class of the batch; keys and values of the decoder once for
    all steps.
    """
    model, seen = build(4), []
    model.encoder.blocks[0].register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape[:2]))
    )
    model.decoder.context_projection.register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(output.shape[:2]))
    )
    generate(model, torch.tensor([1, 1, 4]), SAMPLING, SEEDS)
    # per reference: the encoder and the decoder's projection, with the class and without; 3 class tokens,
    # groups of 4
    assert seen == [(2, 7), (3, 4), (1, 7), (1, 4)] + [(3, 4)] * 12


@pytest.mark.usefixtures("float64")
def test_fusion_of_nothing_and_of_everything():
    model, second = build(), torch.tensor([4, 4, 4])
    none, everything = torch.zeros(16, dtype=torch.bool), torch.ones(16, dtype=torch.bool)
    for pattern, labels in ((none, LABELS), (everything, second)):
        mixed = generate(model, LABELS, SAMPLING, SEEDS, fused(second, pattern))
        torch.testing.assert_close(mixed, generate(model, labels, SAMPLING, SEEDS))


def test_fusion_patterns():
    assert fusion_pattern(6, "halves").tolist() == [False] * 3 + [True] * 3
    random = fusion_pattern(16, "random", seed=1)
    assert random.sum() == 8 and torch.equal(random, fusion_pattern(16, "random", seed=1))
    with pytest.raises(ValueError, match=r"fusion: 'halfs' is not known\. Did you mean 'halves'"):
        fusion_pattern(16, "halfs")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"sampling\.solver: 'eulr' is not known\. Did you mean 'euler'"):
        check_sampling(SamplingConfig(solver="eulr"), ModelConfig())


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("num_references", [1, 4])
def test_semantic_features_are_those_of_the_whole_row(num_references: int, tmp_path):
    geometry = {
        "latent_channels": 2,
        "latent_size": 4,
        "patch_size": 1,
        "num_classes": 5,
        "num_references": num_references,
    }
    run = small_run(tmp_path, model=geometry, sampling={"num_steps": 2})
    generator = Generator(build(num_references), load_autoencoder("identity", None, 2), run, list("abcde"))
    features = generator.features([0, 3])
    assert features.shape == (2, 16, 16)
    torch.testing.assert_close(features[1:], generator.features([3]))


@pytest.mark.parametrize("num_references", [1, 4])
def test_a_generator_begins_the_null_class_once_for_the_same_weights(num_references: int, tmp_path):
    geometry = {
        "latent_channels": 2,
        "latent_size": 4,
        "patch_size": 1,
        "num_classes": 5,
        "num_references": num_references,
    }
    model, begun = build(num_references).requires_grad_(False), []
    generator = Generator(
        model, load_autoencoder("identity", None, 2), small_run(tmp_path, model=geometry), list("abcde")
    )
    model.encoder.input_norm.register_forward_hook(lambda module, inputs, output: begun.append(len(output)))
    drawn = []
    for change, times in ((1.0, 1), (1.0, 0), (1.5, 1), (1.0, 0)):
        if change != 1:
            model.encoder.null_class.mul_(change)
            generator = generator.of(model)
        begun.clear()
        drawn.append(generator.latents(LABELS, SEEDS, SAMPLING))
        assert begun.count(1) == times  # one row: the null class; labels and later groups have three
        assert torch.equal(drawn[-1], generate(model, LABELS, SAMPLING, SEEDS))
    assert (
        torch.equal(drawn[0], drawn[1])
        and torch.equal(drawn[2], drawn[3])
        and not torch.equal(drawn[1], drawn[2])
    )


@torch.no_grad()
@pytest.mark.parametrize("labels", [LABELS, None], ids=["classes", "null"])
def test_a_context_that_is_done_with_frees_its_memory_at_once(labels: torch.Tensor | None):
    """Keys and values of a batch are large, and the collector of circles may come late."""
    gc.disable()
    try:
        stream = null_contexts(build(4))() if labels is None else ContextStream(build(4), labels)
        stream.advance(torch.randn(3, 1, 2, 4, 4))
        left = weakref.ref(stream)
        del stream
        assert left() is None
    finally:
        gc.enable()


def test_generator_checks_labels_and_gives_images(tmp_path):
    run = small_run(tmp_path)
    model = build(1, latent_channels=1, latent_size=32, patch_size=8, num_classes=10)
    generator = Generator(model, load_autoencoder("identity", None, 1), run, [str(c) for c in range(10)])
    images = generator.images([1, 2], [5, 6])
    assert images.shape == (2, 1, 1, 32, 32) and images.min() >= -1 and images.max() <= 1
    with pytest.raises(ValueError, match="classes: got 10; allowed: 0 to 9"):
        generator.images([10], [1])
    with pytest.raises(ValueError, match="seeds: got 1"):
        generator.images([1, 2], [1])
    with pytest.raises(
        ValueError, match=r"sampling\.precision: got 'bf16'; allowed: 'fp32', .*generator\.at\('bf16'\)"
    ):
        generator.images([1], [1], SamplingConfig(precision="bf16"))
    with pytest.raises(ValueError, match=r"sampling\.precision: 'bf61' is not known\. Did you mean 'bf16'"):
        generator.at("bf61")
    assert generator.at("fp32") is generator
    rounded = generator.at("bf16")
    assert rounded.precision == "bf16" and not torch.equal(rounded.images([1, 2], [5, 6]), images)


class TestRandomness:
    def test_rows_of_a_global_batch_do_not_depend_on_how_it_is_cut(self):
        whole = GlobalBatchNormal(7, 8, torch.arange(8))
        part = GlobalBatchNormal(7, 8, torch.tensor([5, 2]))
        for shape in ((), (3,), (2, 2)):
            assert torch.equal(whole(*shape)[[5, 2]], part(*shape))

    def test_one_generator_an_image(self):
        assert torch.equal(PerImageNormal([1, 2, 3])(4)[1:2], PerImageNormal([2])(4))

    def test_mix_tells_its_parts_apart(self):
        seeds = {mix(0, "a", 1), mix(0, "a", 11), mix(0, "a1", 1), mix(1, "a", 1), mix(0, 1), mix(1, 0)}
        assert len(seeds) == 6 and all(0 <= seed < 2**63 for seed in seeds)
