"""The kernels of the residual stream: forward, backward, and the sums of the gradients of vectors.

A program computes tiles of tokens of one row, one after the other, with the row's modulation in registers.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lit_transdiff.kernels.dropout import column_keys, kept, row_keys


@triton.jit
def row_vector(pointer, row, step, column, inside):
    """A row [1, W] of a matrix in float32."""
    return tl.load(pointer + row * step + column, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def add_norm_forward(
    x_ptr, y_ptr, bias_ptr, gate_ptr, weight_ptr, norm_bias_ptr, shift_ptr, scale_ptr, seed_ptr, out_ptr,
    z_ptr,
    moments_ptr, tokens, width, all_tokens, eps, gate_step, shift_step, scale_step,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr,
    NORM: tl.constexpr,
    MODULATION: tl.constexpr, W: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.arange(0, W)
    valid = column < width
    bias = row_vector(bias_ptr, 0, 0, column, valid) if BRANCH else 0.0
    gate = row_vector(gate_ptr, row, gate_step, column, valid) if GATE else 1.0
    if NORM:
        weight = row_vector(weight_ptr, 0, 0, column, valid)
        norm_bias = row_vector(norm_bias_ptr, 0, 0, column, valid)
        if MODULATION:  # (n w + b) (1 + s) + h = n (w (1 + s)) + (b (1 + s) + h)
            grown = 1 + row_vector(scale_ptr, row, scale_step, column, valid)
            weight = weight * grown
            norm_bias = norm_bias * grown + row_vector(shift_ptr, row, shift_step, column, valid)
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    for tile in tl.range(0, TILES, num_stages=STAGES):
        token = (tl.program_id(0) * TILES + tile) * T + tl.arange(0, T)
        place = row * tokens + token
        inside = (token < tokens)[:, None] & valid[None, :]
        at = place[:, None].to(tl.int64) * width + column[None, :]
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH:
            y = tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias
            y = dropped(y, seed, place, column, THRESHOLD, SCALE)
            if GATE:
                y *= gate
            rounded = (x + y).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at, rounded, mask=inside)
            x = rounded.to(tl.float32)
        if NORM:
            mean = tl.sum(x, axis=1) / width  # x is zero outside
            centred = tl.where(inside, x - mean[:, None], 0.0)
            scale = tl.math.rsqrt(tl.sum(centred * centred, axis=1) / width + eps)
            tl.store(moments_ptr + place, mean, mask=token < tokens)
            tl.store(moments_ptr + all_tokens + place, scale, mask=token < tokens)
            z = centred * scale[:, None] * weight + norm_bias
            tl.store(z_ptr + at, z.to(z_ptr.dtype.element_ty), mask=inside)


@triton.jit
def normalised(out_ptr, moments_ptr, at, place, inside, tokens_inside, all_tokens):
    """A tile of the stream with mean 0 and variance 1, and the factor that made it so, [T, 1]."""
    mean = tl.load(moments_ptr + place, mask=tokens_inside, other=0.0)[:, None]
    factor = tl.load(moments_ptr + all_tokens + place, mask=tokens_inside, other=0.0)[:, None]
    x = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, (x - mean) * factor, 0.0), factor


@triton.jit
def through_norm(m, normal, factor, width):
    """The gradient of the stream, given that of its normalised form."""
    first = tl.sum(m, axis=1)[:, None] / width
    second = tl.sum(m * normal, axis=1)[:, None] / width
    return factor * (m - first - normal * second)


@triton.jit
def dropped(value, seed, place, column, THRESHOLD: tl.constexpr, SCALE: tl.constexpr):
    """Dropout of a tile of tokens at ``place``."""
    if THRESHOLD > 0:
        keep = kept(row_keys(seed, place)[:, None], column_keys(column)[None, :], THRESHOLD)
        value = tl.where(keep, value * SCALE, 0.0)
    return value


@triton.jit
def add_norm_backward(
    of_out_ptr, of_z_ptr, out_ptr, y_ptr, bias_ptr, gate_ptr, weight_ptr, scale_ptr, seed_ptr, moments_ptr,
    of_x_ptr, of_y_ptr, sums_ptr, tokens, width, all_tokens, gate_step, scale_step,
    THRESHOLD: tl.constexpr, SCALE: tl.constexpr, BRANCH: tl.constexpr, GATE: tl.constexpr,
    NORM: tl.constexpr, MODULATION: tl.constexpr, PASSED: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
    TILES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    row, column = tl.program_id(1), tl.arange(0, W)
    valid = column < width
    bias = row_vector(bias_ptr, 0, 0, column, valid) if GATE else 0.0
    gate = row_vector(gate_ptr, row, gate_step, column, valid) if GATE else 1.0
    weight = row_vector(weight_ptr, 0, 0, column, valid) if NORM else 1.0
    if MODULATION and NORM:
        weight = weight * (1 + row_vector(scale_ptr, row, scale_step, column, valid))
    seed = tl.load(seed_ptr) if THRESHOLD > 0 else 0
    zero = tl.zeros([T, W], dtype=tl.float32)
    of_m, of_m_normal, of_gate, of_branch = zero, zero, zero, zero
    for tile in tl.range(0, TILES, num_stages=STAGES):
        token = (tl.program_id(0) * TILES + tile) * T + tl.arange(0, T)
        place = row * tokens + token
        inside = (token < tokens)[:, None] & valid[None, :]
        at = place[:, None].to(tl.int64) * width + column[None, :]
        g = tl.load(of_out_ptr + at, mask=inside, other=0.0).to(tl.float32) if PASSED else zero
        if NORM:
            normal, factor = normalised(out_ptr, moments_ptr, at, place, inside, token < tokens, all_tokens)
            m = tl.load(of_z_ptr + at, mask=inside, other=0.0).to(tl.float32)
            of_m += m
            of_m_normal += m * normal
            g += through_norm(m * weight, normal, factor, width)
            tl.store(of_x_ptr + at, g.to(of_x_ptr.dtype.element_ty), mask=inside)
        if BRANCH:
            g = tl.where(inside, dropped(g, seed, place, column, THRESHOLD, SCALE), 0.0)
            if GATE:
                of_gate += g * (tl.load(y_ptr + at, mask=inside, other=0.0).to(tl.float32) + bias)
                g *= gate
            of_branch += g
            tl.store(of_y_ptr + at, g.to(of_y_ptr.dtype.element_ty), mask=inside)
    sums = sums_ptr + (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * 4 * width + column
    if NORM:
        tl.store(sums, tl.sum(of_m, axis=0), mask=valid)
        tl.store(sums + width, tl.sum(of_m_normal, axis=0), mask=valid)
    if BRANCH:
        tl.store(sums + 2 * width, tl.sum(of_gate, axis=0), mask=valid)
        tl.store(sums + 3 * width, tl.sum(of_branch, axis=0), mask=valid)


@triton.jit
def sums_of_rows(
    sums_ptr, weight_ptr, norm_bias_ptr, scale_ptr, of_rows_ptr, programs, rows, width, scale_step,
    BRANCH: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, MODULATION: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """The gradients of a row: of shift, scale and gate, and its share of those of the three vectors.

    The vectors are the norm's bias and weight, and the branch's bias.
    """
    row = tl.program_id(0)
    column = tl.program_id(1) * C + tl.arange(0, C)
    valid = column < width
    of_m = tl.zeros([C], dtype=tl.float32)
    of_m_normal = tl.zeros([C], dtype=tl.float32)
    of_gate = tl.zeros([C], dtype=tl.float32)
    of_branch = tl.zeros([C], dtype=tl.float32)
    for program in range(programs):
        at = sums_ptr + (row * programs + program).to(tl.int64) * 4 * width + column
        if NORM:
            of_m += tl.load(at, mask=valid, other=0.0)
            of_m_normal += tl.load(at + width, mask=valid, other=0.0)
        if GATE:
            of_gate += tl.load(at + 2 * width, mask=valid, other=0.0)
        if BRANCH:
            of_branch += tl.load(at + 3 * width, mask=valid, other=0.0)
    at, step = of_rows_ptr + row * width + column, rows * width
    if NORM:
        if MODULATION:
            weight = tl.load(weight_ptr + column, mask=valid, other=0.0).to(tl.float32)
            norm_bias = tl.load(norm_bias_ptr + column, mask=valid, other=0.0).to(tl.float32)
            tl.store(at, of_m, mask=valid)
            tl.store(at + step, of_m * norm_bias + of_m_normal * weight, mask=valid)
            grown = 1 + tl.load(scale_ptr + row * scale_step + column, mask=valid, other=0.0).to(tl.float32)
            of_m *= grown
            of_m_normal *= grown
        tl.store(at + 3 * step, of_m, mask=valid)
        tl.store(at + 4 * step, of_m_normal, mask=valid)
    if GATE:
        tl.store(at + 2 * step, of_gate, mask=valid)
    if BRANCH:
        tl.store(at + 5 * step, of_branch, mask=valid)
