"""However the parts of a model are run, they compute what they compute eagerly."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lit_transdiff.base import hardware
from lit_transdiff.config import SamplingConfig
from lit_transdiff.config.sit import SiTConfig
from lit_transdiff.models import execution
from lit_transdiff.models.autoencoder import IdentityAutoencoder
from lit_transdiff.models.execution import can_compile, compile_blocks, recompute_blocks
from lit_transdiff.models.sit import SiT
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.sampling import generator as generator_module
from lit_transdiff.sampling.generator import Generator
from lit_transdiff.sampling.loop import generate
from lit_transdiff.training.build import check_run
from tests.helpers.small import small_run
from tests.helpers.small_model import build

pytestmark = pytest.mark.numeric
SHAPE = {"patch_size": 2, "num_context_tokens": 16}


def step(model: TransDiff) -> dict[str, torch.Tensor]:
    """Loss and gradients of one pass with dropout, of fixed numbers."""
    config = model.config
    torch.manual_seed(5)
    x = torch.randn(2, config.num_references, config.latent_channels, config.latent_size, config.latent_size)
    rows, t = x.transpose(0, 1).flatten(0, 1), torch.rand(2 * config.num_references)
    model.zero_grad()
    memory = model.memory(model.encode(torch.tensor([0, 1]), x[:, :-1]), every_reference=True)
    loss = model.velocity(rows, t, memory).square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


class WithTable(SiT):
    """A network with a table that is no weight and is not saved."""

    def __init__(self, config: SiTConfig) -> None:
        super().__init__(config)
        self.blocks[0].register_buffer("table", torch.arange(3.0), persistent=False)


def test_a_twin_shares_weights_and_tables():
    model = WithTable(SiTConfig(size="test", latent_size=4))
    other = execution.twin(model)
    assert other.blocks[0].table is model.blocks[0].table and not any(p.is_meta for p in other.parameters())
    assert other.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("references", [1, 4])
def test_recomputed_blocks_give_the_same_bits(references: int, every: int):
    model = build(**SHAPE, num_references=references, projection_dropout=0.2).train()
    expected = step(model)
    calls: list[int] = []
    for part in (model.encoder, model.decoder):
        recompute_blocks(part.blocks, every)
        part.blocks[0].norm1.register_forward_hook(lambda *_: calls.append(1))
    found = step(model)
    assert expected.keys() == found.keys() and all(
        torch.equal(expected[name], found[name]) for name in expected
    )
    assert len(calls) == 4  # forward, and again in the backward pass, of each part


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("references", [1, 4])
def test_compiled_blocks_give_the_same_numbers(references: int):
    if not can_compile("cpu"):
        pytest.skip("torch.compile does not work on this machine")
    model = build(**SHAPE, num_references=references, attention_dropout=0.0, projection_dropout=0.0).train()
    expected = step(model)
    compile_blocks([*model.encoder.blocks, *model.decoder.blocks])
    torch._dynamo.utils.counters.clear()
    found = step(model)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # one for all blocks of a class
    assert not torch._dynamo.utils.counters["graph_break"]


def test_without_a_compiler_blocks_run_eagerly_and_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def broken(function):
        def run(*args, **settings):
            raise RuntimeError("No working C++ compiler found\nand more")

        return run

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(execution, "can_compile", execution.lru_cache(can_compile.__wrapped__))
    model = build(**SHAPE, projection_dropout=0.0).eval()
    expected = step(model)
    compile_blocks([*model.encoder.blocks, *model.decoder.blocks])
    with caplog.at_level(logging.WARNING):
        found = step(model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    said = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert said == [
        "torch.compile does not work here, the blocks run eagerly: RuntimeError: No working C++ compiler "
        "found"
    ]


def generator_of(model: TransDiff, tmp_path, **how: bool) -> Generator:
    autoencoder = IdentityAutoencoder(model.config.latent_channels)
    return Generator(model.eval().requires_grad_(False), autoencoder, small_run(tmp_path), [], **how)


@pytest.mark.parametrize("references", [1, 4])
def test_rounded_weights_are_what_autocast_computes_with(references: int, tmp_path):
    model = build(**SHAPE, num_references=references)
    generator = generator_of(model, tmp_path)
    sampling = SamplingConfig(num_steps=3, guidance_scale=1.5, precision="bf16")
    labels, seeds = torch.tensor([0, 1, 1]), [1, 2, 3]
    rounded = generator.at("bf16").latents(labels, seeds, sampling)
    with torch.autocast("cpu", torch.bfloat16):
        expected = generate(model, labels, sampling, seeds)
    assert rounded.dtype == torch.float32 and torch.equal(rounded, expected)
    exact = generator.latents(labels, seeds, SamplingConfig(num_steps=3, guidance_scale=1.5))
    assert 0 < (rounded - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.dtype == torch.float32 for p in model.parameters())
    other = build(**SHAPE, num_references=references).requires_grad_(False)
    torch.nn.init.zeros_(other.decoder.final.linear.weight)
    changed = generator.at("bf16").of(other)
    # the rounded weights are the new model's
    assert not torch.equal(changed.latents(labels, seeds, sampling), rounded)


@pytest.mark.parametrize("fast", ["fp32", "bf16"])
def test_the_precision_auto_is_the_fast_one(fast: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generator_module, "fast_precision", lambda device: fast)
    generator = generator_of(build(**SHAPE), tmp_path)
    automatic, sampling = generator.at("auto"), SamplingConfig(num_steps=2)
    assert automatic.precision == fast and automatic.at("auto") is automatic is automatic.at(fast)
    labels, seeds = torch.tensor([0, 1]), [1, 2]
    expected = generator.at(fast).latents(labels, seeds, replace(sampling, precision=fast))
    assert torch.equal(automatic.latents(labels, seeds, replace(sampling, precision="auto")), expected)
    other = generator.at("bf16" if fast == "fp32" else "fp32")
    with pytest.raises(ValueError, match=r"sampling.precision: got '(fp32|bf16)'; allowed"):
        other.latents(labels, seeds, replace(sampling, precision="auto"))


def test_cpus_are_fast_in_bfloat16_where_they_multiply_tiles(monkeypatch: pytest.MonkeyPatch):
    """By the processor and oneDNN's settings alone, so that every start and every rank chooses the same."""
    flags = {"GenuineIntel", "avx512_bf16", "amx_bf16", "amx_tile"}
    cases = [(flags, None, "bf16"), (flags, "AVX512_CORE_AMX", "bf16"), (flags, "SSE41", "fp32")]
    for words, limit, precision in [*cases, (flags - {"amx_bf16"}, None, "fp32"), (set(), None, "fp32")]:
        monkeypatch.setattr(hardware, "words_of_cpu", lambda words=words: words)
        monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
        if limit is not None:
            monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
        hardware.has_fast_bfloat16.cache_clear()
        assert hardware.fast_precision(torch.device("cpu")) == precision
    hardware.has_fast_bfloat16.cache_clear()


