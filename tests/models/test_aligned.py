"""Every family as a flow with TransDiff's path, loss, densities, solvers and guidance, for comparisons."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models.adaptive import TimeMLP
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.loop import generate
from lit_transdiff.stages.objective import losses_of
from lit_transdiff.training.build import check_run
from tests.helpers.families import without_gradient
from tests.helpers.small import FAMILIES, small_run

pytestmark = pytest.mark.numeric
WITH_A_CHOICE = ("acdit", "ardiff", "mar")
SAMPLING = {"solver": "heun", "grid": "uniform", "num_steps": 2, "guidance_scale": 2.0}
DENSITY = {"density": "logit_normal", "density_mean": 0.5}
FLOWS = {name: {} if name not in WITH_A_CHOICE else {"process": "flow"} for name in FAMILIES if name != "dit"}


def aligned(folder: Path, name: str, **more: Any) -> Any:
    model = FAMILIES[name]["model"] | FLOWS[name]
    return small_run(
        folder, **{"stage": "pretrain", "model": model, "flow": DENSITY, "sampling": SAMPLING} | more
    )


@pytest.mark.parametrize("name", FLOWS)
def test_a_family_learns_and_draws_as_a_flow(tmp_path: Path, name: str):
    """Parameters get gradients; the loss is the mean squared error of the velocity at times of the density;
    drawing depends on the class.
    """
    run = aligned(tmp_path, name)
    check_run(run)
    model = build_model(run.model).train()
    assert model.process_of(run.model) == ("flow", "velocity")
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.2)
    told, seen = [], []
    predict = model.predict

    def noted(x_t: torch.Tensor, t: torch.Tensor, memory: Any) -> torch.Tensor:
        told.append(t)
        seen.append(predict(x_t, t, memory))
        return seen[-1]

    model.predict = noted  # type: ignore[method-assign]
    x, labels = torch.randn(2, 1, 1, 32, 32), torch.tensor([0, 3])
    drop, draws = torch.tensor([True, False]), 2
    process = PROCESSES["flow"](run.flow, "velocity")
    losses, _ = losses_of(model, process, labels, drop, x, PerImageNormal([1, 2]), draws)
    losses.mean().backward()
    assert without_gradient(model) == []
    numbers = PerImageNormal([1, 2])(len(model.part_sizes), draws)
    expected = torch.sigmoid(0.5 + numbers).permute(2, 0, 1).flatten(0, 1)
    torch.testing.assert_close(told[0], expected)
    assert seen[0].shape == (4, sum(model.part_sizes), *model.token)
    latents = generate(model.eval(), labels, SamplingConfig(**SAMPLING), [1, 2])
    again = generate(model, torch.tensor([7, 3]), SamplingConfig(**SAMPLING), [1, 2])
    assert latents.shape == x.shape and latents.isfinite().all()
    assert not torch.allclose(latents[0], again[0]) and torch.allclose(latents[1], again[1], atol=1e-4)


@pytest.mark.parametrize("name", WITH_A_CHOICE)
def test_a_time_of_the_flow_is_told_as_the_step_of_as_much(tmp_path: Path, name: str):
    """t in [0, 1] and the step 1000 t have the same features."""
    own, flow = small_run(tmp_path, **FAMILIES[name]), aligned(tmp_path, name)
    (embed,), (embed_flow,) = (
        [module for module in build_model(run.model).modules() if isinstance(module, TimeMLP)]
        for run in (own, flow)
    )
    embed_flow.load_state_dict(embed.state_dict())
    assert torch.equal(embed_flow(torch.tensor([0.5, 0.125])), embed(torch.tensor([500, 125])))


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("mar", {"sampling": {"solver": "ancestral"}}, r"sampling\.solver: 'ancestral' is not known"),
        ("acdit", {"flow": {"objective": "nothing"}}, r"flow\.objective: 'nothing' is not known"),
        ("ardiff", {"model": {"process": "linear_diffusion"}}, r"model\.process"),
    ],
)
def test_settings_of_the_other_mode_are_refused(
    tmp_path: Path, name: str, more: dict[str, Any], message: str
):
    if "model" in more:
        more = {"model": FAMILIES[name]["model"] | more["model"]}
    with pytest.raises(ValueError, match=message):
        check_run(aligned(tmp_path, name, **more))
