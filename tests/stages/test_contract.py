"""A family whose class breaks the contract is refused in one line before anything starts."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lit_transdiff
from lit_transdiff import Family, ModelSettings, Paradigm, Problem, Stack
from lit_transdiff.config import PARADIGMS, RunConfig
from lit_transdiff.config.loading import run_from
from lit_transdiff.stages.contract import check_family_class, try_family
from lit_transdiff.training.build import check_run
from tests.helpers.small import FAMILIES, SETTINGS, small_run

pytestmark = pytest.mark.usefixtures("fresh_tables")


@dataclass(frozen=True)
class PlainConfig(ModelSettings):
    """Of a family that is two squares, one after the other."""

    paradigm: str = "plain"
    num_classes: int = 10
    latent_channels: int = 1
    latent_size: int = 32
    num_blocks: int = 2


class Plain(Paradigm):
    """Predicts a constant times the noisy tokens: the upper half, then the lower one."""

    stacks = {"blocks": Stack("blocks", "num_blocks")}  # noqa: RUF012

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config, self.part_sizes, self.token = config, (1, 1), (512,)
        self.blocks = nn.ModuleList(nn.Linear(512, 512) for _ in range(config.num_blocks))

    def parts(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), 2, 512)

    def condition(self, labels: Tensor, drop: Tensor, x: Tensor, normal: Any) -> Tensor:
        return labels

    def predict(self, x_t: Tensor, t: Tensor, memory: Tensor) -> Tensor:
        for block in self.blocks:
            x_t = block(x_t)
        return x_t

    def decode(
        self, labels: Tensor, sampling: Any, normal: Any, kept: Any = None, contexts: Any = None
    ) -> Any:
        predict = lambda x_t, t: self.blocks[0](x_t)  # noqa: E731
        drawn = []
        for _ in range(2):
            drawn.append((yield Problem((512,), predict, lambda x_t, t: (predict(x_t, t),) * 2)))
        return torch.stack(drawn, dim=1).reshape(len(labels), 1, 1, 32, 32)


def run_of(folder: Path, network: Any, settings: type = PlainConfig) -> RunConfig:
    lit_transdiff.PARADIGMS["plain"] = Family(settings, network)  # type: ignore[arg-type]
    own = {"output_dir": str(folder), "stage": "pretrain", "model": {"paradigm": "plain"}}
    if getattr(network, "process", "").endswith("diffusion"):
        own |= {"sampling": {"solver": "ancestral"}}
    return run_from({**SETTINGS, **own})


def test_a_family_that_keeps_the_contract_is_taken(tmp_path: Path):
    check_run(run_of(tmp_path, Plain))


@pytest.mark.parametrize("name", ["transdiff", *FAMILIES])
def test_all_families_keep_it(tmp_path: Path, name: str):
    changes = FAMILIES.get(name, {})
    few = {"model": changes["model"] | {"patch_size": 16}} if changes else {}
    run = small_run(tmp_path, **changes | few)
    assert run.model.paradigm == name
    check_family_class(run.model)
    try_family(run.model, "dopri5")


def with_method(name: str, method: Callable[..., Any]) -> type[Plain]:
    return type("Broken", (Plain,), {name: method})


def with_attribute(name: str, value: Any) -> type[Plain]:
    def init(self: Any, config: PlainConfig) -> None:
        Plain.__init__(self, config)
        setattr(self, name, value)

    return type("Broken", (Plain,), {"__init__": init})


def failing(*given: Any) -> Any:
    raise RuntimeError("the first line\nand more")


def yields(problem: Any, images: tuple[int, ...] = (2, 1, 1, 32, 32)) -> Callable[..., Any]:
    def decode(self: Any, labels: Tensor, *more: Any) -> Any:
        yield problem
        return torch.zeros(images)

    return decode


SAME = Problem((512,), lambda x_t, t: x_t, lambda x_t, t: (x_t, x_t))
LACKING = type("Lacking", (Paradigm,), {"parts": Plain.parts, "predict": Plain.predict})
BROKEN: dict[str, tuple[Any, str]] = {
    "methods": (LACKING, "Lacking: methods: got 'no condition, decode'; allowed: all that Paradigm asks for"),
    "no family": (
        nn.Linear,
        "PARADIGMS['plain'].network: got <class 'torch.nn.modules.linear.Linear'>; allowed",
    ),
    "no module": (
        "nowhere.at:All",
        "PARADIGMS['plain'].network: ModuleNotFoundError: No module named 'nowhere'",
    ),
    "stacks": (
        type("Broken", (Plain,), {"stacks": {"blocks": Stack("blocks", "depth")}}),
        "Broken.stacks['blocks'].depth: got 'depth'; allowed: a field of PlainConfig",
    ),
    "stack": (
        type("Broken", (Plain,), {"stacks": {"blocks": Stack("layers", "num_blocks")}}),
        "Broken: the stack 'layers': got 'NoneType'; allowed: an nn.ModuleList with num_blocks blocks",
    ),
    "process": (
        type("Broken", (Plain,), {"process": "flwo"}),
        "process: 'flwo' is not known. Did you mean 'flow'?",
    ),
    "prediction": (
        type("Broken", (Plain,), {"prediction": "x"}),
        "Broken.prediction: got 'x'; allowed: velocity or clean or noise with the process 'flow'",
    ),
    "method": (
        type("Broken", (Plain,), {"methods": ("condition", "predict", "blocks.predict")}),
        "Broken: a name of a method: got 'blocks.predict'; allowed: a method of the model",
    ),
    "head": (
        type("Broken", (Plain,), {"head_prefixes": ("head.",)}),
        "Broken: a name of weights: got 'head.'; allowed: the beginning of the name",
    ),
    "init": (with_method("__init__", failing), "Broken.__init__: RuntimeError: the first line"),
    "sizes": (
        with_attribute("part_sizes", 2),
        "Broken.part_sizes: got 2; allowed: a tuple of the numbers of tokens",
    ),
    "token": (
        with_attribute("token", [512]),
        "Broken.token: got [512]; allowed: a tuple, the shape of a token",
    ),
    "parts": (
        with_method("parts", lambda self, x: x[:, 0]),
        "Broken.parts: got (2, 1, 32, 32); allowed: (2, 2, 512), that is [B, N, *token]",
    ),
    "condition": (with_method("condition", failing), "Broken.condition: RuntimeError: the first line"),
    "predict": (
        with_method("predict", lambda self, x_t, t, memory: x_t[:, :1]),
        "Broken.predict: got (6, 1, 512); allowed: (6, 2, 512), that is [M B, N, *token]",
    ),
    "memory": (
        with_method("predict", lambda self, x_t, t, memory: x_t + memory[:, None, None]),
        "Broken.predict: RuntimeError: ",
    ),
    "nothing": (
        with_method("predict", lambda self, x_t, t, memory: None),
        "Broken.predict: got 'NoneType'; allowed: (6, 2, 512)",
    ),
    "variances": (
        type("Broken", (Plain,), {"process": "cosine_diffusion", "prediction": "noise_and_variance"}),
        "Broken.predict: got (6, 2, 512); allowed: (6, 4, 512) or (6, 2, 1024), that is [M B, N, *token],",
    ),
    "weights": (
        with_method("weights", lambda self, memory: torch.ones(3)),
        "Broken.weights: got (3,); allowed: one of [(2,), (2, 2), (6, 2)] with B = 2, M = 3, K = 2",
    ),
    "decode": (with_method("decode", failing), "Broken.decode: RuntimeError: the first line"),
    "no generator": (
        with_method("decode", lambda self, *more: torch.zeros(2)),
        "Broken.decode: got 'Tensor'; allowed: a generator",
    ),
    "no problem": (
        with_method("decode", yields(3)),
        "what Broken.decode yields: got 'int'; allowed: a Problem",
    ),
    "images": (
        with_method("decode", yields(SAME, (2, 1, 32, 32))),
        "Broken.decode: got (2, 1, 32, 32); allowed: (2, 1, 1, 32, 32), that is [B, R, C, H, W]",
    ),
    "velocity": (
        with_method("decode", yields(replace(SAME, predict=lambda x_t, t: x_t[0]))),
        "Broken.decode, Problem.predict: got (512,); allowed: (2, 512), that is [B, *shape]",
    ),
    "pair": (
        with_method("decode", yields(replace(SAME, pair=lambda x_t, t: (x_t, x_t[0])))),
        "Broken.decode, Problem.pair: got (512,); allowed: (2, 512)",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_fault_is_one_line_before_anything_starts(tmp_path: Path, fault: str):
    network, message = BROKEN[fault]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        check_run(run_of(tmp_path, network))
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_settings_without_a_field_of_all_families_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"PARADIGMS\['plain'\]\.settings: got 'SimpleNamespace'"):
        check_family_class(SimpleNamespace(paradigm="plain"))  # type: ignore[arg-type]
    lacking = dataclass(frozen=True)(type("Lacking", (ModelSettings,), {"paradigm": "plain"}))
    with pytest.raises(
        ValueError, match="Lacking: fields: got 'no num_classes, latent_channels, latent_size'"
    ):
        check_family_class(lacking())


def test_a_family_that_draws_by_values_is_taken(tmp_path: Path):
    """A family is not judged by a method whose result depends on values."""

    def parts(self: Any, x: Tensor) -> Tensor:
        return Plain.parts(self, x) * x.sum().item()

    check_run(run_of(tmp_path, with_method("parts", parts)))
    assert "plain" in PARADIGMS


def test_a_family_that_takes_one_time_for_all_rows_is_refused_with_an_adaptive_solver(tmp_path: Path):
    def decode(self: Any, labels: Tensor, *more: Any) -> Any:
        def predict(x_t: Tensor, t: float) -> Tensor:
            return x_t + torch.full((len(x_t), 1), t)

        yield Problem((512,), predict, lambda x_t, t: (predict(x_t, t),) * 2)
        yield SAME
        return torch.zeros(2, 1, 1, 32, 32)

    run = run_of(tmp_path, with_method("decode", decode))
    check_run(run)
    adaptive = replace(run, sampling=replace(run.sampling, solver="dopri5"))
    with pytest.raises(
        ValueError, match=r"Problem\.predict at a time of each row \[B\], by dopri5: TypeError"
    ):
        check_run(adaptive)
