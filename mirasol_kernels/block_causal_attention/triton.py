"""Forward on GPU: tiles of query rows walk their key ranges (`triton_ranges`); few rows split the keys among programs.

A program owns a tile of query rows of one head, keeps q, the accumulated output and the softmax's maximum m and sum l
in registers, and streams keys and values through shared memory (FlashAttention-2, Dao 2023, arXiv:2307.08691).  Scores
are kept in units of log2.  Decoding has few rows and many keys: the query heads that share a key head become rows of
one tile, `splits` programs take a share of the keys each, and `merge` joins their results in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import LN2, LOG2E, Launch, load_rows, near, options, power_of_two
from mirasol_kernels.block_causal_attention.triton_config import Machine, config_of
from mirasol_kernels.block_causal_attention.triton_ranges import (
    edge,
    joined,
    lines_of,
    next_piece,
    nth_range,
    pieces_of,
)

MERGED_ROWS = 16  # rows that a program of `merge` owns


def run_forward(*args: Any, machine: Machine | None = None) -> None:
    """Fills out, lse and lse_low, which follow the arguments of op.py's schema; machine: by default that of q."""
    for launch in forward_launches(*args, machine=machine or Machine.of(args[0].device)):
        launch.run()


def forward_launches(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_offsets: Tensor,
    k_ranges: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    lse_low: Tensor,
    *,
    machine: Machine,
) -> list[Launch]:
    """The kernels that fill out (B, Hq, Nq, Dv), lse and lse_low (B, Hq, Nq), in order."""
    batch, heads, rows, dim = q.shape
    key_heads, value_dim = k.shape[1], v.shape[3]
    if out.numel() == 0:
        return []
    widest, group = max(dim, value_dim), heads // key_heads
    config = config_of("forward", widest, q.dtype, machine)
    packed, splits = 1, 1
    if rows < config.rows:  # the tile would be part empty: query heads of one key head share it
        packed = group
        few = config_of("decode", widest, q.dtype, machine)
        config = few if rows * packed <= few.rows else config
        tiles = batch * key_heads * triton.cdiv(rows * packed, config.rows)
        # As many programs as run at a time, none with less than four steps; by shapes and device alone.
        splits = max(1, min(2 * machine.processors // tiles, k.shape[2] // (4 * config.keys), 128))
    k, v = near(k), near(v)
    parts = out[None], lse[None], lse_low[None]
    if splits > 1:
        sums = torch.empty(2, splits, batch, heads, rows, dtype=torch.float32, device=q.device)
        parts = sums.new_empty(splits, batch, heads, rows, value_dim), sums[0], sums[1]
    tiles = triton.cdiv(rows * packed, config.rows)
    constants = {
        "NEGATIVE": scale < 0,
        "TWINS": k.stride(2) == v.stride(2),
        "PACKED": packed,
        "SPLIT": splits > 1,
        "D": dim,
        "DV": value_dim,
        "BLOCK_D": power_of_two(dim),
        "BLOCK_DV": power_of_two(value_dim),
    }
    arguments = {
        **{"q": q, "k": k, "v": v, "out": parts[0], "lse": parts[1], "lse_low": parts[2]},
        **{"q_offsets": q_offsets, "k_ranges": k_ranges},
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **strides("o", parts[0][0]),
        **{"o_split": parts[0].stride(0), "lse_split": parts[1].stride(0), "splits": splits},
        **{"programs": batch * heads // packed, "heads": heads, "group": group, "rows": rows, "tiles": tiles},
        **table("groups", q_offsets, k_ranges),
        **{"ranges": k_ranges.shape[2], "scale2": scale * LOG2E.value},
        **constants,
        **{"ROWS": config.rows, "KEYS": config.keys},
    }
    grid = (batch * heads // packed * tiles, splits)
    done = [Launch(forward, grid, arguments, options(config))]
    if splits > 1:
        arguments = {
            **{"out_parts": parts[0], "m_parts": parts[1], "l_parts": parts[2], "out": out},
            **{"lse": lse, "lse_low": lse_low, **strides("o", out), "heads": heads, "rows": rows},
            **{"count": batch * heads * rows, "splits": splits},
            **{"DV": value_dim, "BLOCK_DV": power_of_two(value_dim), "ROWS": MERGED_ROWS},
        }
        done.append(Launch(merge, (triton.cdiv(batch * heads * rows, MERGED_ROWS),), arguments, {"num_warps": 4}))
    return done


def strides(name: str, x: Tensor) -> dict[str, int]:
    """Those of batch, heads and tokens; that of the last dimension is 1."""
    return {f"{name}_batch": x.stride(0), f"{name}_head": x.stride(1), f"{name}_row": x.stride(2)}


def table(name: str, offsets: Tensor, *columns: Tensor) -> dict[str, int]:
    """Number of lines, steps of a search among them, and what leads from one batch row to the next (0 if all alike)."""
    lines = offsets.shape[1] - 1
    alike = len(offsets) == 1
    return {
        name: lines,
        f"{name}_steps": (lines - 1).bit_length(),
        "offsets_batch": 0 if alike else offsets.stride(0),
        "ranges_batch": 0 if alike else columns[-1].stride(0),
    }


# Numbers that follow the layout must not compile a kernel of their own.
LAYOUT = ["programs", "heads", "group", "rows", "tiles", "groups", "groups_steps", "offsets_batch", "ranges_batch"]
LAYOUT += ["ranges"]


@triton.jit(do_not_specialize=[*LAYOUT, "lse_split", "splits"])
def forward(
    q,
    k,
    v,
    out,
    lse,
    lse_low,
    q_offsets,
    k_ranges,
    q_batch,
    q_head,
    q_row,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    o_batch,
    o_head,
    o_row,
    o_split,
    lse_split,
    splits,
    programs,
    heads,
    group,
    rows,
    tiles,
    groups,
    groups_steps,
    offsets_batch,
    ranges_batch,
    ranges,
    scale2,
    NEGATIVE: tl.constexpr,
    TWINS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One tile of rows of one head; or with SPLIT, for one of `splits` shares of their keys, not yet divided by l."""
    if TWINS:  # rows of k and v are equally far apart: offsets within a tile are kept once
        v_row = k_row
    # Late rows see most: they start first.  Heads are innermost, so that those of one key head share its keys in L2.
    program = tl.program_id(0)
    tile = tiles - 1 - program // programs
    head = (program % programs) * PACKED
    b, head = (head // heads).to(tl.int64), head % heads
    key_head = (head // group).to(tl.int64)
    index = tl.arange(0, ROWS)
    packed = tile * ROWS + index
    row, valid = tl.minimum(packed // PACKED, rows - 1), packed // PACKED < rows
    own_head = (head + packed % PACKED).to(tl.int64)
    k += b * k_batch + key_head * k_head
    v += b * v_batch + key_head * v_head
    q_offsets += b * offsets_batch
    k_ranges += b * ranges_batch

    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_rows = q + b * q_batch + own_head * q_head + row.to(tl.int64) * q_row
    q_tile = tl.load(q_rows[:, None] + d[None, :], mask=valid[:, None] & (d[None, :] < D), other=0.0)  # (ROWS, BLOCK_D)

    first = lines_of(row, q_offsets, groups, groups_steps) * ranges
    before = tl.minimum(tl.maximum(packed - 1, 0) // PACKED, rows - 1)
    first_before = lines_of(before, q_offsets, groups, groups_steps) * ranges
    share_from, share_to = 0, 0
    if SPLIT:
        seen = 0
        for r in range(ranges):
            begin, end = nth_range(k_ranges, first, ranges, r)
            start, length = hull(begin, end)
            seen += length
        share = tl.cdiv(tl.cdiv(seen, splits), KEYS) * KEYS
        share_from = tl.program_id(1) * share
        share_to = share_from + share

    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for r in range(ranges):
        begin, end = nth_range(k_ranges, first, ranges, r)
        before_begin, before_end = nth_range(k_ranges, first_before, ranges, r)
        if SPLIT:
            start, length = hull(begin, end)
            low, high = start + share_from, start + share_to
            begin, end = clamp(begin, low, high), clamp(end, low, high)
            before_begin, before_end = clamp(before_begin, low, high), clamp(before_end, low, high)
            share_from -= length
            share_to -= length
        join = joined(index, begin, end, before_begin, before_end)
        done = 0
        for _ in range(pieces_of(begin, end, join)):
            done, begins, ends, start, stop, t0, t1 = next_piece(index, begin, end, join, done, ROWS, KEYS)
            for i in range(t1 - t0):
                at = start + (t0 + i) * KEYS
                k_tile = load_rows(k, k_row, at, stop, KEYS, D, BLOCK_D, False)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # (ROWS, KEYS)
                # The maximum is scaled, not every score; which end it is depends on the sign of the scale.
                m_new = tl.maximum(m, (tl.min(s, 1) if NEGATIVE else tl.max(s, 1)) * scale2)
                p = tl.exp2(tl.fma(s, scale2, -m_new[:, None]))
                fade = tl.exp2(m - m_new)
                total = total * fade + tl.sum(p, 1)
                v_tile = load_rows(v, v_row, at, stop, KEYS, DV, BLOCK_DV, False)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
                m = m_new
            for i in range(tl.cdiv(stop - start, KEYS) - (t1 - t0)):
                at = start + edge(i, t0, t1) * KEYS
                k_tile = load_rows(k, k_row, at, stop, KEYS, D, BLOCK_D, True)
                s = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                key = at + tl.arange(0, KEYS)
                sees = (begins[:, None] <= key[None, :]) & (key[None, :] < ends[:, None])
                m_new = tl.maximum(m, tl.max(tl.where(sees, s * scale2, float("-inf")), 1))
                shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # a row may have seen nothing yet
                p = tl.where(sees, tl.exp2(tl.fma(s, scale2, -shift[:, None])), 0.0)
                fade = tl.exp2(m - shift)
                total = total * fade + tl.sum(p, 1)
                v_tile = load_rows(v, v_row, at, stop, KEYS, DV, BLOCK_DV, True)
                acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
                m = m_new

    lse_rows = (b * heads + own_head) * rows + row
    o_rows = out + b * o_batch + own_head * o_head + row.to(tl.int64) * o_row
    if SPLIT:
        split = tl.program_id(1).to(tl.int64)
        lse_rows += split * lse_split
        o_rows += split * o_split
        tl.store(lse + lse_rows, m, mask=valid)
        tl.store(lse_low + lse_rows, total, mask=valid)
    else:
        acc, whole, low = finished(acc, m, total)
        tl.store(lse + lse_rows, whole, mask=valid)
        tl.store(lse_low + lse_rows, low, mask=valid)
    tl.store(o_rows[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=valid[:, None] & (dv[None, :] < DV))


@triton.jit
def hull(begin, end):
    """Start and length of the least interval that holds the range of every row."""
    some = begin < end
    stop = tl.max(tl.where(some, end, 0), 0)
    start = tl.minimum(tl.min(tl.where(some, begin, 2147483647), 0), stop)
    return start, stop - start


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def finished(acc, m, total):
    """out, lse and lse_low of rows whose softmax has the maximum m, in units of log2, and the sum l.

    lse = fl(m ln 2 + ln l).  Near 1e4 half an ulp of it is 5e-4: too coarse to recompute a weight.  lse_low is what
    rounding left out, in units of log2: lse LOG2E + lse_low = m + log2 l, the product not rounded.
    """
    none = total == 0
    divisor = tl.where(none, 1.0, total)
    lse = tl.where(none, float("-inf"), tl.fma(m, LN2, tl.log(divisor)))
    low = tl.where(none, 0.0, tl.fma(-lse, LOG2E, m) + tl.log2(divisor))
    return tl.where(none[:, None], 0.0, acc / divisor[:, None]), lse, low


@triton.jit(do_not_specialize=["heads", "rows", "count", "splits"])
def merge(
    out_parts,
    m_parts,
    l_parts,
    out,
    lse,
    lse_low,
    o_batch,
    o_head,
    o_row,
    heads,
    rows,
    count,
    splits,
    DV: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Joins the shares of `forward`, first to last: parts (splits, B, Hq, Nq, Dv) and (splits, B, Hq, Nq)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    dv = tl.arange(0, BLOCK_DV)
    valid = row < count
    inside = valid[:, None] & (dv[None, :] < DV)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    at = row
    for _ in range(splits):
        m_part = tl.load(m_parts + at, mask=valid, other=float("-inf"))
        l_part = tl.load(l_parts + at, mask=valid, other=0.0)
        part = tl.load(out_parts + at[:, None] * DV + dv[None, :], mask=inside, other=0.0)
        m_new = tl.maximum(m, m_part)
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)
        fade, share = tl.exp2(m - shift), tl.exp2(m_part - shift)
        total = total * fade + l_part * share
        acc = acc * fade[:, None] + part * share[:, None]
        m = m_new
        at += count
    acc, whole, low = finished(acc, m, total)
    tl.store(lse + row, whole, mask=valid)
    tl.store(lse_low + row, low, mask=valid)
    b, h, n = row // rows // heads, row // rows % heads, row % rows
    o_rows = out + b * o_batch + h * o_head + n * o_row
    tl.store(o_rows[:, None] + dv[None, :], acc.to(out.dtype.element_ty), mask=inside)
