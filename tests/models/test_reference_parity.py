"""Our model against the numbers of the reference implementation."""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from lit_transdiff.config import SIZES, FlowConfig, ModelConfig, SamplingConfig
from lit_transdiff.flow.guidance import guide
from lit_transdiff.flow.loss import draw_times
from lit_transdiff.flow.path import interpolate
from lit_transdiff.flow.solvers import solve, time_grid
from lit_transdiff.models import layers
from lit_transdiff.models.layers import time_features
from lit_transdiff.models.paradigm import in_one_pass
from lit_transdiff.models.tokens import patchify, token_similarity, unpatchify
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import our_name
from tests.helpers.reference import (
    CASES,
    FIXTURES,
    assert_near,
    features_of,
    flow_loss,
    latents_to_tokens,
    load,
    model,
    reference_frequencies,
    tokens_to_latents,
)

pytestmark = pytest.mark.numeric
ROUNDING = 2**-24  # of float32, relative


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "time_features", lambda t: features_of(1000.0 * t, reference_frequencies()))


def test_patch_order():
    case = load("patchify")
    assert torch.equal(patchify(case["in/x"], 1), case["out/p1"])
    assert torch.equal(patchify(case["in/x"], 2), case["out/p2"])
    assert torch.equal(unpatchify(case["out/p2"], 2, 4), case["out/un2"])


@torch.no_grad()
def test_one_step_encoder():
    name = "onestep256_encoder"
    case, net = load(name), model(name)
    labels = F.pad(case["in/labels"], (0, 1))
    last_dropped = torch.tensor([False, False, False, True])
    assert_near(name, "z", net.encode(labels, drop=last_dropped), case["out/z"])
    features = net.encoder.features(net.encoder.class_vectors(labels, last_dropped))
    assert_near(name, "diversity_per_sample", token_similarity(features), case["out/diversity_per_sample"])
    assert_near(name, "diversity", token_similarity(features).mean()[None], case["out/diversity"])


@torch.no_grad()
def test_label_drop_is_strict_and_replaces_the_class():
    name = "onestep256_encoder"
    case, net = load(name), model(name)
    drop = case["in/drop_rand"] < 0.1
    assert torch.equal(drop, case["out/drop_mask"])
    assert_near(
        name, "z_train_dropped", net.train().encode(case["in/labels"], drop=drop), case["out/z_train_dropped"]
    )


@pytest.mark.parametrize("kind", ["int", "frac"])
def test_time_features(kind: str):
    """Ours and the reference's are the formula's in float64, up to what the roundings of the float32 formula
    can add up to.
    """
    case = load("onestep256_decoder")
    t = case[f"in/t_{kind}"]
    exponents = math.log(10_000) * torch.arange(128).double() / 128
    angles = t.double()[:, None] * torch.exp(-exponents)
    # of the angle: two roundings of the exponent, exp to four units in the last place, three products; then
    # the cosine to one
    bound = angles * (2 * exponents + 8 + 3) * ROUNDING + 2 * ROUNDING
    for found in (time_features(t / 1000), case[f"out/sinusoid_{kind}"]):
        cosines, sines = found.double().chunk(2, dim=1)
        assert ((cosines - angles.cos()).abs() <= bound).all() and (
            (sines - angles.sin()).abs() <= bound
        ).all()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["int", "frac"])
def test_decoder(kind: str):
    name = "onestep256_decoder"
    case, net = load(name), model(name)
    t = case[f"in/t_{kind}"].float() / 1000
    embedding, modulation = net.decoder.time_embedding(t)
    assert_near(name, f"temb_{kind}", embedding, case[f"out/temb_{kind}"])
    assert_near(name, f"timestep_proj_{kind}", modulation.flatten(1), case[f"out/timestep_proj_{kind}"])
    v = net.velocity(tokens_to_latents(case["in/x"]), t, net.memory(case["in/c"]))
    assert_near(name, f"v_{kind}", latents_to_tokens(v), case[f"out/v_{kind}"])


@torch.no_grad()
def test_decoder_block_by_block():
    name = "onestep256_decoder"
    case, net = load(name), model(name)
    seen = {}
    hooks = {"input_proj": net.decoder.input_projection, "cond_embed": net.decoder.context_projection}
    hooks |= {f"res_block{i}": block for i, block in enumerate(net.decoder.blocks)}
    for key, module in hooks.items():
        module.register_forward_hook(lambda m, i, o, key=key: seen.__setitem__(key, o))
    net.velocity(
        tokens_to_latents(case["in/x"][:1]), case["in/t_frac"][:1] / 1000, net.memory(case["in/c"][:1])
    )
    for key in hooks:
        assert_near(name, f"dbg_{key}", seen[key], case[f"out/dbg_{key}"])


