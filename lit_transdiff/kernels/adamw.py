"""AdamW with averages of the weights in one pass over memory, and the norm of all gradients in another.

A launch serves all tensors of a group: a table has their addresses, and a program updates one chunk of one of
them. The norm stays on the device, where the update reads it, so that the host never waits.

Shapes: T tensors, C chunks, K averages.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import triton
import triton.language as tl
from torch import Tensor

ADAMW_CHUNK, ADAMW_BLOCK = 8192, 1024  # elements of a program, and those that it holds at a time


@dataclass(frozen=True)
class Updated:
    """A parameter and its states, which a step reads and writes: float32, of one shape but ``step`` []."""

    step: Tensor  # the number of the present step; the first is 1
    weight: Tensor
    gradient: Tensor
    mean: Tensor  # the decayed mean of the gradients
    square: Tensor  # the decayed mean of their squares
    averages: tuple[Tensor, ...]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (self.step, self.weight, self.gradient, self.mean, self.square, *self.averages)


@dataclass(frozen=True)
class AdamW:
    """The settings of a step for a group; ``shrink`` is 1 - lr decay."""

    lr: float
    shrink: float
    betas: tuple[float, float]
    eps: float


class Tables:
    """Groups of tensors on the device, as long as their addresses are the same.

    A row of ``table`` has the number of a tensor's elements and the addresses in the order of
    ``Updated.tensors``; ``chunks`` [C, 2] have a row of it, and the number of a chunk within the tensor.
    """

    def __init__(self, groups: Sequence[Sequence[Updated]]) -> None:
        parts = [part for group in groups for part in group]
        self.device, self.num_averages = parts[0].weight.device, len(parts[0].averages)
        rows = [[part.weight.numel(), *(tensor.data_ptr() for tensor in part.tensors)] for part in parts]
        aligned = all(place % 16 == 0 for _, _, *places in rows for place in places)
        self.sizes = dict(ALIGNED=aligned, CHUNK=ADAMW_CHUNK, BLOCK=ADAMW_BLOCK)
        self.table = on_device(torch.tensor(rows), self.device)
        counts = [[-(-part.weight.numel() // ADAMW_CHUNK) for part in group] for group in groups]
        each = torch.tensor(list(chain(*counts)))
        tensor = torch.arange(len(each)).repeat_interleave(each)
        number = torch.arange(len(tensor)) - (each.cumsum(0) - each)[tensor]
        self.chunks = on_device(torch.stack([tensor, number], 1).int(), self.device)
        self.of_groups = self.chunks.split([sum(group) for group in counts])


def on_device(numbers: Tensor, device: torch.device) -> Tensor:
    """Copy ``numbers`` to a device without waiting for it."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def gradient_norm(tables: Tables) -> Tensor:
    """The norm [] of all gradients together."""
    squares = torch.empty(len(tables.chunks), device=tables.device)
    gradient_squares[(len(tables.chunks),)](
        tables.table, tables.chunks, squares, tables.table.shape[1], **tables.sizes
    )  # fmt: skip
    return squares.sum().sqrt()


def adamw_step(
    tables: Tables, groups: Sequence[AdamW], shares: Sequence[float], max_norm: float | None = None
) -> None:
    """A step of all groups; averages then move to the weights by ``shares``.

    With ``max_norm`` the step uses gradients that are scaled to at most this norm; those in memory stay.
    """
    norm = None if max_norm is None else gradient_norm(tables)
    of_averages = on_device(torch.tensor(shares), tables.device)
    for chunks, group in zip(tables.of_groups, groups, strict=True):
        if len(chunks) == 0:
            continue
        (beta1, beta2), columns = group.betas, tables.table.shape[1]
        adamw_update[(len(chunks),)](
            tables.table, chunks, of_averages, norm, max_norm, group.lr, group.shrink, columns,
            BETA1=beta1, BETA2=beta2, LOG1=log2(beta1), LOG2=log2(beta2), EPS=group.eps,
            AVERAGES=tables.num_averages, CLIP=max_norm is not None, **tables.sizes,
        )  # fmt: skip


def log2(beta: float) -> float:
    """The binary logarithm of a decay, whose power after n steps is 2 ^ (n log2)."""
    return math.log2(beta) if beta > 0 else -1e4


