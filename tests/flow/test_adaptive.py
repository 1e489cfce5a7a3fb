"""The adaptive solver: torchdiffeq's numbers for each row, whatever its neighbours; and other truths."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.integrate import RK45
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow import adaptive
from lit_transdiff.flow.guidance import GUIDANCE, guide
from lit_transdiff.flow.path import expand_like
from lit_transdiff.flow.solvers import solve
from lit_transdiff.models.paradigm import Paradigm, Problem, build_model
from lit_transdiff.sampling.generator import load_generator
from lit_transdiff.sampling.loop import check_sampling, generate, process_of
from tests.helpers.families import sit_or_dit
from tests.helpers.reference import FIXTURES
from tests.helpers.small import FAMILIES, FASHION, small_run

pytestmark = pytest.mark.numeric
NUMBERS = load_file(FIXTURES / "dopri5/numbers.safetensors")
TOLERANCES = {"formula": {}, "formula_loose": {"rtol": 1e-1, "atol": 1e-2}, "sit": {}, "sit_guided": {}}
DOPRI5 = SamplingConfig(solver="dopri5")


def no_draw() -> Tensor:
    raise AssertionError("it draws no noise")


def solver_of(name: str) -> Callable[[Tensor, list[int], list[Tensor]], Tensor]:
    """Solves a case from noise [B, ...] of the rows with these numbers; the calls' times are noted."""
    config = SamplingConfig(solver="dopri5", **TOLERANCES[name])

    def by_formula(noise: Tensor, rows: list[int], calls: list[Tensor]) -> Tensor:
        def field(x: Tensor, t: Tensor) -> Tensor:
            calls.append(t)
            return 2 * torch.tanh(x @ NUMBERS["in/formula/mixing"]) + 4 * torch.sin(12 * t[:, None]) * x

        return solve(field, noise, config, no_draw)

    def by_sit(noise: Tensor, rows: list[int], calls: list[Tensor]) -> Tensor:
        net = sit_or_dit("sit_forward").double()
        scaled = SamplingConfig(solver="dopri5", guidance_scale=4.0 if name == "sit_guided" else 1.0)
        decoding = net.decode(NUMBERS["in/sit/labels"][rows], scaled, PerImageNormal(rows))
        problem = next(decoding)

        def noted(function: Callable[[Tensor, Tensor], Tensor], x: Tensor, t: Tensor) -> Tensor:
            calls.append(t)
            return function(x, t)

        watched = Problem(problem.shape, partial(noted, problem.predict), partial(noted, problem.pair))  # type: ignore[arg-type]
        return process_of("flow", "velocity").solve(watched, noise, no_draw, scaled)

    return by_formula if name.startswith("formula") else by_sit


@pytest.mark.parametrize("name", TOLERANCES)
def test_without_rounded_steps_each_row_has_the_numbers_of_torchdiffeq_for_it_alone(
    monkeypatch: pytest.MonkeyPatch, name: str
):
    """The same result to rounding, and as many evaluations; a batch takes those of its longest row."""
    monkeypatch.setattr(adaptive, "rounded_down", lambda step: step)
    noise, data = NUMBERS[f"in/{name}/noise"], NUMBERS[f"out/{name}/data"]
    counts, run, calls = NUMBERS[f"out/{name}/evaluations"].tolist(), solver_of(name), list[Tensor]()
    together = run(noise, [*range(len(noise))], calls)
    torch.testing.assert_close(together, data, rtol=1e-9, atol=1e-9)
    assert len(calls) == max(counts)
    for i, count in enumerate(counts):
        calls.clear()
        alone = run(noise[i : i + 1], [i], calls)
        torch.testing.assert_close(alone, data[i : i + 1], rtol=1e-9, atol=1e-9)
        assert len(calls) == count


@pytest.mark.parametrize("name", ["sit", "sit_guided"])
def test_rounded_steps_keep_the_tolerance(name: str):
    noise, data = NUMBERS[f"in/{name}/noise"], NUMBERS[f"out/{name}/data"]
    calls: list[Tensor] = []
    found = solver_of(name)(noise, [0, 1, 2], calls)
    assert (found - data).square().mean().sqrt() < 1e-3 * data.std()
    assert len(calls) <= 1.5 * NUMBERS[f"out/{name}/evaluations"].max()


def test_steps_are_rounded_down_to_powers_of_the_root_of_two():
    powers = torch.exp2(torch.arange(-40, 1, dtype=torch.float64) / 2)
    torch.testing.assert_close(adaptive.rounded_down(powers), powers)
    torch.testing.assert_close(adaptive.rounded_down(1.4 * powers), powers)
    torch.testing.assert_close(adaptive.rounded_down(1.001 * powers), powers)


def test_the_scheme_is_scipys():
    """Shampine's error is -2/3 times that of Dormand and Prince's, which scipy has."""
    for (share, weights), theirs, row in zip(adaptive.RUNGE_KUTTA[:5], RK45.C[1:], RK45.A[1:], strict=True):
        assert share == pytest.approx(theirs) and weights == pytest.approx(row[: len(weights)])
    assert adaptive.RUNGE_KUTTA[5][1] == pytest.approx(RK45.B)
    assert np.array(adaptive.ERROR_WEIGHTS) == pytest.approx(-2 / 3 * RK45.E)
    assert sum(adaptive.MIDDLE_WEIGHTS) == pytest.approx(1 / 2)


def exact(x: Tensor, t: Tensor) -> Tensor:
    """A field, linear in x, whose solution from t = 1 to 0 is exp(-1 - sin(4) / 4) x."""
    return (1 + torch.cos(4 * t)).reshape(-1, 1) * x


