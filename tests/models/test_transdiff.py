"""Properties of the model that hold whatever its weights are."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from einops import repeat
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.models.adapt import AdaptReport, match
from lit_transdiff.models.decoder import Memory
from lit_transdiff.models.tokens import patchify, token_similarity, unpatchify
from lit_transdiff.models.transdiff import TransDiff
from tests.helpers.small_model import build

pytestmark = pytest.mark.numeric

in_float64 = pytest.mark.usefixtures("float64")


def inputs(rows: int, references: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) % 5, torch.randn(rows, references, 2, 4, 4)


@pytest.mark.parametrize("num_references", [1, 4])
def test_every_parameter_gets_a_gradient(num_references: int):
    model = build(num_references).train()
    labels, x = inputs(6, num_references)
    memory = model.memory(model.encode(labels, x[:, :-1], torch.arange(6) < 2), every_reference=True)
    rows = repeat(x, "b r c h w -> (r m b) c h w", m=2)
    model.velocity(rows, torch.rand(len(rows)), memory).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert without == []


@torch.no_grad()
def test_a_group_is_blind_to_later_references():
    model = build(4)
    labels, x = inputs(2, 4)
    context = model.encode(labels, x[:, :3])
    for changed in range(3):
        other = x[:, :3].clone()
        other[:, changed] += 1
        difference = (model.encode(labels, other) - context).abs().amax(dim=(0, 2)).reshape(4, 4).amax(dim=1)
        assert (difference[: changed + 1] == 0).all()
        assert (difference[changed + 1 :] > 1e-4).all()


@in_float64
@torch.no_grad()
def test_a_prefix_of_references_gives_the_prefix_of_the_context():
    model = build(4)
    labels, x = inputs(3, 4)
    whole = model.encode(labels, x[:, :3])
    for n in range(4):
        torch.testing.assert_close(model.encode(labels, x[:, :n]), whole[:, : 4 * (n + 1)])


@in_float64
@torch.no_grad()
@pytest.mark.parametrize("num_references", [1, 4])
def test_batch_equals_one_by_one(num_references: int):
    model = build(num_references)
    labels, x = inputs(3, num_references)
    t = torch.rand(3)
    references = x[:, :-1]
    together = model.velocity(x[:, -1], t, model.memory(model.encode(labels, references)))
    for i in range(3):
        one = slice(i, i + 1)
        alone = model.velocity(x[one, -1], t[one], model.memory(model.encode(labels[one], references[one])))
        torch.testing.assert_close(together[one], alone)


@in_float64
@torch.no_grad()
def test_packed_references_and_draws_equal_separate_calls():
    """One decoder call for R references and M draws gives what R M calls with a
    prefix of the context give.
    """
    model = build(4)
    labels, x = inputs(2, 4)
    rows = repeat(x, "b r c h w -> (r m b) c h w", m=3)
    t = torch.rand(len(rows))
    context = model.encode(labels, x[:, :3])
    packed = model.velocity(rows, t, model.memory(context, every_reference=True))
    for r in range(4):
        for m in range(3):
            some = slice((3 * r + m) * 2, (3 * r + m + 1) * 2)
            separate = model.velocity(rows[some], t[some], model.memory(context[:, : 4 * (r + 1)]))
            torch.testing.assert_close(packed[some], separate)


@in_float64
@torch.no_grad()
def test_one_time_for_all_rows_equals_a_time_each():
    model = build()
    labels, x = inputs(3, 1)
    memory = model.memory(model.encode(labels))
    each = model.velocity(x[:, 0], torch.full((3,), 0.3), memory)
    torch.testing.assert_close(model.velocity(x[:, 0], torch.tensor([0.3]), memory), each)


@in_float64
@pytest.mark.parametrize("rows", [20, 4])  # more than the five classes and the null class, and fewer
def test_few_contexts_give_the_velocities_and_gradients_of_a_context_for_each_row(rows: int):
    model = build(1)
    model.encoder.has_dropout = False
    labels, x = inputs(rows, 1)
    drop, t = torch.arange(rows) % 3 == 1, torch.rand(rows)
    assert model.train().has_few_contexts(labels) == (rows == 20)

    def gradients(memory: Memory) -> Tensor:
        velocity = model.velocity(x[:, 0], t, memory)
        return torch.cat(
            [g.flatten() for g in torch.autograd.grad(velocity.square().sum(), list(model.parameters()))]
        )

    by_class = gradients(model.condition(labels, drop, x, PerImageNormal([0] * rows)))
    by_row = gradients(model.memory(model.encode(labels, x[:, :-1], drop), every_reference=True))
    torch.testing.assert_close(by_class, by_row)


@pytest.mark.parametrize("references, dropout", [(4, 0.0), (1, 0.1)])
def test_contexts_that_differ_within_a_class_are_made_for_each_row(references: int, dropout: float):
    model = build(references, projection_dropout=dropout).train()
    assert not model.has_few_contexts(torch.arange(20) % 5)


def test_too_many_references_are_refused():
    model = build(4)
    labels, x = inputs(2, 4)
    with pytest.raises(ValueError, match="references: got 4; allowed: at most 3"):
        model.encode(labels, x)


def test_patchify_there_and_back():
    x = torch.randn(2, 3, 4, 6, 6)
    assert torch.equal(unpatchify(patchify(x, 3), 3, 6), x)


def test_token_similarity_is_the_mean_over_pairs():
    features = torch.randn(2, 7, 5)
    pairs = torch.nn.functional.cosine_similarity(features[:, :, None], features[:, None], dim=-1)
    torch.testing.assert_close(token_similarity(features), pairs.mean(dim=(1, 2)))


def adapt(model: TransDiff, state: Mapping[str, Tensor], *how: Any, **settings: Any) -> AdaptReport:
    """Load what the model takes of ``state``; strictly, so that nothing is left out."""
    result, report = match(model, state, *how, **settings)
    model.load_state_dict(result)
    return report


class TestAdapt:
    def test_one_step_to_mrar(self):
        one, four = build(1), build(4)
        report = adapt(four, one.state_dict())
        assert report.new == ["encoder.reference_projection.weight", "encoder.reference_projection.bias"]
        assert list(report.adapted) == ["encoder.mask_tokens"] and report.dropped == []
        assert len(report.mapped) == len(four.state_dict()) - 3
        for name, value in one.state_dict().items():
            assert torch.equal(four.state_dict()[name], value.expand_as(four.state_dict()[name]))

    def test_back_to_one_step_drops_the_projection_and_names_the_mask_tokens(self):
        with pytest.raises(
            ValueError, match=r"encoder\.mask_tokens: \[1, 1, 16\] here, \[1, 4, 16\] in the checkpoint"
        ):
            adapt(build(1), build(4).state_dict())

    def test_every_misfit_is_listed_and_nothing_is_loaded(self):
        model = build(1, num_classes=7)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        state = build(1).state_dict() | {"extra": torch.zeros(2)}
        del state["decoder.position"]
        with pytest.raises(ValueError) as error:
            adapt(model, state)
        for part in (
            "encoder.class_embedding.weight: [7, 16] here, [5, 16]",
            "decoder.position: [1, 16, 16] here, missing",
            "extra: [2]",
        ):
            assert part in str(error.value)
        assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())

    @pytest.mark.parametrize("num_references", [1, 4])
    def test_another_size_of_the_latent_is_made_anew_or_resized(self, num_references: int):
        """Only the decoder's table depends on it and, for MRAR, the projection of the references' larger
        patches.
        """
        coarse = build(num_references)
        sized = ["decoder.position"] + ["encoder.reference_projection.weight"] * (num_references > 1)
        fine = build(num_references, latent_size=8)
        fresh = {name: fine.state_dict()[name].clone() for name in sized}
        report = adapt(fine, coarse.state_dict())
        assert [
            line.split()[0] for line in sorted(report.new)
        ] == sized and "[1, 64, 16], which was [1, 16, 16]" in str(report)
        assert all(torch.equal(fine.state_dict()[name], fresh[name]) for name in sized)
        report = adapt(fine, coarse.state_dict(), positions="interpolate")
        assert sorted(report.adapted) == sized and not report.new
        assert len(report.mapped) == len(fine.state_dict()) - len(sized)

    def test_a_resized_table_keeps_its_slopes(self):
        coarse, fine = build(1), build(1, latent_size=8)
        plane = torch.arange(4.0)[:, None] + 2 * torch.arange(4.0)
        state = coarse.state_dict() | {"decoder.position": plane.reshape(1, 16, 1).expand(1, 16, 16).clone()}
        adapt(fine, state, positions="interpolate")
        table = fine.decoder.position.detach().reshape(8, 8, 16)[3:5, 3:5, 0]  # away from the border
        torch.testing.assert_close(table.diff(dim=0), torch.full((1, 2), 0.5), atol=1e-4, rtol=0)
        torch.testing.assert_close(table.diff(dim=1), torch.full((2, 1), 1.0), atol=1e-4, rtol=0)

    @in_float64
    @torch.no_grad()
    def test_a_spread_projection_sees_the_mean_of_the_finer_pixels(self):
        coarse, fine = build(4), build(4, latent_size=8)
        adapt(fine, coarse.state_dict(), positions="interpolate")
        labels, references = torch.tensor([1, 2]), torch.randn(2, 3, 2, 8, 8)
        means = torch.nn.functional.avg_pool2d(references.flatten(0, 1), 2).view(2, 3, 2, 4, 4)
        torch.testing.assert_close(fine.encode(labels, references), coarse.encode(labels, means))

    @pytest.mark.parametrize("rows", [[None] * 3, [4, None, 0], [0, 1, 2]])
    def test_other_classes_take_the_embeddings_that_are_named(self, rows: list[int | None]):
        old, new = build(1), build(1, num_classes=3)
        before = {name: value.clone() for name, value in new.state_dict().items()}
        report = adapt(new, old.state_dict(), classes=rows)
        name = "encoder.class_embedding.weight"
        for c, row in enumerate(rows):
            wanted = before[name][c] if row is None else old.state_dict()[name][row]
            assert torch.equal(new.state_dict()[name][c], wanted)
        assert all(
            torch.equal(new.state_dict()[other], value)
            for other, value in old.state_dict().items()
            if other != name
        )
        assert name in str(report) and len(report.mapped) == len(before) - 1

    def test_a_report_of_other_classes_needs_no_memory(self):
        with torch.device("meta"):
            model = build(1, num_classes=3)
        result, _ = match(model, build(1).state_dict(), classes=[4, None, 0])
        assert result["encoder.class_embedding.weight"].shape == (3, 16)

    @pytest.mark.parametrize(
        "changes",
        [
            {"patch_size": 2},
            {"latent_channels": 3},
            {"num_class_tokens": 5},
            {"num_context_tokens": 64},
            {"latent_size": 8, "patch_size": 2, "latent_channels": 1},
        ],
    )
    @pytest.mark.parametrize("num_references", [1, 4])
    def test_other_shapes_keep_what_fits(self, num_references: int, changes: dict[str, int]):
        if changes.get("num_context_tokens") and num_references == 4:
            changes = {"num_context_tokens": 4}
        old, new = build(num_references), build(num_references, **changes)
        before = {name: value.clone() for name, value in new.state_dict().items()}
        if changes.keys() != {"patch_size"}:
            with pytest.raises(ValueError, match="With init_shapes=new these are made anew"):
                adapt(new, old.state_dict())
        report = adapt(new, old.state_dict(), shapes="new")
        made = {line.split()[0] for line in report.new}
        for name, value in new.state_dict().items():
            fits = old.state_dict()[name].shape == value.shape
            assert torch.equal(value, old.state_dict()[name] if fits else before[name])
            assert (name in report.mapped, name in made) == (fits, not fits)

    def test_another_width_fits_nowhere(self):
        with pytest.raises(ValueError, match="of another shape") as error:
            adapt(build(1, width=32), build(1).state_dict(), shapes="new")
        assert "init_shapes" not in str(error.value) and "\n" not in str(error.value)
