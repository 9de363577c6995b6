"""Forward on GPU: programs walk over tiles of tokens with a softmax that is online over them, `merge` joins the parts.

Two regimes, told apart by whether a program can hold the sums (k, c) of a batch row in registers (`fuses`):

- few learned tokens: it can.  One pass: a tile of x gives its logits (`first_layer`), then is read again, from L2, for
  the sum.  Nothing but states leaves the program.
- many: the sums are split over blocks of learned tokens and slabs of channels.  Each of those programs needs every
  logit, of which the first layer is the dear part (c h of c h + h k + k c products), so `layer` computes the hidden
  units first, for some batch rows at a time: in L2, h / c of the bytes of x, never more than `WORKSPACE` or one row.
  The second layer is done again by every slab, h / (channels of a slab) of the sum's own products.  From here on it is
  attention: w2's rows ask, hidden units are keys, raw tokens are values.

Where batch rows alone do not fill the machine, the tokens of a row are split among programs.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import LOG2E, Launch, Machine, add_product, load_matrix, load_vector, power_of_two
from mirasol_kernels.token_learner.triton_config import SUMS, fuses, slots_of, tile_of
from mirasol_kernels.token_learner.triton_layer import (
    LENGTHS,
    chunks,
    count_of,
    first_layer,
    fold_launch,
    gelu,
    layer_constants,
    layer_launch,
    load_tokens,
    most_tokens,
    reader,
)

MERGED_CHANNELS = 128  # that a program of `merge` owns
MOST_SPLITS = 64


def run_forward(*args: Any, machine: Machine | None = None) -> None:
    """Fills max, sum and pooled, which follow the arguments of op.py's schema; machine: by default that of w1."""
    for launch in forward_launches(*args, machine=machine or Machine.of(args[2].device)):
        launch.run()