def test_the_error_falls_with_the_tolerance():
    start, errors = torch.linspace(0.5, 2, 5, dtype=torch.float64)[:, None].expand(5, 3), []
    for rtol in (1e-2, 1e-4, 1e-6):
        data = solve(exact, start, SamplingConfig(solver="dopri5", rtol=rtol, atol=1e-3 * rtol), no_draw)
        factor = torch.exp(torch.tensor(-1 - np.sin(4) / 4))
        errors.append(((data - factor * start) / data).abs().max().item())
    assert errors[0] < 1e-2 and all(fine < coarse / 10 for coarse, fine in pairwise(errors))


@pytest.mark.parametrize("schedule", GUIDANCE)
def test_guidance_at_a_time_of_each_row(schedule: str):
    """As at a shared time; a row outside the interval keeps the prediction of its class, to rounding, and the
    times beyond the data count as the data's.
    """
    both = lambda x, t: (x + expand_like(torch.as_tensor(t), x), 2 * x)  # noqa: E731
    guided = guide(lambda x, t: both(x, t)[0], both, 3.0, (0.0, 0.6), GUIDANCE[schedule])
    x, times = torch.randn(4, 2, 2), torch.tensor([0.9, 0.6, 0.3, 0.0], dtype=torch.float64)
    alone = [guided(x[i : i + 1], t) for i, t in enumerate(times.tolist())]
    torch.testing.assert_close(guided(x, times), torch.cat(alone))
    beyond = guided(x[:1], torch.tensor([-0.1])) - guided(x[:1], torch.tensor([0.0]))
    conditional = both(x[:1], torch.tensor([-0.1]))[0] - both(x[:1], torch.tensor([0.0]))[0]
    torch.testing.assert_close(beyond, 3 * conditional)


def test_a_row_that_does_not_arrive_is_an_error():
    steep = lambda x, t: 1000 * torch.sin(1000 * t)[:, None] * x  # noqa: E731
    message = (
        r"sampling\.num_steps: got 20; allowed: enough to reach t = 0 with sampling\.rtol 0\.001 and atol"
    )
    with pytest.raises(ValueError, match=message):
        solve(steep, torch.ones(2, 3), SamplingConfig(solver="dopri5", num_steps=20), no_draw)
    with pytest.raises(
        ValueError, match=r"sampling\.solver: dopri5 got a prediction .* that is not a number"
    ):
        solve(lambda x, t: x * float("nan"), torch.ones(2, 3), DOPRI5, no_draw)


@pytest.mark.parametrize("tolerances", [{"rtol": 1e-7}, {"rtol": 2.0}, {"atol": 0.0}, {"atol": -1.0}])
def test_tolerances_out_of_range_are_refused(tolerances: dict[str, float]):
    ((name, value),) = tolerances.items()
    with pytest.raises(ValueError, match=rf"sampling\.{name}: got {value}; allowed"):
        SamplingConfig(solver="dopri5", **tolerances)


@pytest.mark.parametrize("interval", [[0.0, 1.0], [0.0, 0.7]])
def test_roundings_of_a_trained_network_do_not_decide_the_steps(interval: list[float]):
    """Ten images of a bundled model at once and one by one, whose products are rounded in different ways."""
    generator = load_generator(FASHION / "one_step")
    dopri5 = {"solver": "dopri5", "num_steps": 100, "rtol": 1e-2, "atol": 1e-4}
    sampling = replace(generator.run.sampling, guidance_interval=interval, **dopri5)
    labels, seeds = torch.arange(10), [*range(10)]
    together = generator.latents(labels, seeds, sampling)
    alone = torch.cat([generator.latents(labels[i : i + 1], [i], sampling) for i in seeds])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-4)


FLOWS = {
    "transdiff": {},
    "mrar": {"stage": "mrar_finetune", "model": {"num_references": 4}},
    **{name: {"stage": "pretrain", "model": FAMILIES[name]["model"]} for name in FAMILIES if name != "dit"},
}


@pytest.fixture(params=FLOWS)
def drawn(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Paradigm, SamplingConfig]:
    """A family's network of random weights, and the solver with guidance."""
    changes = FLOWS[request.param]
    if request.param in ("acdit", "ardiff", "mar"):
        changes = changes | {"model": changes["model"] | {"process": "flow"}}
    sampling = {"guidance_scale": 2.0, "solver": "dopri5", "num_steps": 100, "rtol": 0.05, "atol": 0.01}
    run = small_run(tmp_path, **changes, sampling=sampling)
    check_sampling(run.sampling, run.model)
    torch.manual_seed(0)
    model = build_model(run.model).eval().requires_grad_(False)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.05)
    return model, run.sampling


LABELS, SEEDS = torch.tensor([3, 7, 3]), [1, 2, 5]


def test_a_family_takes_a_time_of_each_row(drawn: tuple[Paradigm, SamplingConfig]):
    """Its network predicts the same of a row at its own time as at a time that all rows share."""
    model, sampling = drawn
    times = torch.tensor([0.9, 0.2, 0.5], dtype=torch.float64)
    problem = next(model.decode(LABELS, sampling, PerImageNormal(SEEDS)))
    x_t = torch.randn(3, *problem.shape)
    for function in (problem.predict, lambda x, t: torch.stack(problem.pair(x, t), dim=1)):
        shared = [function(x_t, t)[i] for i, t in enumerate(times.tolist())]
        torch.testing.assert_close(function(x_t, times), torch.stack(shared), rtol=1e-4, atol=1e-5)


def test_an_image_of_a_family_depends_on_its_seed_alone(drawn: tuple[Paradigm, SamplingConfig]):
    model, sampling = drawn
    together = generate(model, LABELS, sampling, SEEDS)
    torch.testing.assert_close(generate(model, LABELS[1:2], sampling, [2]), together[1:2], rtol=0, atol=1e-4)
    assert (together[0] - together[2]).abs().max() > 0.01
