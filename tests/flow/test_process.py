"""Parts of images in a process: their noise, their times, their losses, and what a prediction of another kind
implies.
"""

import pytest
import torch
from torch import Tensor

from lit_transdiff.base.randomness import GlobalBatchNormal, PerImageNormal
from lit_transdiff.config import FlowConfig, SamplingConfig
from lit_transdiff.flow.guidance import PART_GUIDANCE
from lit_transdiff.flow.parts import noise_of_parts, rows_of_parts, times_of_tokens
from lit_transdiff.flow.processes import PROCESSES, process_class
from lit_transdiff.flow.straight import NEAREST, VELOCITIES, Flow
from lit_transdiff.stages.objective import balanced

SIZES, DRAWS = (1, 2, 2, 4), 3


def counted(*shape: int) -> Tensor:
    """Two rows of successive numbers in the place of noise."""
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape)
    return torch.stack([numbers, -numbers])


def test_noise_is_drawn_part_by_part_and_draw_by_draw():
    noise = noise_of_parts(counted, SIZES, DRAWS, (1,))
    assert noise.shape == (DRAWS * 2, 9, 1)
    first = noise[::2, :, 0]  # rows (draw, image): the first image
    assert first[:, 0].tolist() == [0, 1, 2]  # the one token of the first part, in the three draws
    assert first[0].tolist() == [0, 3, 4, 9, 10, 15, 16, 17, 18]
    assert torch.equal(noise[1::2], -noise[::2])


def test_tokens_have_the_time_of_their_part_and_rows_are_parts():
    t = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    each = times_of_tokens(t, SIZES)
    assert each.tolist() == [[1, 2, 2, 3, 3, 4, 4, 4, 4], [5, 6, 6, 7, 7, 8, 8, 8, 8]]
    rows = rows_of_parts(each, SIZES)
    assert [row.tolist() for row in rows] == [[1, 5], [[2, 2], [6, 6], [3, 3], [7, 7]], [[4] * 4, [8] * 4]]


def test_weights_of_parts_have_mean_one_whatever_their_shape():
    by_part, by_image = torch.tensor([1.0, 3.0]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert balanced(by_part, 4, 2).tolist() == [0.5] * 4 + [1.5] * 4  # rows (part, draw, image)
    assert balanced(by_image, 4, 2).tolist() == [2, 0, 2, 0, 0, 2, 0, 2]


@pytest.mark.parametrize("kind", VELOCITIES)
def test_every_kind_of_prediction_implies_the_velocity(kind: str):
    x, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.1, 0.4, 0.6, 0.9])
    process = Flow(FlowConfig(), kind)
    x_t = process.noised(x, noise, t)
    output = {"velocity": noise - x, "clean": x, "noise": noise}[kind]
    assert t.min() > NEAREST
    torch.testing.assert_close(process.velocity(output, x_t, t), noise - x, atol=1e-5, rtol=1e-5)
    assert process.losses(output, x, noise, t, x_t).max() < 1e-9


@pytest.mark.parametrize("kind", ["velocity", "clean"])
def test_a_solver_draws_with_every_kind_of_prediction(kind: str):
    """Of data that are one point the exact predictions are known, and the path to it is straight."""
    point = torch.tensor([1.5, -0.5])

    class Part:
        def predict(self, x_t: Tensor, t: float) -> Tensor:
            return point.expand_as(x_t) if kind == "clean" else (x_t - point) / t

        def pair(self, x_t: Tensor, t: float) -> tuple[Tensor, Tensor]:
            return self.predict(x_t, t), self.predict(x_t, t)

    sampling = SamplingConfig(solver="euler", grid="uniform", num_steps=10, guidance_scale=2.0)
    drawn = Flow(FlowConfig(), kind).solve(Part(), torch.randn(5, 2), lambda: torch.zeros(5, 2), sampling)
    torch.testing.assert_close(drawn, point.expand(5, 2), atol=1e-5, rtol=0)


def test_a_prediction_that_a_process_does_not_know_is_refused():
    with pytest.raises(
        ValueError, match="prediction of Flow: got 'score'; allowed: velocity or clean or noise"
    ):
        PROCESSES["flow"](FlowConfig(), "score")
    with pytest.raises(ValueError, match=r"process: 'flows' is not known\. Did you mean 'flow'"):
        process_class("flows")


@pytest.mark.parametrize("predicts", ["noise", "noise_and_variance"])
def test_parts_of_several_tokens_have_the_losses_of_their_tokens(predicts: str):
    """Variances lie behind the noise of each token, wherever the axis of its numbers is; here rows are [R,
    tokens, numbers].
    """
    process = PROCESSES["linear_diffusion"](FlowConfig(), predicts)
    x, noise, output = (
        torch.randn(3, 2, 4),
        torch.randn(3, 2, 4),
        torch.randn(3, 2, 4 if predicts == "noise" else 8),
    )
    t = torch.tensor([1, 500, 999])
    x_t = process.noised(x, noise, t)
    whole = process.losses(output, x, noise, t, x_t)
    of_tokens = process.losses(
        *(z.flatten(0, 1) for z in (output, x, noise)), t.repeat_interleave(2), x_t.flatten(0, 1)
    )
    torch.testing.assert_close(whole, of_tokens.unflatten(0, (3, 2)).mean(1))


def test_guidance_grows_with_the_parts_up_to_the_whole_scale():
    growing = PART_GUIDANCE["growing"]
    assert [growing(3.0, progress) for progress in (0.0, 0.5, 1.0)] == [1.0, 2.0, 3.0]
    assert PART_GUIDANCE["constant"](3.0, 0.1) == 3.0


def test_shared_numbers_are_those_of_all_ranks_and_of_the_step_alone():
    ranks = [GlobalBatchNormal(7, 8, rows) for rows in (torch.arange(4), torch.arange(4, 8))]
    first, second = ([normal.shared() for _ in range(3)] for normal in ranks)
    assert (
        first == second
        and len({*first}) == 3
        and GlobalBatchNormal(8, 8, torch.arange(4)).shared() != first[0]
    )
    assert PerImageNormal([1, 2]).shared() == PerImageNormal([3]).shared()
