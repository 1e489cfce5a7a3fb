"""A changed setting of the sections model, flow or sampling changes what a family computes, or is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import RunConfig
from lit_transdiff.config.loading import merge
from lit_transdiff.flow.processes import PROCESSES
from lit_transdiff.models.paradigm import build_model
from lit_transdiff.sampling.loop import check_sampling, generate
from lit_transdiff.stages import STAGES
from lit_transdiff.stages.objective import losses_of
from tests.helpers.small import FAMILIES, SETTINGS, small_run

LABELS, SEEDS = torch.tensor([0, 1, 2]), [1, 2, 3]
TRANSDIFF = {"model": {**SETTINGS["model"], "num_context_tokens": 4}}
REFERENCES = {"num_references": 4, "num_context_tokens": 16}
RUNS: dict[str, dict[str, Any]] = {
    "transdiff": TRANSDIFF,
    "mrar": merge(TRANSDIFF, {"stage": "mrar_finetune", "model": REFERENCES}),
    **FAMILIES,
    "sit by dopri5": merge(FAMILIES["sit"], {"sampling": {"solver": "dopri5", "num_steps": 100}}),
    "mar": merge(FAMILIES["mar"], {"model": {"mask_rate_min": 0.1}}),
    "acdit as a flow": merge(
        FAMILIES["acdit"],
        {"model": {"process": "flow"}, "sampling": {"solver": "euler_maruyama", "grid": "paper"}},
    ),
}
SMALL = {
    "model": {"latent_size": 16, "latent_channels": 2},
    "sampling": {"guidance_scale": 2.0},
}
# Another value of a setting, in place of twice a number and the opposite of a truth value.
OTHERS: dict[str, Any] = {
    "model.size": "nano",
    "model.encoder": "class_alone",
    "model.decoder": "modulation",
    "model.process": "flow",
    "model.order": "raster",
    "model.scales": [2],
    "model.decoder_heads": 4,
    "model.decoder_width": 48,
    "model.head_version": 1,
    "model.guided_channels": 1,
    "model.mask_rate_min": 0.9,
    "model.mask_rate_std": 9.0,
    "model.attention_dropout": 0.3,
    "model.projection_dropout": 0.3,
    "model.num_parts": 2,
    "flow.objective": "clean",
    "flow.loss_terms": {"direction": 0.5},
    "flow.density": "uniform",
    "flow.density_mean": 1.0,
    "flow.discretize": 3,
    "flow.label_drop_prob": 0.9,
    "sampling.solver": "heun",
    "sampling.grid": "uniform",
    "sampling.num_steps": 5,
    "sampling.guidance": "rising",
    "sampling.guidance_interval": [0.0, 0.5],
    "sampling.reference_guidance": [3.0],
    "sampling.reference_steps": [5],
    "sampling.num_parts": 3,
    "sampling.diffusion": "decreasing",
    "sampling.last_step": "velocity",
}
EXEMPT = {
    "model.paradigm": "names the family",
    "model.condition": "a table of one entry",
    "sampling.precision": "of the generator",
}
# Exempt by the rule of config.effects: changed alone in a trial of a sweep, or shared by runs of a pipeline.
WITHOUT_EFFECT = {
    "transdiff": {"sampling.part_guidance", "sampling.reuse_noise"},
    "acdit": {"sampling.noise_scale"},
    "sit by dopri5": {"sampling.noise_scale", "sampling.drift_scale", "sampling.num_steps"},  # the most steps
    "flowar": {"sampling.noise_scale", "sampling.drift_scale"},
}


def other(name: str, value: Any) -> Any:
    if name == "sampling.part_guidance":
        return "growing" if value == "constant" else "constant"
    if name in OTHERS:
        return OTHERS[name]
    return not value if isinstance(value, bool) else 2 * value


def computed(run: RunConfig, sampled: bool) -> Tensor:
    """Losses of a training step, or sampled latents, with all weights random."""
    torch.manual_seed(0)
    config, flow, model = run.model, run.flow, build_model(run.model)
    for p in model.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.1)
    if sampled:
        return generate(model.eval(), LABELS, run.sampling, SEEDS)
    latents = config.num_references, config.latent_channels, config.latent_size, config.latent_size
    normal = PerImageNormal(SEEDS)
    x, drop = normal(*latents), torch.special.ndtr(normal()) < flow.label_drop_prob
    name, prediction = model.process_of(config)
    process = PROCESSES[name](flow, prediction)
    return losses_of(model.train(), process, LABELS, drop, x, normal, flow.num_noise_draws)[0]


def refused(folder: Path, changes: dict[str, Any]) -> RunConfig | None:
    """The run of these changes, or None where they are refused before training."""
    try:
        run = small_run(folder, **changes)
        STAGES[run.stage].check(run)
        check_sampling(run.sampling, run.model)
    except ValueError as error:
        assert "\n" not in str(error)
        return None
    return run


@pytest.mark.parametrize("family", RUNS)
def test_a_setting_has_an_effect_or_is_refused(tmp_path: Path, family: str):
    base = merge({"sampling": {"num_steps": 3}}, RUNS[family], SMALL)
    run = refused(tmp_path, base)
    assert run is not None
    before = {sampled: computed(run, sampled) for sampled in (False, True)}

    def is_same(changed: RunConfig, sampled: bool) -> bool:
        after = computed(changed, sampled)
        return after.shape == before[sampled].shape and torch.equal(after, before[sampled])

    silent = set()
    for section, name in (
        (s, f.name) for s in ("model", "flow", "sampling") for f in fields(getattr(run, s))
    ):
        setting, value = f"{section}.{name}", getattr(getattr(run, section), name)
        if setting in EXEMPT or (new := other(setting, value)) == value:
            continue
        changed = refused(tmp_path, merge(base, {section: {name: new}}))
        ways = {"model": (False, True), "flow": (False,), "sampling": (True,)}[section]
        if changed is not None and all(is_same(changed, sampled) for sampled in ways):
            silent.add(setting)
    assert silent == WITHOUT_EFFECT.get(family, set())