def test_cuda_graphs_need_a_gpu(tmp_path):
    with pytest.raises(ValueError, match=r"CUDA graphs: got 'cpu'; allowed: a GPU"):
        generator_of(build(**SHAPE), tmp_path, cuda_graphs=True)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_generator_compiles_is_its_own(precision: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    """The model that it was given runs as before, and its weights are kept once; nothing piles up from
    precision to precision.
    """
    made: list[int] = []

    def counting(function):
        return lambda *args, **settings: made.append(1) or function(*args, **settings)

    monkeypatch.setattr(torch, "compile", counting)
    monkeypatch.setattr(execution, "can_compile", lambda device: True)
    model = build(**SHAPE)
    plain = generator_of(model, tmp_path).at(precision)
    compiled = generator_of(model, tmp_path, compile=True).at("bf16").at("fp32").at(precision)
    assert compiled.at(precision) is compiled
    sampling = SamplingConfig(num_steps=3, precision=precision)
    expected = plain.latents(torch.tensor([0, 1]), [1, 2], sampling)
    assert not made
    assert torch.equal(compiled.latents(torch.tensor([0, 1]), [1, 2], sampling), expected)
    parts = len(model.decoder.blocks) + 2  # and the embedding of the time, and the last layer
    assert len(made) == 3 * parts
    assert torch.equal(
        generator_of(model, tmp_path).at(precision).latents(torch.tensor([0, 1]), [1, 2], sampling), expected
    )
    assert len(made) == 3 * parts
    assert compiled.network.encoder.null_class.data_ptr() == model.encoder.null_class.data_ptr()


def test_settings_of_recomputation_that_cannot_act_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"activation_checkpointing_every: got 2; allowed: 1 when"):
        small_run(tmp_path, training={"activation_checkpointing_every": 2})
    with pytest.raises(
        ValueError, match=r"activation_checkpointing: got 'all'; allowed: 'none' or 'decoder' in stage"
    ):
        check_run(
            small_run(
                tmp_path, stage="diffusion_head", init_from="x", training={"activation_checkpointing": "all"}
            )
        )


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_work_of_a_row_of_images_is_about_what_is_counted(guidance: float):
    model = SiT(SiTConfig(size="test", latent_size=8)).eval()  # all of which a solver evaluates
    sampling = SamplingConfig(num_steps=3, guidance_scale=guidance)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        generate(model, torch.tensor([0, 1]), sampling, [1, 2])
    expected = counter.get_total_flops() / 2
    assert 0.8 < generator_module.flops_of_row(model, sampling) / expected < 1.05  # its blocks


