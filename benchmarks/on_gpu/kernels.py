"""The card's ceilings, and each kernel of ``lit_transdiff.kernels`` beside the time to move its bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_gpu.bench import Bench, graph_of, median_ms
from lit_transdiff.base.hardware import measure_flops


def copy_rate(device: torch.device, tiny: bool) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.randn(2**18 if tiny else 2**28, device=device)
    target = torch.empty_like(source)
    return 8e3 * source.numel() / median_ms(lambda: target.copy_(source), device, 10)


def ceilings(bench: Bench) -> None:
    """The highest rates that the card reaches."""
    rate = measure_flops(bench.device, torch.bfloat16)
    bench.say(
        f"\ncopy {copy_rate(bench.device, bench.tiny) / 1e12:.2f} TB/s, products {rate / 1e12:.0f} TFLOP/s"
    )


def kernels(bench: Bench) -> None:
    """Each kernel at the shapes of 32 rows of base, with dropout 0.1, and the time to move its bytes."""
    from lit_transdiff.kernels.gelu import gelu_dropout
    from lit_transdiff.kernels.norm import LayerOutput, Norm, add_norm

    rows, tokens, width = (4, 8, 32) if bench.tiny else (128, 256, 768)
    rate, device = copy_rate(bench.device, bench.tiny), bench.device
    seed = torch.randint(2**62, (1,), device=device)
    x, y, h = (numbers(device, rows, tokens, n * width) for n in (1, 1, 4))
    vectors = [numbers(device, width, dtype=torch.float32) for _ in range(3)]
    modulation = [numbers(device, rows, width, dtype=torch.float32) for _ in range(3)]
    bias = numbers(device, 4 * width, dtype=torch.float32)
    branch, norm = LayerOutput(y, vectors[0], modulation[0], 0.1, seed), Norm(*vectors[1:], *modulation[1:])
    inputs = [x, y, h, bias, *vectors, *modulation]
    # bytes of the forward and the backward pass, in units of x
    cases: dict[str, tuple[Callable[[], Tensor], int, int]] = {
        "GELU with dropout": (lambda: gelu_dropout(h, bias, seed, 0.1), 8, 12),
        "residual stream and norm": (lambda: add_norm(x, branch, norm)[1], 4, 6),
    }
    bench.table("kernel", "forward, ms", "floor, ms", "backward, ms", "floor, ms")

    def measure(name: str, work: Callable[[], Tensor], *units: int) -> None:
        floors = [number * x.numel() * 2e3 / rate for number in units]
        cells = zip(passes(work, inputs, device), floors, strict=True)
        bench.row(name, *(f"{ms:.3f}" for pair in cells for ms in pair))

    for name, case in cases.items():
        bench.attempt(name, partial(measure, name, *case))


def numbers(device: torch.device, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """Random ones, for gradients; by default in the half precision in which Triton multiplies here."""
    half = torch.bfloat16 if device.type == "cuda" else torch.float16  # the interpreter has no bfloat16
    return torch.randn(*shape, device=device, dtype=dtype or half).requires_grad_()


def passes(forward: Callable[[], Tensor], inputs: list[Tensor], device: torch.device) -> tuple[float, float]:
    """The times of the forward and of the backward pass, in ms."""
    with torch.no_grad():
        gradient = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), inputs, gradient, allow_unused=True)

    one, two = (median_ms(graph_of(work, device), device, 20) for work in (forward, both))
    return one, two - one


BACKENDS = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "FlashAttention": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "torch's choice": None,
}


def attention(bench: Bench) -> None:
    """Attention with heads of 64, by the kernel of this package (with its projection) and by torch's."""
    from lit_transdiff.kernels.attention import self_attention

    device = bench.device
    bench.table("attention", "tokens", "dropout", "forward, ms", "backward, ms")
    for tokens in (8,) if bench.tiny else (256, 320, 1024):
        rows, heads, d = (2, 2, 16) if bench.tiny else (32768 // tokens, 12, 64)
        width = heads * d
        x, weight, bias = (
            numbers(device, *shape) for shape in ((rows, tokens, width), (3 * width, width), (3 * width,))
        )
        seed = torch.zeros(1, dtype=torch.int64, device=device)
        projected, rest = [x, weight, bias], [numbers(device, rows, heads, tokens, d) for _ in range(3)]

        def fused(backend: SDPBackend | None, dropout: float, qkv: list[Tensor] = rest) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(*qkv, dropout_p=dropout)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*qkv, dropout_p=dropout)

        def measure(
            name: str, dropout: float, work: Callable[[], Tensor], inputs: list[Tensor], n: int = tokens
        ) -> None:
            bench.row(name, n, dropout, *(f"{ms:.3f}" for ms in passes(work, inputs, device)))

        for dropout in (0.1, 0.0):
            ours = partial(self_attention, x, weight, bias, heads, seed, dropout)
            product = partial(F.linear, x, weight, bias)
            cases = {
                "with the projection, in Triton": (ours, projected),
                "the projection": (product, projected),
            }
            kinds = list(BACKENDS.items())[-1:] if bench.tiny else BACKENDS.items()
            cases |= {name: (partial(fused, backend, dropout), rest) for name, backend in kinds}
            for name, (work, inputs) in cases.items():
                bench.attempt(f"{name}, {tokens}", partial(measure, name, dropout, work, inputs))
