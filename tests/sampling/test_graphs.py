"""CUDA graphs give the numbers of eager sampling, batch after batch; on the CPU with a stand-in for them."""

import gc
import logging
import weakref
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lit_transdiff.base.randomness import PerImageNormal
from lit_transdiff.config import ModelConfig, SamplingConfig
from lit_transdiff.config.acdit import ACDiTConfig
from lit_transdiff.config.ardiff import ARDiffConfig
from lit_transdiff.config.flowar import FlowARConfig
from lit_transdiff.config.mar import MARConfig
from lit_transdiff.config.sit import DiTConfig, SiTConfig
from lit_transdiff.config.xar import XARConfig
from lit_transdiff.models.execution import twin
from lit_transdiff.models.fusion import fused, fusion_pattern
from lit_transdiff.models.layers import KeysValues
from lit_transdiff.models.paradigm import Paradigm, build_model
from lit_transdiff.sampling import graphs as graphs_file
from lit_transdiff.sampling.forms import FormlessError, put_together, take_apart
from lit_transdiff.sampling.graphs import CUDARecorder, Graphs, replay
from lit_transdiff.sampling.loop import generate
from tests.helpers.recorder import CPURecorder
from tests.helpers.small_model import SMALL, build

pytestmark = pytest.mark.numeric

GUIDED = dict(guidance_scale=1.5)
DIFFUSION = dict(solver="ancestral", num_steps=3, **GUIDED)
FAMILIES = {
    "one-step": (ModelConfig(**SMALL), dict(num_steps=4, guidance_interval=[0.3, 0.8], **GUIDED)),
    "heun": (ModelConfig(**SMALL), dict(solver="heun", num_steps=3, guidance="rising", **GUIDED)),
    "adams_bashforth": (ModelConfig(**SMALL), dict(solver="adams_bashforth", num_steps=3)),
    "mrar": (
        ModelConfig(**SMALL, num_references=4),
        dict(
            num_steps=3,
            reference_steps=[2, 3, 3, 3],
            reference_guidance=[1.0, 1.5, 1.5, 2.0],
            reuse_noise=False,
        ),
    ),
    "sit": (SiTConfig(size="test", latent_size=4), dict(num_steps=3, **GUIDED)),
    "dit": (DiTConfig(size="test", latent_size=4), DIFFUSION),
    "dpmpp_2m": (DiTConfig(size="test", latent_size=4), {**DIFFUSION, "solver": "dpmpp_2m"}),
    "mar": (MARConfig(size="test", latent_size=4), dict(num_parts=2, **DIFFUSION)),
    "xar": (XARConfig(size="test", latent_size=4, parts_per_side=2), dict(num_steps=3, **GUIDED)),
    "flowar": (FlowARConfig(size="test", latent_size=4), dict(num_steps=3, **GUIDED)),
    "ardiff": (ARDiffConfig(size="test", latent_size=2), DIFFUSION),
    "acdit": (ACDiTConfig(size="test", latent_size=4, latent_channels=3), DIFFUSION),
}
LABELS, SEEDS = torch.tensor([0, 3]), [1, 2]
SAMPLING = SamplingConfig(num_steps=3, **GUIDED)


def with_graphs(model: Paradigm, recorder=None) -> tuple[Paradigm, Graphs]:
    graphs = Graphs(recorder or CPURecorder())
    network = twin(model)
    replay(network, graphs)
    return network, graphs


def weighted(config) -> Paradigm:
    """A model without weights of zero, so that everything matters."""
    torch.manual_seed(0)
    model = build_model(config).eval().requires_grad_(False)
    for p in model.parameters():
        if not p.any():
            nn.init.normal_(p, std=0.2)
    return model


def batches(number: int):
    """Labels and seeds of as many batches of one form."""
    for i in range(number):
        yield torch.tensor([2 * (i % 2), 1]), [2 * i, 2 * i + 1]


@pytest.mark.parametrize(
    ("name", "precision"), [*((name, "fp32") for name in FAMILIES), ("one-step", "bf16"), ("mrar", "bf16")]
)
def test_graphs_give_the_same_bits_for_every_batch(name: str, precision: str):
    config, settings = FAMILIES[name]
    model, sampling = weighted(config), SamplingConfig(**settings)
    network, graphs = with_graphs(model)
    kept, recorded = network.keep(), []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
        for labels, seeds in batches(5):
            found = generate(network, labels, sampling, seeds, kept=kept, solving=graphs)
            assert torch.equal(found, generate(model, labels, sampling, seeds))
            recorded.append(graphs.recorder.recorded)
    assert not graphs.refused
    assert recorded[4] == recorded[3] == graphs.number > 0
    played = graphs.recorder.played
    generate(network, torch.tensor([4, 0]), sampling, [8, 9], kept=kept, solving=graphs)
    # what is left to the host: a graph for each part, for its context and memory, and nothing for a step
    assert graphs.recorder.played - played <= 6 * len(model.part_sizes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FAMILIES)