def test_many_images_on_a_gpu_are_worth_a_compilation(tmp_path, monkeypatch: pytest.MonkeyPatch):
    sampling = SamplingConfig(num_steps=3)
    generator = generator_of(build(**SHAPE), tmp_path, compile=None)
    many = int(generator_module.MANY_FLOPS / generator_module.flops_of_row(generator.model, sampling)) + 1
    assert generator.for_images(many, sampling).compile is False  # on a CPU
    monkeypatch.setattr(Generator, "device", torch.device("cuda"))
    assert generator.for_images(many, sampling).compile is True
    assert generator.for_images(many - 2, sampling).compile is False
    for wish in (True, False):
        chosen = replace(generator, compile=wish)
        assert chosen.for_images(many, sampling) is chosen is chosen.for_images(1, sampling)


@pytest.mark.parametrize(("device", "world", "share"), [("cpu", 2, 0.5), ("cpu", 1, 1.0), ("cuda", 2, 1.0)])
def test_a_mesh_that_averages_is_taken(monkeypatch, device, world, share):
    monkeypatch.setattr(torch.cpu.Stream, "record_event", lambda stream: None, raising=False)

    def reduce_scatter(average, ones, op, group):
        average.fill_(ones.sum() * share)

    monkeypatch.setattr(execution.dist, "reduce_scatter_tensor", reduce_scatter)
    execution.check_cpus(SimpleNamespace(device_type=device, size=lambda: world, get_group=lambda: None))


@pytest.mark.parametrize("has_streams", [True, False])
def test_cpus_whose_gradients_are_not_averaged_are_refused(monkeypatch, has_streams: bool):
    """gloo of torch 2.7 gives the sum where FSDP asks for the average; FSDP of 2.6 fails on CPUs."""
    monkeypatch.setattr(torch.cpu.Stream, "record_event", lambda stream: None, raising=False)
    if not has_streams:
        monkeypatch.delattr(torch.cpu.Stream, "record_event")
    monkeypatch.setattr(
        execution.dist, "reduce_scatter_tensor", lambda average, ones, op, group: average.copy_(ones.sum())
    )
    mesh = SimpleNamespace(device_type="cpu", size=lambda: 2, get_group=lambda: None)
    with pytest.raises(ValueError, match=r"got .fsdp.; .* cannot average the gradients"):
        execution.check_cpus(mesh)