def test_training_loss_and_gradients():
    name = "onestep256_loss_eval"
    case, net = load(name), model(name)
    x = case["in/imgs"].repeat(4, 1, 1, 1)  # row r is image r mod B
    noise = tokens_to_latents(case["in/noises"])
    t = draw_times(torch.logit(case["in/u"].double()), FlowConfig(discretize=1000))
    assert torch.equal((t * 1000).round().long(), case["out/timestep"])
    memory = net.memory(net.encode(case["in/labels"]))
    v = []

    def velocity_fn(x_t, t):
        v.append(net.velocity(x_t, t, memory))
        return v[0]

    loss = flow_loss(velocity_fn, x, noise, t, FlowConfig()).mean()
    loss.backward()
    assert_near(name, "loss", loss[None], case["out/loss"])
    assert_near(
        name,
        "x_t_first_token",
        latents_to_tokens(interpolate(x, noise, t))[:, :2],
        case["out/x_t_first_token"],
    )
    assert_near(name, "v_first_token", latents_to_tokens(v[0])[:, :2], case["out/v_first_token"])
    grads = {key: p.grad for key, p in net.named_parameters()}
    names = [key for key in CASES[name]["param_names"] if not key.startswith("z_proj.")]
    norms = torch.stack(
        [torch.zeros(()) if grads[our_name(n)] is None else grads[our_name(n)].norm() for n in names]
    )
    kept = [i for i, key in enumerate(CASES[name]["param_names"]) if not key.startswith("z_proj.")]
    assert_near(name, "grad_norms", norms, case["out/grad_norms"][kept])


@torch.no_grad()
def test_paper_sampler_with_guidance():
    name = "onestep256_sample_cfg1.3_s5"
    case, net = load(name), model(name)
    labels, trace = case["in/labels"], []
    everything_dropped = torch.ones(len(labels), dtype=torch.bool)
    conditional, unconditional = (net.memory(net.encode(labels, drop=d)) for d in (None, everything_dropped))

    pair = partial(in_one_pass, net.at_one_time, conditional.beside(unconditional))

    def recorded(x_t, t):
        trace.append((x_t, *pair(x_t, t)))
        return trace[-1][1:]

    draws = iter(tokens_to_latents(case["in/draws"]))
    config = SamplingConfig(num_steps=5, guidance_scale=1.3, drift_scale=0.89, noise_scale=0.95)
    velocity = guide(partial(net.at_one_time, conditional), recorded, config.guidance_scale)
    latent = solve(velocity, tokens_to_latents(case["in/noise"]), config, lambda: next(draws))
    assert_near(name, "latent", latent, case["out/latent"])
    assert_near(
        name, "x_per_step", torch.stack([latents_to_tokens(x) for x, _, _ in trace]), case["out/x_per_step"]
    )
    v = torch.stack([latents_to_tokens(torch.cat([c, u])) for _, c, u in trace])
    assert_near(name, "v_per_step", v, case["out/v_per_step"])
    assert_near(name, "t_per_step", 1000 * torch.tensor(time_grid(config)[:-1]), case["out/t_per_step"])


@torch.no_grad()
def test_mrar_encoder_prefixes():
    name = "mrar_encoder"
    case, net = load(name), model(name)
    references = torch.stack([case[f"in/img{i}"] for i in range(3)], dim=1)
    assert_near(name, "tokens", patchify(references, 2).flatten(1, 2), case["out/tokens"][:, 64:])
    for n in (1, 2, 3, 4):
        features = net.encoder.features(net.encoder.class_vectors(case["in/labels"]), references[:, : n - 1])
        ours = features if n == 4 else features[:, -8:]
        assert_near(name, f"z_prefix{64 * n}", ours, case[f"out/z_prefix{64 * n}"])
    dropped = net.encoder.class_vectors(case["in/labels"], torch.ones(2, dtype=torch.bool))
    assert_near(name, "z_uncond256", net.encoder.features(dropped, references), case["out/z_uncond256"])


@pytest.mark.parametrize("size", ["base", "large", "huge"])
@pytest.mark.parametrize("kind", ["onestep_256", "onestep_512", "mrar_256"])
def test_parameter_counts(size: str, kind: str):
    counts = json.loads((FIXTURES / "state_dict_shapes.json").read_text())["param_counts"]
    family, resolution = kind.split("_")
    row = counts[f"{family}_{size}_{resolution}"]
    config = ModelConfig(
        **SIZES[size],
        num_references=4 if family == "mrar" else 1,
        latent_size=32 if resolution == "512" else 16,
    )
    with torch.device("meta"):
        net = TransDiff(config)
    # the released one-step z_proj, which has no gradient
    dead = config.width * 16 + config.width if family == "onestep" else 0
    assert sum(p.numel() for p in net.parameters()) == row["total"] - dead
    assert sum(p.numel() for p in net.decoder.parameters()) == row["diffdecoder"]
