"""Backward on GPU: dq by tiles of query rows, dk and dv by tiles of keys; each gradient has one owner, no atomics.

Both recompute the weights from lse.  `backward_q` runs first and leaves delta = rowsum(dout * out) for
`backward_kv`, which works on transposed scores, S^T = K Q^T: transposing the result of a product is miscompiled by
Triton 3.4 to 3.7.0, and costs a round through shared memory in any version.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import LOG2E, Launch, load_rows, near, options, power_of_two
from mirasol_kernels.block_causal_attention.triton import LAYOUT, strides, table
from mirasol_kernels.block_causal_attention.triton_config import Machine, config_of
from mirasol_kernels.block_causal_attention.triton_ranges import (
    edge,
    joined,
    lines_of,
    next_piece,
    nth_range,
    pieces_of,
)


def run_backward(*args: Any, machine: Machine | None = None) -> None:
    """Fills dq, dk and dv, which follow the arguments of op.py's schema; machine: by default that of q."""
    for launch in backward_launches(*args, machine=machine or Machine.of(args[0].device)):
        launch.run()


def backward_launches(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    q_offsets: Tensor,
    k_ranges: Tensor,
    k_offsets: Tensor,
    q_index: Tensor,
    q_ranges: Tensor,
    scale: float,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    machine: Machine,
) -> list[Launch]:
    """The kernels that fill dq, dk and dv, in order."""
    (batch, heads, rows, dim), (_, key_heads, keys, value_dim) = q.shape, v.shape
    widest = max(dim, value_dim)
    delta = torch.empty_like(lse)
    q, k, v, dout = near(q), near(k), near(v), near(dout)
    shared = {
        **{"q": q, "k": k, "v": v, "dout": dout, "lse": lse, "lse_low": lse_low, "delta": delta, "dlse": dlse},
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("do", dout),
        **{"heads": heads, "group": heads // key_heads, "rows": rows, "keys": keys},
        **{"scale": scale, "scale2": scale * LOG2E.value},
        **{"D": dim, "DV": value_dim, "BLOCK_D": power_of_two(dim), "BLOCK_DV": power_of_two(value_dim)},
    }
    done = []
    if dq.numel():
        config = config_of("backward_q", widest, q.dtype, machine)
        tiles = triton.cdiv(rows, config.rows)
        arguments = {
            **{"out": out, "dq": dq, "q_offsets": q_offsets, "k_ranges": k_ranges},
            **strides("o", out),
            **strides("dq", dq),
            **{"programs": batch * heads, "tiles": tiles, "ranges": k_ranges.shape[2]},
            **table("groups", q_offsets, k_ranges),
            **{"TWINS": k.stride(2) == v.stride(2), "ROWS": config.rows, "KEYS": config.keys},
        }
        done.append(Launch(backward_q, (batch * heads * tiles,), shared | arguments, options(config)))
    if dk.numel():
        config = config_of("backward_kv", widest, q.dtype, machine)
        tiles = triton.cdiv(keys, config.keys)
        arguments = {
            **{"dk": dk, "dv": dv, "k_offsets": k_offsets, "q_index": q_index, "q_ranges": q_ranges},
            **strides("dk", dk),
            **strides("dv", dv),
            **{"programs": batch * key_heads, "tiles": tiles},
            **table("segments", k_offsets, q_ranges),
            **{"TWINS": q.stride(2) == dout.stride(2), "ROWS": config.rows, "KEYS": config.keys},
        }
        done.append(Launch(backward_kv, (batch * key_heads * tiles,), shared | arguments, options(config)))
    return done


# Numbers that follow the layout must not compile a kernel of their own.
LAYOUT_BACKWARD = [*LAYOUT[:5], "keys", "offsets_batch", "ranges_batch"]


@triton.jit(do_not_specialize=[*LAYOUT_BACKWARD, "groups", "groups_steps", "ranges"])
def backward_q(
    q,
    k,
    v,
    dout,
    lse,
    lse_low,
    delta,
    dlse,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    do_batch,
    do_head,
    do_row,
    heads,
    group,
    rows,
    keys,
    scale,
    scale2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    out,
    dq,
    q_offsets,
    k_ranges,
    o_batch,
    o_head,
    o_row,
    dq_batch,
    dq_head,
    dq_row,
    programs,
    tiles,
    ranges,
    groups,
    groups_steps,
    offsets_batch,
    ranges_batch,
    TWINS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dq and delta of one tile of rows of one head; walks as `forward` does."""
    if TWINS:  # rows of k and v are equally far apart: offsets within a tile are kept once
        v_row = k_row
    program = tl.program_id(0)
    tile = tiles - 1 - program // programs  # late rows see most: they start first
    head = program % programs
    b, head = (head // heads).to(tl.int64), head % heads
    key_head = (head // group).to(tl.int64)
    index = tl.arange(0, ROWS)
    position = tile * ROWS + index
    row, valid = tl.minimum(position, rows - 1), position < rows
    at_row = row.to(tl.int64)
    q += b * q_batch + head.to(tl.int64) * q_head
    k += b * k_batch + key_head * k_head
    v += b * v_batch + key_head * v_head
    dout += b * do_batch + head.to(tl.int64) * do_head
    out += b * o_batch + head.to(tl.int64) * o_head
    dq += b * dq_batch + head.to(tl.int64) * dq_head
    q_offsets += b * offsets_batch
    k_ranges += b * ranges_batch

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = valid[:, None] & (d[None, :] < D)
    inside_v = valid[:, None] & (dv[None, :] < DV)
    q_tile = tl.load(q + at_row[:, None] * q_row + d[None, :], mask=inside, other=0.0)  # (ROWS, BLOCK_D)
    do_tile = tl.load(dout + at_row[:, None] * do_row + dv[None, :], mask=inside_v, other=0.0)  # (ROWS, BLOCK_DV)
    o_tile = tl.load(out + at_row[:, None] * o_row + dv[None, :], mask=inside_v, other=0.0)
    lse_rows = (b * heads + head) * rows + row
    # The diagonal of a product that sums as dp below: where one key has all the weight, dp - delta is 0 to the bit.
    every = tl.dot(do_tile, tl.trans(o_tile), input_precision="ieee")  # (ROWS, ROWS)
    lane = tl.arange(0, ROWS)
    own_delta = tl.sum(tl.where(lane[:, None] == lane[None, :], every, 0.0), 1)
    own_dlse = tl.load(dlse + lse_rows)
    tl.store(delta + lse_rows, own_delta, mask=valid)
    shift, low = exponent(tl.load(lse + lse_rows), tl.load(lse_low + lse_rows))

    first = lines_of(row, q_offsets, groups, groups_steps) * ranges
    first_before = lines_of(tl.minimum(tl.maximum(position - 1, 0), rows - 1), q_offsets, groups, groups_steps) * ranges
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for r in range(ranges):
        begin, end = nth_range(k_ranges, first, ranges, r)
        before_begin, before_end = nth_range(k_ranges, first_before, ranges, r)
        join = joined(index, begin, end, before_begin, before_end)
        done = 0
        for _ in range(pieces_of(begin, end, join)):
            done, begins, ends, start, stop, t0, t1 = next_piece(index, begin, end, join, done, ROWS, KEYS)
            for i in range(t1 - t0):
                at = start + (t0 + i) * KEYS
                k_tile = load_rows(k, k_row, at, stop, KEYS, D, BLOCK_D, False)
                v_tile = load_rows(v, v_row, at, stop, KEYS, DV, BLOCK_DV, False)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (ROWS, KEYS)
                p = tl.exp2(tl.fma(s, scale2, -shift[:, None]) - low[:, None])
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
                ds = p * (dp - own_delta[:, None] + own_dlse[:, None])
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
            for i in range(tl.cdiv(stop - start, KEYS) - (t1 - t0)):
                at = start + edge(i, t0, t1) * KEYS
                k_tile = load_rows(k, k_row, at, stop, KEYS, D, BLOCK_D, True)
                v_tile = load_rows(v, v_row, at, stop, KEYS, DV, BLOCK_DV, True)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                p = tl.exp2(tl.fma(s, scale2, -shift[:, None]) - low[:, None])
                dp = tl.dot(do_tile, tl.trans(v_tile), input_precision="ieee")
                key = at + tl.arange(0, KEYS)
                sees = (begins[:, None] <= key[None, :]) & (key[None, :] < ends[:, None])
                ds = tl.where(sees, p * (dp - own_delta[:, None] + own_dlse[:, None]), 0.0)
                acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    tl.store(dq + at_row[:, None] * dq_row + d[None, :], (acc * scale).to(dq.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=[*LAYOUT_BACKWARD, "segments", "segments_steps"])
def backward_kv(
    q,
    k,
    v,
    dout,
    lse,
    lse_low,
    delta,
    dlse,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    do_batch,
    do_head,
    do_row,
    heads,
    group,
    rows,
    keys,
    scale,
    scale2,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    dk,
    dv,
    k_offsets,
    q_index,
    q_ranges,
    dk_batch,
    dk_head,
    dk_row,
    dv_batch,
    dv_head,
    dv_row,
    programs,
    tiles,
    segments,
    segments_steps,
    offsets_batch,
    ranges_batch,
    TWINS: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """dk and dv of one tile of keys of one key head; walks the rows that see them, of each of its query heads."""
    if TWINS:  # rows of q and dout are equally far apart: offsets within a tile are kept once
        do_row = q_row
    program = tl.program_id(0)
    tile = program // programs  # early keys are seen by most: they start first
    key_head = program % programs
    key_heads = heads // group
    b, key_head = (key_head // key_heads).to(tl.int64), key_head % key_heads
    index = tl.arange(0, KEYS)
    position = tile * KEYS + index
    key, valid = tl.minimum(position, keys - 1), position < keys
    at_key = key.to(tl.int64)
    first_head = (key_head * group).to(tl.int64)
    key_head = key_head.to(tl.int64)
    q += b * q_batch + first_head * q_head
    k += b * k_batch + key_head * k_head
    v += b * v_batch + key_head * v_head
    dout += b * do_batch + first_head * do_head
    dk += b * dk_batch + key_head * dk_head
    dv += b * dv_batch + key_head * dv_head
    lse_head = (b * heads + first_head) * rows
    k_offsets += b * offsets_batch
    q_index += b * offsets_batch
    q_ranges += b * ranges_batch

    d, d_v = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    inside = valid[:, None] & (d[None, :] < D)
    inside_v = valid[:, None] & (d_v[None, :] < DV)
    k_tile = tl.load(k + at_key[:, None] * k_row + d[None, :], mask=inside, other=0.0)  # (KEYS, BLOCK_D)
    v_tile = tl.load(v + at_key[:, None] * v_row + d_v[None, :], mask=inside_v, other=0.0)  # (KEYS, BLOCK_DV)

    segment = lines_of(key, k_offsets, segments, segments_steps)
    segment_before = lines_of(tl.minimum(tl.maximum(position - 1, 0), keys - 1), k_offsets, segments, segments_steps)
    first, first_before = tl.load(q_index + segment), tl.load(q_index + segment_before)
    count = tl.load(q_index + segment + 1) - first
    count_before = tl.load(q_index + segment_before + 1) - first_before
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_DV], tl.float32)
    for r in range(tl.max(count, 0)):
        begin, end = nth_range(q_ranges, first, count, r)
        before_begin, before_end = nth_range(q_ranges, first_before, count_before, r)
        join = joined(index, begin, end, before_begin, before_end)
        done = 0
        for _ in range(pieces_of(begin, end, join)):
            done, begins, ends, start, stop, t0, t1 = next_piece(index, begin, end, join, done, KEYS, ROWS)
            # All query heads in one loop, so that short ranges fill the pipeline, which also computes the addresses of
            # an empty one: hence no division by 0.
            whole = tl.maximum(t1 - t0, 1)
            for t in range(group * (t1 - t0)):
                h = (t // whole).to(tl.int64)
                at = start + (t0 + t % whole) * ROWS
                q_tile = load_rows(q + h * q_head, q_row, at, stop, ROWS, D, BLOCK_D, False)
                do_tile = load_rows(dout + h * do_head, do_row, at, stop, ROWS, DV, BLOCK_DV, False)
                row = at + tl.arange(0, ROWS)
                lse_rows = lse_head + h * rows + row
                shift, low = exponent(tl.load(lse + lse_rows), tl.load(lse_low + lse_rows))
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # (KEYS, ROWS)
                p = tl.exp2(tl.fma(s, scale2, -shift[None, :]) - low[None, :])
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
                ds = p * (dp - tl.load(delta + lse_rows)[None, :] + tl.load(dlse + lse_rows)[None, :])
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
            edges = tl.cdiv(stop - start, ROWS) - (t1 - t0)
            some_edges = tl.maximum(edges, 1)
            for i in range(group * edges):
                h = (i // some_edges).to(tl.int64)
                at = start + edge(i % some_edges, t0, t1) * ROWS
                q_tile = load_rows(q + h * q_head, q_row, at, stop, ROWS, D, BLOCK_D, True)
                do_tile = load_rows(dout + h * do_head, do_row, at, stop, ROWS, DV, BLOCK_DV, True)
                row = at + tl.arange(0, ROWS)
                lse_rows = lse_head + h * rows + row
                some = row < stop
                shift, low = exponent(
                    tl.load(lse + lse_rows, mask=some, other=0.0), tl.load(lse_low + lse_rows, mask=some, other=0.0)
                )
                s = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                seen = (begins[:, None] <= row[None, :]) & (row[None, :] < ends[:, None])
                p = tl.where(seen, tl.exp2(tl.fma(s, scale2, -shift[None, :]) - low[None, :]), 0.0)
                dv_acc = tl.dot(p.to(do_tile.dtype), do_tile, dv_acc, input_precision="ieee")
                dp = tl.dot(v_tile, tl.trans(do_tile), input_precision="ieee")
                of_delta = tl.load(delta + lse_rows, mask=some, other=0.0)
                of_lse = tl.load(dlse + lse_rows, mask=some, other=0.0)
                ds = tl.where(seen, p * (dp - of_delta[None, :] + of_lse[None, :]), 0.0)
                dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    tl.store(dk + at_key[:, None] * dk_row + d[None, :], (dk_acc * scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at_key[:, None] * dv_row + d_v[None, :], dv_acc.to(dv.dtype.element_ty), mask=inside_v)


@triton.jit
def exponent(lse, lse_low):
    """What to subtract from a score, in units of log2: first the large part, then the small one.

    See `finished`: lse LOG2E + lse_low, and the part that rounding the product here leaves out.
    """
    lse = tl.where(lse == float("-inf"), 0.0, lse)  # a row that sees nothing
    shift = lse * LOG2E
    return shift, lse_low + tl.fma(lse, LOG2E, -shift)