def test_graphs_on_a_gpu(name: str):
    config, settings = FAMILIES[name]
    model, sampling = weighted(config).to("cuda"), SamplingConfig(**settings)
    network, graphs = with_graphs(model, CUDARecorder(torch.device("cuda")))
    kept = network.keep()
    for labels, seeds in batches(5):
        found = generate(network, labels.cuda(), sampling, seeds, kept=kept, solving=graphs)
        expected = generate(model, labels.cuda(), sampling, seeds)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert graphs.number and not graphs.refused


def test_batches_settings_and_contexts_have_graphs_of_their_own():
    model = build(4).requires_grad_(False)
    network, graphs = with_graphs(model)
    fusion = fused(torch.tensor([1, 2]), fusion_pattern(16, "halves", 0))
    for _ in range(3):
        for labels, seeds in ((LABELS, SEEDS), (torch.tensor([0, 1, 4]), [4, 5, 6]), (LABELS[:1], [7])):
            for sampling in (SAMPLING, replace(SAMPLING, guidance_scale=2.0), SamplingConfig(num_steps=3)):
                contexts = fusion if len(labels) == 2 else None
                found = generate(network, labels, sampling, seeds, contexts, solving=graphs)
                assert torch.equal(found, generate(model, labels, sampling, seeds, contexts))


@pytest.mark.parametrize(
    "sampling",
    [SAMPLING, SamplingConfig(solver="dopri5", rtol=0.1, atol=0.01, **GUIDED)],
    ids=["long", "adaptive"],
)
def test_a_long_or_adaptive_loop_has_graphs_of_its_evaluations(
    monkeypatch: pytest.MonkeyPatch, sampling: SamplingConfig
):
    monkeypatch.setattr(graphs_file, "MOST_STEPS_OF_A_GRAPH", 2)
    model = build().requires_grad_(False)
    network, graphs = with_graphs(model)
    for labels, seeds in batches(3):
        found = generate(network, labels, sampling, seeds, solving=graphs)
        assert torch.equal(found, generate(model, labels, sampling, seeds))
    assert graphs.recorder.played >= 3 * (SAMPLING.num_steps - 1)
    assert not graphs.refused and not any(key[0] is graphs_file.solved for key in graphs.known)


def test_a_problem_that_hides_what_it_reads_has_graphs_of_its_evaluations():
    model = build().requires_grad_(False)
    network, graphs = with_graphs(model)
    explicit = network.decode

    def decode(*args):
        decoding = explicit(*args)
        problem = next(decoding)
        solution = yield replace(problem, predict=lambda x, t: problem.predict(x, t), pair=problem.pair)
        try:
            decoding.send(solution)
        except StopIteration as end:
            return end.value

    network.decode = decode
    for labels, seeds in batches(4):
        found = generate(network, labels, SAMPLING, seeds, solving=graphs)
        assert torch.equal(found, generate(model, labels, SAMPLING, seeds))
    assert not any(key[0] is graphs_file.solved for key in graphs.known)
    assert graphs.recorder.played >= 3 * (SAMPLING.num_steps - 1)


@torch.no_grad()
def test_what_cannot_be_recorded_runs_as_it_is_and_says_so_once(caplog: pytest.LogCaptureFixture):
    graphs, calls = Graphs(CPURecorder()), []

    def waiting(x: Tensor) -> float:
        calls.append(1)
        return x.sum().item()

    with caplog.at_level(logging.WARNING):
        assert [graphs(waiting, torch.full((2,), i)) for i in range(4)] == [0, 2, 4, 6]
    assert len(calls) == 5  # once in vain
    assert [r.getMessage() for r in caplog.records] == [
        "a part of sampling cannot become a CUDA graph and runs as it is: CUDA error: "
        "aten::_local_scalar_dense is not permitted when stream is capturing"
    ]
    assert graphs.number == 0


@torch.no_grad()
@pytest.mark.parametrize("recording", [True, False])
def test_without_memory_for_graphs_sampling_goes_on_without(
    recording: bool, caplog: pytest.LogCaptureFixture
):
    graphs, failures = Graphs(CPURecorder()), ["full"]

    def full(x: Tensor) -> Tensor:
        if failures and graphs.recording == recording:
            raise torch.OutOfMemoryError(failures.pop())
        return x / 2

    for _ in range(2):
        assert graphs(torch.neg, torch.ones(1)).tolist() == [-1.0]
    for i in range(4):
        assert graphs(full, torch.full((2,), float(i))).tolist() == [i / 2] * 2
    assert graphs.closed and not graphs.number and graphs.recorder.recorded == 1
    assert [r.getMessage() for r in caplog.records] == [
        "the device's memory is too small for the CUDA graphs of sampling, which goes on without"
    ]


def shifted(x: Tensor, memory: KeysValues) -> Tensor:
    return x + memory.keys