@triton.jit
def address(table_ptr, row, columns, column: tl.constexpr, ALIGNED: tl.constexpr):
    """The address in a column of the table, of float32 numbers."""
    place = tl.load(table_ptr + row * columns + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    return place


@triton.jit
def program_chunk(table_ptr, chunks_ptr, columns, CHUNK: tl.constexpr):
    """The table row with the tensor of this program's chunk, the chunk's start, and the tensor's size."""
    row = tl.load(chunks_ptr + 2 * tl.program_id(0))
    start = tl.load(chunks_ptr + 2 * tl.program_id(0) + 1).to(tl.int64) * CHUNK
    return row, start, tl.load(table_ptr + row * columns)


@triton.jit
def take_part(pointer, at, size, MASKED: tl.constexpr):
    """Elements of a tensor; with ``MASKED``, zero beyond its end."""
    if MASKED:
        part = tl.load(pointer + at, mask=at < size, other=0.0)
    else:
        part = tl.load(pointer + at)
    return part


@triton.jit
def put_part(pointer, at, value, size, MASKED: tl.constexpr):
    """Write elements of a tensor."""
    if MASKED:
        tl.store(pointer + at, value, mask=at < size)
    else:
        tl.store(pointer + at, value)


@triton.jit
def square_sum(gradient_ptr, start, size, MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of squares of a chunk."""
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for block in range(0, CHUNK, BLOCK):
        gradient = take_part(gradient_ptr, start + block + tl.arange(0, BLOCK), size, MASKED)
        total += gradient * gradient
    return tl.sum(total, axis=0)


@triton.jit
def gradient_squares(
    table_ptr, chunks_ptr, squares_ptr, columns,
    ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size = program_chunk(table_ptr, chunks_ptr, columns, CHUNK)
    gradient_ptr = address(table_ptr, row, columns, 3, ALIGNED)
    if start + CHUNK <= size:
        found = square_sum(gradient_ptr, start, size, False, CHUNK, BLOCK)
    else:
        found = square_sum(gradient_ptr, start, size, True, CHUNK, BLOCK)
    tl.store(squares_ptr + tl.program_id(0), found)


@triton.jit
def update_chunk(
    table_ptr, row, columns, shares_ptr, start, size, factor, step_size, root, shrink,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPS: tl.constexpr, AVERAGES: tl.constexpr,
    ALIGNED: tl.constexpr, MASKED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    weight_ptr = address(table_ptr, row, columns, 2, ALIGNED)
    gradient_ptr = address(table_ptr, row, columns, 3, ALIGNED)
    mean_ptr = address(table_ptr, row, columns, 4, ALIGNED)
    square_ptr = address(table_ptr, row, columns, 5, ALIGNED)
    for block in range(0, CHUNK, BLOCK):
        at = start + block + tl.arange(0, BLOCK)
        gradient = take_part(gradient_ptr, at, size, MASKED) * factor
        mean = take_part(mean_ptr, at, size, MASKED)
        mean += (1 - BETA1) * (gradient - mean)
        square = BETA2 * take_part(square_ptr, at, size, MASKED) + (1 - BETA2) * gradient * gradient
        weight = take_part(weight_ptr, at, size, MASKED) * shrink
        weight -= step_size * tl.div_rn(mean, tl.div_rn(tl.sqrt_rn(square), root) + EPS)
        put_part(mean_ptr, at, mean, size, MASKED)
        put_part(square_ptr, at, square, size, MASKED)
        put_part(weight_ptr, at, weight, size, MASKED)
        for i in tl.static_range(AVERAGES):
            average_ptr = address(table_ptr, row, columns, 6 + i, ALIGNED)
            average, share = take_part(average_ptr, at, size, MASKED), tl.load(shares_ptr + i)
            apart = weight - average
            average = tl.where(share < 0.5, average + share * apart, weight - (1 - share) * apart)
            put_part(average_ptr, at, average, size, MASKED)


@triton.jit
def adamw_update(
    table_ptr, chunks_ptr, shares_ptr, norm_ptr, max_norm, lr, shrink, columns,
    BETA1: tl.constexpr, BETA2: tl.constexpr, LOG1: tl.constexpr, LOG2: tl.constexpr, EPS: tl.constexpr,
    AVERAGES: tl.constexpr, CLIP: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, start, size = program_chunk(table_ptr, chunks_ptr, columns, CHUNK)
    factor = 1.0
    if CLIP:
        factor = max_norm / (tl.load(norm_ptr) + 1e-6)
        factor = tl.where(factor > 1, 1.0, factor)  # one that is not a number remains so
    step = tl.load(address(table_ptr, row, columns, 1, False)).to(tl.float64)
    step_size = (lr / (1 - tl.exp2(step * LOG1))).to(tl.float32)
    root = tl.sqrt(1 - tl.exp2(step * LOG2)).to(tl.float32)
    if start + CHUNK <= size:
        update_chunk(
            table_ptr, row, columns, shares_ptr, start, size, factor, step_size, root, shrink,
            BETA1, BETA2, EPS, AVERAGES, ALIGNED, False, CHUNK, BLOCK,
        )  # fmt: skip
    else:
        update_chunk(
            table_ptr, row, columns, shares_ptr, start, size, factor, step_size, root, shrink,
            BETA1, BETA2, EPS, AVERAGES, ALIGNED, True, CHUNK, BLOCK,
        )  # fmt: skip