def forward_launches(
    sources: list[Tensor],
    positions: list[Tensor | None],
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    valid: Tensor | None,
    erf: bool,
    eps: float,
    divide: bool,
    maximum: Tensor,
    total: Tensor,
    pooled: Tensor,
    *,
    machine: Machine,
) -> list[Launch]:
    """The kernels that fill maximum (B, k), total (B, k) and pooled (B, k, c), in order."""
    (batch, _, c), (k, h), dtype = sources[0].shape, w2.shape, w2.dtype
    if batch == 0:
        return []
    fused, slots = fuses(k, c), slots_of(k, h, dtype)
    tile, width = tile_of("layer" if fused else "pool", h, dtype, machine), tile_of("pool", h, dtype, machine).channels
    pieces = triton.cdiv(c, width)
    blocks, slabs = triton.cdiv(k, slots), 1 if fused else triton.cdiv(pieces, max(1, SUMS // (slots * width)))
    held = triton.cdiv(pieces, slabs)  # blocks of channels that a program sums
    shares = []  # of each source: among how many programs its tokens are split, by shapes and device alone
    for source in sources:
        tiles = triton.cdiv(source.shape[1], tile.tokens)
        idle = 2 * machine.processors // (batch * blocks * slabs)
        shares.append(min(tiles, max(1, min(idle, tiles // 2, MOST_SPLITS))))
    count = sum(shares)
    parts = maximum[None], total[None], pooled[None]
    direct = count == 1
    if not direct:
        sums = total.new_empty(2, count, batch, k)
        parts = sums[0], sums[1], sums.new_empty(count, batch, k, c)

    fold, first = fold_launch(norm_weight, norm_bias, w1, b1)
    done = [fold] if count else []
    units = None if fused else w2.new_empty(most_tokens(sources, h), h)
    before = 0
    for i, (source, table, splits) in enumerate(zip(sources, positions, shares, strict=True)):
        for rows in chunks(source, h) if splits else ():
            x = source[rows]
            read = reader(x, table, None if valid is None else valid[rows], i, eps)
            hidden = None
            if units is not None:
                hidden = units[: x.shape[:2].numel()].view(*x.shape[:2], h)
                done.append(layer_launch(read, first, hidden, None, erf, machine))
            arguments = {
                **read,
                **first,
                **{"hidden": hidden, "w2": w2, "b2": b2},
                **dict(zip(("maximum", "total", "pooled"), (part[before:, rows] for part in parts), strict=True)),
                **{"batch": batch, "splits": splits, "slabs": slabs, "blocks": blocks},
                **layer_constants(w1, tile),
                **{"K": k, "BLOCK_K": slots, "BLOCK_D": width, "HELD": held, "ERF": erf, "FINISH": direct and divide},
            }
            done.append(Launch(pool, (x.shape[0] * splits * slabs * blocks,), arguments, tile.options()))
        before += splits
    if not direct:
        arguments = {
            **dict(zip(("max_parts", "sum_parts", "parts"), parts, strict=True)),
            **{"maximum": maximum, "total": total, "pooled": pooled, "count": count, "rows": batch * k},
            **{"C": c, "BLOCK_C": min(MERGED_CHANNELS, power_of_two(c)), "BLOCK_K": 16, "DIVIDE": divide},
        }
        grid = triton.cdiv(batch * k, 16), triton.cdiv(c, arguments["BLOCK_C"])
        done.append(Launch(merge, grid, arguments, {"num_warps": 4}))
    return done


@triton.jit(do_not_specialize=LENGTHS)
def pool(
    x,
    x_batch,
    x_row,
    table,
    n,
    valid,
    sources,
    eps,
    folded,
    u,
    v,
    hidden,
    w2,
    b2,
    maximum,
    total,
    pooled,
    batch,
    splits,
    slabs,
    blocks,
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HELD: tl.constexpr,
    ERF: tl.constexpr,
    FINISH: tl.constexpr,
):
    """The state of one share of a batch row's tokens, for a block of learned tokens and a slab of HELD blocks of
    BLOCK_D channels; with FINISH divided.  Of parts (splits, B, K) and (splits, B, K, C) that follow one another."""
    program = tl.program_id(0)
    block, program = program % blocks, program // blocks
    slab, program = program % slabs, program // slabs
    split, b = program % splits, (program // splits).to(tl.int64)
    x += b * x_batch
    stop = count_of(valid, sources, b, n)
    share = tl.cdiv(tl.cdiv(n, TOKENS), splits) * TOKENS
    begin = split * share
    stop = tl.minimum(stop, begin + share)

    unit, slot = tl.arange(0, BLOCK_H), block * BLOCK_K + tl.arange(0, BLOCK_K)
    second = load_matrix(w2, slot, unit, K, H, BLOCK_K, BLOCK_H)  # (BLOCK_K, BLOCK_H)
    bias = load_vector(b2, slot, K, BLOCK_K).to(tl.float32)
    start = load_vector(v, unit, H, BLOCK_H)
    m = tl.full([BLOCK_K], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    acc = ()  # extended by addition: Triton knows no (*acc, more)
    for _block in tl.static_range(HELD):
        acc = acc + (tl.zeros([BLOCK_K, BLOCK_D], tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    for at in range(begin, stop, TOKENS):
        token = at + tl.arange(0, TOKENS)
        if hidden is None:
            way, _, rstd = first_layer(x, x_row, table, token, stop, folded, u, eps, C, H, TOKENS, BLOCK_C, BLOCK_H)
            z = tl.fma(way, rstd[None, :], start[:, None])
            units = gelu(z, ERF).to(w2.dtype.element_ty)  # (BLOCK_H, TOKENS)
        else:
            mask = (token < stop)[None, :]
            if H % BLOCK_H:
                mask = mask & (unit < H)[:, None]
            units = tl.load(hidden + (b * n + token)[None, :] * H + unit[:, None], mask=mask, other=0.0)
        s = tl.dot(second, units, input_precision="ieee") + bias[:, None]  # (BLOCK_K, TOKENS)
        s = tl.where((token < stop)[None, :], s, float("-inf"))
        # Never -inf: a tile that is walked has a token that counts.
        m_new = tl.maximum(m, tl.max(s, 1))
        # Rounded before both sums, so that they cancel: else tokens far from 0 scale what the rounding of p leaves.
        p = tl.exp2((s - m_new[:, None]) * LOG2E).to(w2.dtype.element_ty)
        fade = tl.exp2((m - m_new) * LOG2E)
        weight = weight * fade + tl.sum(p.to(tl.float32), 1)
        m = m_new
        grown = ()
        for j in tl.static_range(HELD):
            tile = load_tokens(x, x_row, table, token, stop, (slab * HELD + j) * BLOCK_D, C, BLOCK_D)
            grown = grown + (add_product(acc[j] * fade[:, None], p, tile),)  # type: ignore[assignment]  # noqa: RUF005
        acc = grown

    row = (split * batch.to(tl.int64) + b) * K + slot
    if slab == 0:
        tl.store(maximum + row, m, mask=slot < K)
        tl.store(total + row, weight, mask=slot < K)
    for j in tl.static_range(HELD):
        result = acc[j]  # type: ignore[var-annotated]
        if FINISH:
            result = result / tl.where(weight == 0, 1.0, weight)[:, None]
        channel = (slab * HELD + j) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = (slot < K)[:, None] & (channel < C)[None, :]
        tl.store(pooled + row[:, None] * C + channel[None, :], result.to(pooled.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "rows"])
def merge(
    max_parts,
    sum_parts,
    parts,
    maximum,
    total,
    pooled,
    count,
    rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIVIDE: tl.constexpr,
):
    """Joins states, first to last: parts (count, B k, C), max_parts and sum_parts (count, B k)."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = row < rows
    mask = inside[:, None] & (channel < C)[None, :]
    m = tl.full([BLOCK_K], float("-inf"), tl.float32)
    weight = tl.zeros([BLOCK_K], tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_C], tl.float32)
    at = row
    for _ in range(count):
        m_part = tl.load(max_parts + at, mask=inside, other=float("-inf"))
        weight_part = tl.load(sum_parts + at, mask=inside, other=0.0)
        part = tl.load(parts + at[:, None] * C + channel[None, :], mask=mask, other=0.0)
        m_new = tl.maximum(m, m_part)
        pivot = tl.where(m_new == float("-inf"), 0.0, m_new)  # no part may have had a token yet
        fade, gain = tl.exp2((m - pivot) * LOG2E), tl.exp2((m_part - pivot) * LOG2E)
        weight = weight * fade + weight_part * gain
        acc = acc * fade[:, None] + part * gain[:, None]
        m = m_new
        at += rows
    if DIVIDE:
        acc = acc / tl.where(weight == 0, 1.0, weight)[:, None]
    if tl.program_id(1) == 0:
        tl.store(maximum + row, m, mask=inside)
        tl.store(total + row, weight, mask=inside)
    tl.store(pooled + row[:, None] * C + channel[None, :], acc.to(pooled.dtype.element_ty), mask=mask)
