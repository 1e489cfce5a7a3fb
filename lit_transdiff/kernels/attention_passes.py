"""The kernels of attention: its forward pass, the gradient of the queries, and that of keys and values.

A program computes a tile of queries (or keys) of one row and head, and goes through the tiles of keys (or
queries) with the scores in registers, as FlashAttention does (arXiv 2307.08691). Scores are multiplied by
log2(e) with their factor, because the processor has an instruction for powers of 2. ``zero`` is an argument:
if the compiler knew it, it would drop shares after their rounding, with three instructions in place of one.
"""

# Triton's functions have no types.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from lit_transdiff.kernels.dropout import PAIR, column_keys, kept_in_pairs, row_keys

TILE_SIZE = 64  # queries and keys of a tile
TILE, SECOND_KEY = tl.constexpr(TILE_SIZE), tl.constexpr(PAIR)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def tile_of(pointer, row, row_step, token, token_step, head, tokens, D: tl.constexpr, WHOLE: tl.constexpr):
    """A tile [tokens, D] of one row and head; zero beyond the last token, unless all tiles are ``WHOLE``."""
    at = row.to(tl.int64) * row_step + token[:, None] * token_step + head * D + tl.arange(0, D)[None, :]
    if WHOLE:
        tile = tl.load(pointer + at)
    else:
        tile = tl.load(pointer + at, mask=token[:, None] < tokens, other=0.0)
    return tile


@triton.jit
def put_tile(pointer, value, row, row_step, token, token_step, head, tokens, D: tl.constexpr):
    """Write a tile [tokens, D] of one row and head."""
    at = row.to(tl.int64) * row_step + token[:, None] * token_step + head * D + tl.arange(0, D)[None, :]
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=token[:, None] < tokens)


