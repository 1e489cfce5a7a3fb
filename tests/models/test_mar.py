"""MAR's transformer, head and sampling against the numbers of the official implementation."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lit_transdiff.config import SamplingConfig
from lit_transdiff.flow.diffusion import ancestral, cosine_chain, diffusion_loss, variational_bound
from lit_transdiff.models import layers
from lit_transdiff.models.mar import MaskedTransformer, known_tokens, rows_at, unknown_tokens
from tests.helpers.families import as_tokens, check, masked_transformer, same_shapes, scalars, settings, tensors
from tests.helpers.reference import features_of, reference_frequencies

pytestmark = pytest.mark.numeric
SIZES = {
    "base": (dict(width=768, num_heads=12, encoder_blocks=12, decoder_blocks=12, head_width=1024, head_blocks=6), 207_924_768),
    "large": (dict(width=1024, num_heads=16, encoder_blocks=16, decoder_blocks=16, head_width=1280, head_blocks=8), 478_326_304),
    "huge": (dict(width=1280, num_heads=16, encoder_blocks=20, decoder_blocks=20, head_width=1536, head_blocks=12), 942_403_104),
}
SHAPE = dict(mlp_ratio=4.0, num_classes=1000, num_class_tokens=64, num_tokens=256, token_features=16)
NO_DROPOUT = dict(attention_dropout=0.0, projection_dropout=0.0)


@pytest.fixture(autouse=True)
def _frequencies_of_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "sinusoids", lambda t: features_of(t, reference_frequencies()))


@pytest.mark.parametrize("size", SIZES)
def test_keys_shapes_and_parameter_counts(size: str):
    numbers, count = SIZES[size]
    with torch.device("meta"):
        net = MaskedTransformer(**numbers, decoder_width=numbers["width"], **SHAPE, **NO_DROPOUT)
    assert sum(p.numel() for p in net.parameters()) == count
    if size == "base":
        same_shapes(net, "mar_base_d6_w1024")


@torch.no_grad()
def test_transformer():
    name = "mar_transformer"
    case, net = tensors(name), masked_transformer()
    tokens, orders = as_tokens(case["in/latents"]), case["in/orders"]
    check(name, "tokens", tokens, case)
    known = known_tokens(orders, math.ceil(64 * case["in/mask_rate"].item()))
    assert torch.equal(torch.ones(3, 64, dtype=torch.bool).scatter(1, known, False), case["out/mask"])
    for key, drop in (("z", None), ("z_null", torch.ones(3, dtype=torch.bool))):
        classes = net.class_vectors(case["in/labels"], drop)
        encoded = net.encode(classes, tokens, known)
        if drop is None:
            check(name, "encoded", encoded, case)
        check(name, key, net.decode(encoded, known), case)


def test_head_its_loss_and_gradients():
    name = "mar_diffloss"
    case, head = tensors(name), masked_transformer().diffloss["net"]
    chain, t, x, noise = cosine_chain(), case["in/t"], case["in/target"], case["in/noise"]
    condition = head.cond_embed(case["in/c"])
    with torch.no_grad():
        check(name, "net_out", head(case["in/x"], t, condition), case)
    x_t = chain.noised(x, noise, t)
    out = head(x_t, t, condition)
    rows = diffusion_loss(out, x, noise, t, x_t, chain)
    rows.mean().backward()
    check(name, "x_t", x_t, case)
    check(name, "mse", (out[:, :16] - noise).square().mean(1), case)
    check(name, "vb", variational_bound(out, x, t, x_t, chain), case)
    check(name, "loss", rows, case)
    check_gradients(name, head, case, 4)


def check_gradients(name: str, net: nn.Module, case: dict[str, Tensor], number: int) -> None:
    gradients = {f"grad/{key}": p.grad for key, p in net.named_parameters()}
    names = [key.removeprefix("out/") for key in case if key.startswith("out/grad/")]
    assert len(names) == number
    for key in names:
        check(name, key, gradients[key], case)


def test_training_loss_and_gradients():
    name = "mar_loss_train"
    case, net = tensors(name), masked_transformer().train()
    tokens = as_tokens(case["in/latents"])
    known = known_tokens(case["in/orders"], math.ceil(64 * case["in/mask_rate"].item()))
    context = net.context(net.class_vectors(case["in/labels"], case["in/drop_rand"] < 0.1), tokens, known)
    head = net.diffloss["net"]
    condition, draws = head.cond_embed(context).flatten(0, 1), settings(name)["diffusion_batch_mul"]

    x, noise, t, chain = tokens.flatten(0, 1).repeat(draws, 1), case["in/noise"], case["in/t"], cosine_chain()
    x_t = chain.noised(x, noise, t)
    rows = diffusion_loss(head(x_t, t, condition.repeat(draws, 1)), x, noise, t, x_t, chain)
    unknown = torch.ones(4, 64).scatter(1, known, 0).flatten().repeat(draws)
    loss = (rows * unknown).sum() / unknown.sum()
    loss.backward()
    check(name, "loss", loss[None], case)
    check_gradients(name, net, case, 10)


@torch.no_grad()
def test_sampling_with_a_linear_scale():
    name = "mar_sample_cfg3_linear"
    case, net = tensors(name), masked_transformer()
    head, orders, given = net.diffloss["net"], case["in/orders"], scalars(name)
    classes = [net.class_vectors(case["in/labels"], torch.full((2,), drop)) for drop in (False, True)]
    tokens, left = torch.zeros(2, 64, 16), 64
    for i, after in enumerate(unknown_tokens(64, given["num_iter"])):
        places = orders[:, after:left].sort(dim=1).values
        assert places.shape[1] == given["tokens_per_iteration"][i]
        known = known_tokens(orders, left)
        conditions = [head.cond_embed(rows_at(net.context(c, tokens, known), places)).flatten(0, 1) for c in classes]
        scale = 1 + (given["cfg"] - 1) * (64 - max(after, 1)) / 64

        def predict(x_t: Tensor, step: int, conditions=conditions, scale=scale) -> Tensor:
            c, u = (head(x_t, torch.tensor([step]), condition) for condition in conditions)
            u[:, 16:] = c[:, 16:]
            return u + scale * (c - u)

        steps = iter(case[f"in/steps_{i}"][:, : 2 * places.shape[1]])
        config = SamplingConfig(num_steps=5, grid="uniform")
        drawn = ancestral(predict, case[f"in/noise_{i}"], cosine_chain(), lambda steps=steps: next(steps), config)
        tokens = tokens.scatter(1, places[..., None].expand(-1, -1, 16), drawn.unflatten(0, (2, -1)))
        left = after
    check(name, "latents", tokens.transpose(1, 2).unflatten(2, (8, 8)), case)


@pytest.mark.parametrize(("parts", "length"), [(4, 64), (64, 256), (256, 256)])
def test_tokens_that_are_left(parts: int, length: int):
    name = "mar_schedules"
    case = tensors(name)
    left = torch.tensor(unknown_tokens(length, parts))
    assert torch.equal(left.clamp(min=1), case[f"out/mask_len_{parts}_of_{length}"])  # the last, 0, stands as 1 there
    scales = 1 + (3 - 1) * (length - left.clamp(min=1)) / length
    check(name, f"cfg3_linear_{parts}_of_{length}", scales, case)


@pytest.mark.parametrize("parts", [1, 2, 7, 16])
def test_each_iteration_draws_at_least_one_token(parts: int):
    left = [16, *unknown_tokens(16, parts)]
    assert len(left) == parts + 1 and left[-1] == 0
    assert all(before > after for before, after in pairwise(left))


def small() -> MaskedTransformer:
    torch.manual_seed(0)
    shape = dict(width=16, decoder_width=24, num_heads=2, encoder_blocks=2, decoder_blocks=2, mlp_ratio=2.0, num_classes=5)
    net = MaskedTransformer(
        **shape, num_class_tokens=3, num_tokens=9, token_features=4, head_width=8, head_blocks=2, **NO_DROPOUT
    )
    for p in net.parameters():
        nn.init.normal_(p, std=0.3)
    return net


def test_every_parameter_gets_a_gradient():
    net = small().train()
    known = known_tokens(torch.rand(4, 9).argsort(1), 6)
    context = net.context(net.class_vectors(torch.arange(4), torch.arange(4) < 2), torch.randn(4, 9, 4), known)
    head = net.diffloss["net"]
    head(torch.randn(36, 4), torch.arange(36), head.cond_embed(context.flatten(0, 1))).square().mean().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.mark.usefixtures("float64")
@torch.no_grad()
@pytest.mark.parametrize("num_known", [0, 4, 8])
def test_the_context_depends_on_known_tokens_alone(num_known: int):
    net = small()
    order, tokens = torch.rand(3, 9).argsort(1), torch.randn(3, 9, 4)
    known, classes = known_tokens(order, 9 - num_known), net.class_vectors(torch.tensor([0, 4, 2]))
    context = net.context(classes, tokens, known)
    other = torch.randn(3, 9, 4).scatter(1, known[..., None].expand(-1, -1, 4), rows_at(tokens, known))
    torch.testing.assert_close(net.context(classes, other, known), context)
    for i in range(3):
        one = slice(i, i + 1)
        torch.testing.assert_close(net.context(classes[one], tokens[one], known[one]), context[one])
    if num_known:
        other.scatter_add_(1, known[:, :1, None].expand(-1, -1, 4), torch.ones(3, 1, 4))
        assert ((net.context(classes, other, known) - context).abs().amax(dim=2) > 1e-6).all()
