"""Our model, loss, gradients and samplers against the released formulation written plainly, where there are
no fixtures.
"""

import pytest
import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from benchmarks import plain
from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import FlowConfig, ModelConfig, SamplingConfig
from lit_transdiff.flow.loss import draw_times
from lit_transdiff.models.tokens import patchify
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.key_names import to_released
from lit_transdiff.sampling.loop import generate
from tests.helpers.reference import (
    assert_near,
    features_of,
    flow_loss,
    latents_to_tokens,
    load,
    reference_frequencies,
)

pytestmark = pytest.mark.numeric
HEADS = 2
SHAPE = dict(width=32, num_heads=HEADS, encoder_blocks=3, decoder_blocks=2, num_classes=6, num_class_tokens=5)
GRIDS = dict(
    latent_channels=4, latent_size=8, num_context_tokens=64, attention_dropout=0.0, projection_dropout=0.0
)
TIMES = 1e-6  # training times are float32, within 6e-8 of the integers of the released code
KINDS = {"one-step": {}, "512": {"latent_size": 16}, "MRAR": {"num_references": 4}}


def pair(kind: str) -> tuple[TransDiff, plain.State]:
    """Our model of a kind with random weights in every tensor, and its released state dict."""
    torch.manual_seed(3)
    model = TransDiff(ModelConfig(**{**SHAPE, **GRIDS, **KINDS[kind]})).eval()
    for name, p in model.named_parameters():
        nn.init.normal_(p, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.1)
    return model, {
        key: value.clone() for key, value in to_released(model.state_dict(), model.config, {}).state.items()
    }


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= tolerance, f"relative error {error:.2e}"


def as_latents(tokens: Tensor, like: Tensor) -> Tensor:
    return rearrange(tokens, "... (h w) c -> ... c h w", h=like.shape[-1])


@torch.no_grad()
def test_the_plain_formulation_gives_the_fixtures(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(plain, "time_features", lambda t: features_of(t, reference_frequencies()))
    w, heads = load("w_onestep256"), 4
    case = load("onestep256_encoder")
    none = torch.zeros(len(case["in/labels"]), dtype=torch.bool)
    assert_near(
        "onestep256_encoder", "z", plain.encode(w, heads, case["in/labels"], none), case["out/z"][: len(none)]
    )
    case = load("onestep256_decoder")
    assert_near(
        "onestep256_decoder",
        "v_frac",
        plain.velocity(w, heads, case["in/x"], case["in/t_frac"], case["in/c"]),
        case["out/v_frac"],
    )
    name = "onestep256_loss_eval"
    case = load(name)
    labels, x = case["in/labels"], latents_to_tokens(case["in/imgs"])
    z = plain.encode(w, heads, labels, torch.zeros(len(labels), dtype=torch.bool))
    assert_near(
        name,
        "loss",
        plain.loss(w, heads, x, z, case["out/timestep"], case["in/noises"])[None],
        case["out/loss"],
    )
    name = "onestep256_sample_cfg1.3_s5"
    case = load(name)
    labels = case["in/labels"]
    z, null = (
        plain.encode(w, heads, labels, torch.full((len(labels),), dropped)) for dropped in (False, True)
    )
    latent = plain.sample(w, heads, z, null, case["in/noise"], list(case["in/draws"]), 1.3, 0.89, 0.95)
    assert_near(name, "latent", as_latents(latent, case["out/latent"]), case["out/latent"])
    case, w = load("mrar_encoder"), load("w_mrar256")
    z = plain.encode(
        w, heads, case["in/labels"], torch.zeros(2, dtype=torch.bool), case["out/tokens"][:, 64:]
    )
    assert_near("mrar_encoder", "z_prefix256", z - w["diffusion_pos_embed_learned"], case["out/z_prefix256"])


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient(kind: str):
    model, w = pair(kind)
    config, draws = model.config, 3
    references, size = config.num_references, config.latent_size
    labels, drop = torch.tensor([0, 5, 2]), torch.tensor([False, True, False])
    x = torch.randn(3, references, 4, size, size)
    t = draw_times(torch.randn(references, draws * 3), FlowConfig(discretize=1000))
    noise = torch.randn(references, draws * 3, 4, size, size)

    memory = model.memory(model.encode(labels, x[:, :-1], drop), every_reference=True)
    rows = repeat(x, "b r c h w -> (r m b) c h w", m=draws)
    velocity = lambda x_t, t: model.velocity(x_t, t, memory)  # noqa: E731
    ours = flow_loss(velocity, rows, noise.flatten(0, 1), t.flatten(), FlowConfig()).mean()
    ours.backward()

    for value in w.values():
        value.requires_grad_()
    whole = (1000 * t).round().long()
    images, draws_of = [latents_to_tokens(x[:, r]) for r in range(references)], latents_to_tokens(noise)
    if kind == "MRAR":
        tokens = patchify(x[:, :-1], 2).flatten(1, 2)
        theirs = plain.mrar_loss(w, HEADS, images, tokens, labels, drop, whole, draws_of)
    else:
        theirs = plain.loss(w, HEADS, images[0], plain.encode(w, HEADS, labels, drop), whole[0], draws_of[0])
    theirs.backward()
    close(ours.detach(), theirs.detach(), TIMES)
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    ours_named = to_released(gradients, config, {}).state
    largest = max(float(value.grad.abs().max()) for value in w.values() if value.grad is not None)
    for key, value in w.items():
        if value.grad is None:
            assert kind != "MRAR" and key.startswith("z_proj."), key
            continue
        error = (ours_named[key] - value.grad).abs().max()
        assert error <= TIMES * max(float(value.grad.abs().max()), 1e-3 * largest), f"{key}: {error:.2e}"


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize(
    "kind, scales",
    [(kind, [scale]) for kind in KINDS for scale in (1.0, 1.3)] + [("MRAR", [1.0, 1.3, 1.5, 2.0])],
    ids=str,
)
def test_samplers(kind: str, scales: list[float]):
    """The released loop: one initial noise for all references, fresh Gaussian numbers a step, guidance by
    reference.
    """
    model, w = pair(kind)
    references, size = model.config.num_references, model.config.latent_size
    labels, seeds, steps = torch.tensor([1, 4]), [11, 12], 6
    guidance = dict(guidance_scale=scales[0]) if len(scales) == 1 else dict(reference_guidance=scales)
    sampling = SamplingConfig(num_steps=steps, drift_scale=0.87, noise_scale=0.91, **guidance)
    ours = generate(model, labels, sampling, seeds)

    draw = PerImageNormal(seeds)
    noise = latents_to_tokens(draw(4, size, size))
    fresh = [[latents_to_tokens(draw(4, size, size)) for _ in range(steps - 1)] for _ in range(references)]
    made = plain.draw_images(w, HEADS, labels, noise, fresh, scales * (references // len(scales)), 0.87, 0.91)
    close(ours, torch.stack([as_latents(x, ours) for x in made], dim=1), tolerance=1e-9)