@triton.jit
def put_sum(pointer, value, row, head, D: tl.constexpr):
    """Write the sum over the tokens of a tile to its place in [rows x tiles, heads x D]."""
    at = (row * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * tl.num_programs(1) * D + head * D
    tl.store(pointer + at + tl.arange(0, D), tl.sum(value, axis=0))


@triton.jit
def seen_keys(visible_ptr, row, row_step, query, query_step, queries, keys, MASKED: tl.constexpr):
    """The number of keys that each query sees, int32."""
    if MASKED:
        seen = tl.load(visible_ptr + row * row_step + query * query_step, mask=query < queries, other=0)
    else:
        seen = tl.where(query < queries, keys, 0)
    return seen


@triton.jit
def kept_keys(rows, start, axis: tl.constexpr, THRESHOLD: tl.constexpr):
    """The mask of the shares that are kept in a tile of keys from ``start``, by the keys of rows of queries.

    A thread has both keys of a pair, on either axis of a product.
    """
    key = tl.arange(0, TILE)
    firsts, is_second = column_keys(start + (key & ~SECOND_KEY)), (key & SECOND_KEY) != 0
    if axis == 1:
        keep = kept_in_pairs(rows, firsts[None, :], is_second[None, :], THRESHOLD)
    else:
        keep = kept_in_pairs(rows, firsts[:, None], is_second[:, None], THRESHOLD)
    return keep


@triton.jit
def attention_forward(
    q_ptr, k_ptr, v_ptr, out_ptr, sums_ptr, seed_ptr, visible_ptr, zero, key_rows, queries, keys,
    q_row, q_token, k_row, k_token, v_row, v_token, seen_row, seen_query,
    D: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    key_row, width = row % key_rows, tl.num_programs(1) * D
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q = tile_of(q_ptr, row, q_row, query, q_token, head, queries, D, WHOLE)
    seen = seen_keys(visible_ptr, row, seen_row, query, seen_query, queries, keys, MASKED)
    place = (row * tl.num_programs(1) + head) * queries + query
    if THRESHOLD > 0:
        row_key = row_keys(tl.load(seed_ptr), place)
    highest = tl.full([TILE], -1e30, dtype=tl.float32)
    total = tl.zeros([TILE], dtype=tl.float32)
    out = tl.zeros([TILE, D], dtype=tl.float32)
    end = keys
    if MASKED:
        end = tl.max(seen)
    for start in range(0, end, TILE):
        key = start + tl.arange(0, TILE)
        k = tile_of(k_ptr, key_row, k_row, key, k_token, head, keys, D, WHOLE)
        v = tile_of(v_ptr, key_row, v_row, key, v_token, head, keys, D, WHOLE)
        scores = tl.dot(q, tl.trans(k))
        if not WHOLE:
            scores = tl.where(key[None, :] < seen[:, None], scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, axis=1) * (FACTOR * LOG2_E))
        shares = tl.math.exp2(scores * (FACTOR * LOG2_E) - higher[:, None])
        shrunk = tl.math.exp2(highest - higher)
        total = total * shrunk + tl.sum(shares, axis=1)
        if THRESHOLD > 0:
            shares = tl.where(kept_keys(row_key[:, None], start, 1, THRESHOLD), shares, zero)
        out = tl.dot(shares.to(v.dtype), v, out * shrunk[:, None])
        highest = higher
    put_tile(out_ptr, out * (SCALE / total)[:, None], row, queries * width, query, width, head, queries, D)
    tl.store(sums_ptr + place, highest + tl.math.log2(total), mask=query < queries)


@triton.jit
def attention_of_queries(
    q_ptr, k_ptr, v_ptr, out_ptr, gradient_ptr, sums_ptr, inner_ptr, row_keys_ptr, of_q_ptr, of_bias_ptr,
    seed_ptr, visible_ptr,
    key_rows, queries, keys, q_row, q_token, k_row, k_token, v_row, v_token, of_row, of_token, seen_row,
    seen_query,
    D: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    head, row = tl.program_id(1), tl.program_id(2)
    key_row, width = row % key_rows, tl.num_programs(1) * D
    query = tl.program_id(0) * TILE + tl.arange(0, TILE)
    q = tile_of(q_ptr, row, q_row, query, q_token, head, queries, D, WHOLE)
    gradient = tile_of(gradient_ptr, row, queries * width, query, width, head, queries, D, WHOLE)
    out = tile_of(out_ptr, row, queries * width, query, width, head, queries, D, WHOLE)
    seen = seen_keys(visible_ptr, row, seen_row, query, seen_query, queries, keys, MASKED)
    place = (row * tl.num_programs(1) + head) * queries + query
    sums = tl.load(sums_ptr + place, mask=query < queries, other=0.0)
    inner = tl.sum(gradient.to(tl.float32) * out.to(tl.float32), axis=1) / SCALE
    tl.store(inner_ptr + place, inner, mask=query < queries)
    if THRESHOLD > 0:
        row_key = row_keys(tl.load(seed_ptr), place)
        tl.store(row_keys_ptr + place, row_key.to(tl.int32), mask=query < queries)
    of_q = tl.zeros([TILE, D], dtype=tl.float32)
    end = keys
    if MASKED:
        end = tl.max(seen)
    for start in range(0, end, TILE):
        key = start + tl.arange(0, TILE)
        k = tile_of(k_ptr, key_row, k_row, key, k_token, head, keys, D, WHOLE)
        v = tile_of(v_ptr, key_row, v_row, key, v_token, head, keys, D, WHOLE)
        shares = tl.math.exp2(tl.dot(q, tl.trans(k)) * (FACTOR * LOG2_E) - sums[:, None])
        if not WHOLE:
            shares = tl.where(key[None, :] < seen[:, None], shares, 0.0)
        of_shares = tl.dot(gradient, tl.trans(v))
        if THRESHOLD > 0:
            of_shares = tl.where(kept_keys(row_key[:, None], start, 1, THRESHOLD), of_shares, 0.0)
        of_q = tl.dot((shares * (of_shares - inner[:, None])).to(k.dtype), k, of_q)
    of_q *= FACTOR * SCALE
    put_tile(of_q_ptr, of_q, row, of_row, query, of_token, head, queries, D)
    put_sum(of_bias_ptr, of_q, row, head, D)


@triton.jit
def attention_of_keys(
    q_ptr, k_ptr, v_ptr, gradient_ptr, sums_ptr, inner_ptr, row_keys_ptr, of_k_ptr, of_v_ptr, of_k_bias_ptr,
    of_v_bias_ptr, visible_ptr, zero,
    views, key_rows, queries, keys, q_row, q_token, k_row, k_token, v_row, v_token,
    of_k_row, of_k_token, of_v_row, of_v_token, seen_row, seen_query,
    D: tl.constexpr, FACTOR: tl.constexpr, THRESHOLD: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    first, head, key_row = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    width = tl.num_programs(1) * D
    key = first + tl.arange(0, TILE)
    k = tile_of(k_ptr, key_row, k_row, key, k_token, head, keys, D, WHOLE)
    v = tile_of(v_ptr, key_row, v_row, key, v_token, head, keys, D, WHOLE)
    of_k, of_v = tl.zeros([TILE, D], dtype=tl.float32), tl.zeros([TILE, D], dtype=tl.float32)
    tiles = tl.cdiv(queries, TILE)
    for tile in range(views * tiles):  # the tiles of all views in turn; scores are [keys, queries]
        row = key_row + (tile // tiles) * key_rows
        query = (tile % tiles) * TILE + tl.arange(0, TILE)
        seen = seen_keys(visible_ptr, row, seen_row, query, seen_query, queries, keys, MASKED)
        used = tl.max(seen) > first if MASKED else True
        if used:
            q = tile_of(q_ptr, row, q_row, query, q_token, head, queries, D, WHOLE)
            gradient = tile_of(gradient_ptr, row, queries * width, query, width, head, queries, D, WHOLE)
            place = (row * tl.num_programs(1) + head) * queries + query
            sums = tl.load(sums_ptr + place, mask=query < queries, other=0.0)
            inner = tl.load(inner_ptr + place, mask=query < queries, other=0.0)
            shares = tl.math.exp2(tl.dot(k, tl.trans(q)) * (FACTOR * LOG2_E) - sums[None, :])
            if not WHOLE:
                shares = tl.where(key[:, None] < seen[None, :], shares, 0.0)
            of_shares = tl.dot(v, tl.trans(gradient))
            remaining = shares
            if THRESHOLD > 0:
                row_key = tl.load(row_keys_ptr + place, mask=query < queries, other=0).to(tl.uint32)
                keep = kept_keys(row_key[None, :], first, 0, THRESHOLD)
                remaining = tl.where(keep, shares, zero)
                of_shares = tl.where(keep, of_shares, 0.0)
            of_v = tl.dot(remaining.to(q.dtype), gradient, of_v)
            of_k = tl.dot((shares * (of_shares - inner[None, :])).to(q.dtype), q, of_k)
    of_k *= FACTOR * SCALE
    of_v *= SCALE
    put_tile(of_k_ptr, of_k, key_row, of_k_row, key, of_k_token, head, keys, D)
    put_tile(of_v_ptr, of_v, key_row, of_v_row, key, of_v_token, head, keys, D)
    put_sum(of_k_bias_ptr, of_k, key_row, head, D)
    put_sum(of_v_bias_ptr, of_v, key_row, head, D)