@torch.no_grad()
def test_a_buffer_is_written_again_only_when_its_tensor_is_another_or_has_changed(
    monkeypatch: pytest.MonkeyPatch,
):
    graphs, written, copy = Graphs(CPURecorder()), [], torch._foreach_copy_
    monkeypatch.setattr(torch, "_foreach_copy_", lambda to, of: (written.append(len(to)), copy(to, of)))
    memory = KeysValues(torch.ones(2))
    for i in range(4):
        assert graphs(shifted, torch.full((2,), float(i)), memory).tolist() == [i + 1.0] * 2
    assert written == [2, 1, 1, 1, 1, 1]  # recorded with both; then x and the result
    memory.keys.add_(1)
    x = torch.zeros(2)
    assert graphs(shifted, x, memory).tolist() == [2.0, 2.0]
    memory.keys = torch.full((2,), 7.0)
    assert graphs(shifted, x, memory).tolist() == [7.0, 7.0]


@torch.no_grad()
def test_results_are_not_overwritten():
    graphs = Graphs(CPURecorder())
    found = [graphs(torch.neg, torch.full((2,), i)) for i in range(4)]
    assert [int(x[0]) for x in found] == [0, -1, -2, -3]


@torch.no_grad()
def test_the_graph_that_was_not_used_for_longest_goes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(graphs_file, "MOST_FORMS", 2)
    graphs = Graphs(CPURecorder())
    for length in (1, 1, 2, 2, 1, 3, 3):
        assert graphs(torch.neg, torch.ones(length)).tolist() == [-1.0] * length
    assert graphs.number == 2 and graphs.recorder.recorded == 3
    assert {tuple(graph.buffers[0].shape) for graph in graphs.known.values()} == {(1,), (3,)}


def test_graphs_go_with_the_generator():
    network, graphs = with_graphs(build().requires_grad_(False))
    for labels, seeds in batches(3):
        generate(network, labels, SAMPLING, seeds, solving=graphs)
    assert graphs.number
    gone = weakref.ref(graphs), weakref.ref(network)
    del network, graphs
    gc.collect()
    assert [left() for left in gone] == [None, None]


def test_with_gradients_nothing_is_recorded():
    graphs = Graphs(CPURecorder())
    for _ in range(3):
        x = torch.ones(2, requires_grad=True)
        graphs(torch.neg, x).sum().backward()
        assert x.grad.tolist() == [-1, -1]
    assert not graphs.known


class Named(NamedTuple):
    x: Tensor
    scale: float


@dataclass(frozen=True)
class Nested:
    pieces: list
    table: dict


def test_values_are_taken_apart_and_put_together():
    a, b = torch.zeros(2), torch.ones(3, dtype=torch.int64)
    value = Nested([a, (b, a), Named(b, 0.5), None], {"function": partial(shifted, a, memory=b), 3: "x"})
    form, tensors = take_apart(value)
    assert tensors[0] is a and tensors[1] is b and len(tensors) == 2
    c, d = torch.ones(2), torch.zeros(3)
    again = put_together(form, [c, d])
    assert again.pieces[0] is c and again.pieces[1] == (d, c) and again.pieces[2] == Named(d, 0.5)
    function = again.table["function"]
    assert function.func is shifted and function.args[0] is c and function.keywords == {"memory": d}
    other = Nested([c, (d.long(), c), Named(d.long(), 0.5), None], value.table | {3: "y"})
    assert take_apart(value) == take_apart(value)[:1] + (tensors,)
    assert take_apart(other)[0] != form
    assert len({take_apart(v)[0] for v in (1, 1.0, True)}) == 3
    assert take_apart([a, a])[0] != take_apart([a, a.clone()])[0]


def test_values_without_a_form_are_refused():
    x = torch.zeros(1)
    for value in (lambda: x, {1, 2}, object(), PerImageNormal([1]).several, partial(lambda y: x)):
        with pytest.raises(FormlessError):
            take_apart([value])
    model = build()
    assert take_apart(model.at_one_time)[0] == take_apart(model.at_one_time)[0]
    assert take_apart(model.at_one_time)[0] != take_apart(build().at_one_time)[0]


@pytest.mark.parametrize("shape", [(16,), (2, 4, 4), (3,), (5, 5), ()])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_several_draws_at_once_are_the_successive_ones(shape: tuple[int, ...], count: int):
    one, other = PerImageNormal([1, 2]), PerImageNormal([1, 2])
    one(*shape), other(*shape)
    found = other.several(count, *shape)
    assert found.shape == (count, 2, *shape)
    assert all(torch.equal(found[i], one(*shape)) for i in range(count))
    assert torch.equal(one(*shape), other(*shape))


@pytest.mark.parametrize("name", ["one-step", "mar"])
def test_evaluations_within_graphs_are_counted(name: str):
    config, settings = FAMILIES[name]
    model, sampling = weighted(config), SamplingConfig(**settings)
    network, graphs = with_graphs(model)
    rows: list[int] = []
    model.evaluated.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    for labels, seeds in batches(5):
        before = graphs.rows
        rows.clear()
        generate(network, labels, sampling, seeds, solving=graphs)
        generate(model, labels, sampling, seeds)
        assert graphs.rows - before == sum(rows) > 0
