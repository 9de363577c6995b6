"""Backward on GPU: a program owns a tile of tokens, recomputes its logits and writes its dx; no atomics.

    ds = p rho (g x + offset)    dz = (w2^T ds) gelu'(z)    dx = p rho g + (dz through LayerNorm)

with g, rho and offset of `prepare`.  For some batch rows at a time, so that what lies between them is bounded, three
kernels follow one another:

- `layer` leaves z without v and rstd, 4 h bytes a token, and the tokens' mean and rstd.  The next kernel wants z both
  ways round (triton_layer.py says why), which would be the first layer twice;
- `gradient` writes dx, leaves dz, and sums dw2 and db2.  With more than one block of learned tokens it scores a tile
  again for every block of channels of dx: h k products more for each (channels of a block) k;
- `weights` (triton_weights.py) sums dz^T xhat, from which all gradients of the first layer and the norm follow.

Each reads x, `gradient` twice, the second time from L2.  The sums over c that LayerNorm's backward asks for need none
over c: with u the row sums of `folded`, mean(dxhat) = dz . u / c, and mean(dxhat xhat) = dz . (z without v) / c.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import LOG2E, Launch, Machine, add_product, load_matrix, load_vector
from mirasol_kernels.token_learner.triton_config import Tile, slots_of, tile_of
from mirasol_kernels.token_learner.triton_layer import (
    LENGTHS,
    chunks,
    count_of,
    fold_launch,
    gelu,
    gelu_slope,
    layer_constants,
    layer_launch,
    load_tokens,
    most_tokens,
    reader,
)
from mirasol_kernels.token_learner.triton_weights import WeightSums, position_launch


def run_backward(*args: Any, machine: Machine | None = None) -> None:
    """Fills the gradients, which follow the arguments of op.py's schema; machine: by default that of dpooled."""
    for launch in backward_launches(*args, machine=machine or Machine.of(args[0].device)):
        launch.run()


def backward_launches(
    dpooled: Tensor,
    dsum: Tensor | None,
    maximum: Tensor,
    total: Tensor,
    pooled: Tensor | None,
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
    gradients: list[Tensor],
    *,
    machine: Machine,
) -> list[Launch]:
    """The kernels that fill gradients (of sources, of the positions that are, of the six weights), in order."""
    batch, (k, h), dtype = sources[0].shape[0], w2.shape, w2.dtype
    dsources, dtables, dweights = gradients[: len(sources)], iter(gradients[len(sources) : -6]), gradients[-6:]
    tile, slots = tile_of("gradient", h, dtype, machine), slots_of(k, h, dtype)
    fold, first = fold_launch(norm_weight, norm_bias, w1, b1)
    prepare, given = prepare_launch(dpooled, dsum, total, pooled, dtype, tile)
    done = [fold, prepare] if batch else []
    sums = WeightSums(w1, w2, batch * sum(triton.cdiv(x.shape[1], tile.tokens) for x in sources), machine)
    most = most_tokens(sources, h)
    zs, dzs, lines = total.new_empty(most, h), w2.new_empty(most, h), total.new_empty(2 * most)
    for i, (source, table, dx) in enumerate(zip(sources, positions, dsources, strict=True)):
        for rows in chunks(source, h) if source.shape[1] else ():
            x = source[rows]
            read = reader(x, table, None if valid is None else valid[rows], i, eps)
            tokens = x.shape[:2].numel()
            z, dz = (each[:tokens].view(*x.shape[:2], h) for each in (zs, dzs))
            moments = lines[: 2 * tokens].view(2, *x.shape[:2])
            tiles = x.shape[0] * triton.cdiv(x.shape[1], tile.tokens)
            arguments = {
                **read,
                **first,
                **{
                    "w2": w2,
                    "b2": b2,
                    "maximum": maximum[rows],
                    **{name: value[rows] for name, value in given.items()},
                },
                **{"z": z, "moments": moments, "dz": dz, "dx": dx[rows], "second_sums": sums.second},
                **{"batch": x.shape[0], "tiles": triton.cdiv(x.shape[1], tile.tokens)},
                **layer_constants(w1, tile),
                **{"K": k, "BLOCK_K": slots, "SINGLE": k <= slots, "ERF": erf},
            }
            grid = (min(tiles, len(sums.second)),)
            done += [
                layer_launch(read, first, z, moments, erf, machine),
                Launch(gradient, grid, arguments, tile.options()),
                sums.weights_launch(read, moments, dz),
            ]
        if table is not None and table.numel():
            done.append(position_launch(dx, next(dtables)))
        elif table is not None:
            next(dtables)
    return done + sums.finish_launches(norm_weight, norm_bias, w1, *dweights, divide=divide)


def prepare_launch(
    dpooled: Tensor, dsum: Tensor | None, total: Tensor, pooled: Tensor | None, dtype: torch.dtype, tile: Tile
) -> tuple[Launch, dict[str, Tensor]]:
    """The kernel that brings both kinds of call to one form, and what it fills: ds = p rho (g x + offset) with rho and
    offset (B, k), and g (B, k, c) in the tokens' dtype.

    Finished tokens have rho = 1 / sum and offset = -(g . out), a state rho = 1 and offset = dsum.  Gradients are
    float32 and may lie outside the range of float16: where g has 16 bits, the size of a row, a power of two, is in rho.
    """
    batch, k, c = dpooled.shape
    lines = total.new_empty(2, batch, k)
    g = dpooled if dpooled.dtype == dtype else dpooled.new_empty(dpooled.shape, dtype=dtype)
    given = {"g": g, "rho": lines[0], "offset": lines[1]}
    arguments = {
        **{"dpooled": dpooled, "dsum": dsum, "total": total, "pooled": pooled, **given, "rows": batch * k},
        **{"C": c, "BLOCK_C": tile.channels, "BLOCK_K": 16, "SCALED": g is not dpooled},
    }
    return Launch(prepare, (triton.cdiv(batch * k, 16),), arguments, {"num_warps": 4}), given


@triton.jit(do_not_specialize=["rows"])
def prepare(
    dpooled,
    dsum,
    total,
    pooled,
    g,
    rho,
    offset,
    rows,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Some learned tokens, of any batch row."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    live = row < rows
    largest = tl.full([BLOCK_K], 1.0, tl.float32)
    if SCALED:
        largest = tl.full([BLOCK_K], 1e-18, tl.float32)
        for first in range(0, C, BLOCK_C):
            at, mask = within(row, live, first, C, BLOCK_C)
            line = tl.load(dpooled + at, mask=mask, other=0.0)
            largest = tl.maximum(largest, tl.max(tl.abs(line), 1))
        largest = tl.exp2(tl.ceil(tl.log2(largest)))
        for first in range(0, C, BLOCK_C):
            at, mask = within(row, live, first, C, BLOCK_C)
            line = tl.load(dpooled + at, mask=mask, other=0.0) / largest[:, None]
            tl.store(g + at, line.to(g.dtype.element_ty), mask=mask)
    if pooled is not None:
        # The diagonal of a product that adds as `score_gradient` does: a learned token that is one token exactly, as
        # it is where there is only one, has a gradient of exactly 0.  Of 16 bits in two terms: pooled has more.
        product = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
        rest = tl.zeros([BLOCK_K, BLOCK_K], tl.float32)
        for first in range(0, C, BLOCK_C):
            at, mask = within(row, live, first, C, BLOCK_C)
            line = (tl.load(dpooled + at, mask=mask, other=0.0) / largest[:, None]).to(g.dtype.element_ty)
            out = tl.load(pooled + at, mask=mask, other=0.0)
            high = out.to(g.dtype.element_ty)
            product = add_product(product, line, tl.trans(high))
            if SCALED:
                low = (out - high.to(tl.float32)).to(g.dtype.element_ty)
                rest = add_product(rest, line, tl.trans(low))
        diagonal = tl.arange(0, BLOCK_K)[:, None] == tl.arange(0, BLOCK_K)[None, :]
        weight = tl.load(total + row, mask=live, other=1.0)
        tl.store(rho + row, largest / tl.where(weight == 0, 1.0, weight), mask=live)
        tl.store(offset + row, -tl.sum(tl.where(diagonal, product + rest, 0.0), 1), mask=live)
    else:
        tl.store(rho + row, largest, mask=live)
        tl.store(offset + row, tl.load(dsum + row, mask=live, other=0.0) / largest, mask=live)


@triton.jit
def within(row, live, first, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Where a block of channels of some rows lies, and what of it there is."""
    channel = first + tl.arange(0, BLOCK_C)
    return row[:, None] * C + channel[None, :], live[:, None] & (channel < C)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def gradient(
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
    w2,
    b2,
    maximum,
    g,
    rho,
    offset,
    z,
    moments,
    dz,
    dx,
    second_sums,
    batch,
    tiles,
    C: tl.constexpr,
    H: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
    ERF: tl.constexpr,
):
    """Every so-many-th tile of tokens: dx and dz, and the sums of dw2 (K, H) and db2 (K) in a slice of its own."""
    unit = tl.arange(0, BLOCK_H)
    sums = load_vector(u, unit, H, BLOCK_H)
    start = load_vector(v, unit, H, BLOCK_H)
    second_sums += tl.program_id(0).to(tl.int64) * (K * H + K)
    slots = tl.arange(0, BLOCK_K)
    for index in range(tl.program_id(0), batch * tiles, tl.num_programs(0)):
        b = (index // tiles).to(tl.int64)
        x_own = x + b * x_batch
        token = (index % tiles) * TOKENS + tl.arange(0, TOKENS)
        stop = count_of(valid, sources, b, n)
        live = token < stop
        row = b * n + token
        here = (token < n)[None, :] & (unit < H)[:, None]
        mean = tl.load(moments + row, mask=token < n, other=0.0)
        rstd = tl.load(moments + batch.to(tl.int64) * n + row, mask=token < n, other=0.0)
        way_z = tl.load(z + row[None, :] * H + unit[:, None], mask=here, other=0.0)  # (BLOCK_H, TOKENS)
        units = gelu(tl.fma(way_z, rstd[None, :], start[:, None]), ERF).to(w2.dtype.element_ty)
        again = tl.load(
            z + row[:, None] * H + unit[None, :], mask=(token < n)[:, None] & (unit < H)[None, :], other=0.0
        )
        units_t = gelu(tl.fma(again, rstd[:, None], start[None, :]), ERF).to(w2.dtype.element_ty)  # (TOKENS, BLOCK_H)

        # Weights p rho lie in the range of float16, like g, by the largest rho of the batch row: a power of two.
        every = tl.arange(0, triton.next_power_of_2(K))
        peak = tl.max(tl.load(rho + b * K + every, mask=every < K, other=0.0), 0)
        peak = tl.exp2(tl.ceil(tl.log2(peak)))
        dunits = tl.zeros([BLOCK_H, TOKENS], tl.float32)
        if SINGLE:
            p, scale = weights_of(units, live, slots, b, w2, b2, maximum, rho, K, H, BLOCK_K, BLOCK_H)
            ds = score_gradient(
                p, scale, slots, b, x_own, x_row, table, token, stop, g, offset, C, K, TOKENS, BLOCK_C, BLOCK_K
            )
            add_to_sums(second_sums, ds, units_t, slots, K, H, BLOCK_H)
            second = load_matrix(w2, slots, unit, K, H, BLOCK_K, BLOCK_H)
            dunits = tl.dot(tl.trans(second), ds.to(w2.dtype.element_ty), dunits, input_precision="ieee")
            pooling = (p * (scale / peak)[:, None]).to(w2.dtype.element_ty)
        else:
            for block in range(0, K, BLOCK_K):
                slot = block + slots
                p, scale = weights_of(units, live, slot, b, w2, b2, maximum, rho, K, H, BLOCK_K, BLOCK_H)
                ds = score_gradient(
                    p, scale, slot, b, x_own, x_row, table, token, stop, g, offset, C, K, TOKENS, BLOCK_C, BLOCK_K
                )
                add_to_sums(second_sums, ds, units_t, slot, K, H, BLOCK_H)
                second = load_matrix(w2, slot, unit, K, H, BLOCK_K, BLOCK_H)
                dunits = tl.dot(tl.trans(second), ds.to(w2.dtype.element_ty), dunits, input_precision="ieee")

        # Rounded before anything uses it, so that dx stays orthogonal to 1 and xhat.
        slope = gelu_slope(tl.fma(way_z, rstd[None, :], start[:, None]), ERF)
        dz_low = (dunits * slope).to(w2.dtype.element_ty)
        tl.store(dz + row[None, :] * H + unit[:, None], dz_low, mask=here)
        dz_wide = dz_low.to(tl.float32)
        along_one = tl.sum(dz_wide * sums[:, None], 0) / C
        along_xhat = tl.sum(dz_wide * way_z, 0) * rstd / C
        for first in range(0, C, BLOCK_C):
            channel = first + tl.arange(0, BLOCK_C)
            rows = load_matrix(folded, unit, channel, H, C, BLOCK_H, BLOCK_C)
            way = tl.dot(tl.trans(rows), dz_low, input_precision="ieee")  # (BLOCK_C, TOKENS)
            tile = load_tokens(x_own, x_row, table, token, stop, first, C, BLOCK_C)
            xhat = (tl.trans(tile).to(tl.float32) - mean[None, :]) * rstd[None, :]
            way = (way - along_one[None, :] - xhat * along_xhat[None, :]) * rstd[None, :]
            direct = tl.zeros([BLOCK_C, TOKENS], tl.float32)
            if SINGLE:
                lines = load_matrix(g + b * K * C, slots, channel, K, C, BLOCK_K, BLOCK_C)
                direct = tl.dot(tl.trans(lines), pooling, direct, input_precision="ieee")
            else:
                for block in range(0, K, BLOCK_K):
                    slot = block + slots
                    p, scale = weights_of(units, live, slot, b, w2, b2, maximum, rho, K, H, BLOCK_K, BLOCK_H)
                    pooling = (p * (scale / peak)[:, None]).to(w2.dtype.element_ty)
                    lines = load_matrix(g + b * K * C, slot, channel, K, C, BLOCK_K, BLOCK_C)
                    direct = tl.dot(tl.trans(lines), pooling, direct, input_precision="ieee")
            result = tl.where(live[None, :], way + direct * peak, 0.0)
            mask = (token < n)[None, :] & (channel < C)[:, None]
            tl.store(dx + row[None, :] * C + channel[:, None], result.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def add_to_sums(second_sums, ds, units_t, slot, K: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Adds to the sums of dw2 (K, H) and, behind it, of db2 (K), in L2: registers hold no more than a block of them."""
    unit = tl.arange(0, BLOCK_H)
    at, at_bias = second_sums + slot[:, None] * H + unit[None, :], second_sums + K * H + slot
    mask = (slot < K)[:, None] & (unit < H)[None, :]
    more = tl.dot(ds.to(units_t.dtype), units_t, input_precision="ieee")  # (BLOCK_K, BLOCK_H)
    tl.store(at, tl.load(at, mask=mask, other=0.0) + more, mask=mask)
    tl.store(at_bias, tl.load(at_bias, mask=slot < K, other=0.0) + tl.sum(ds, 1), mask=slot < K)
    tl.debug_barrier()  # what one thread stored another may load next time


@triton.jit
def weights_of(
    units,
    live,
    slot,
    b,
    w2,
    b2,
    maximum,
    rho,
    K: tl.constexpr,
    H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """p = exp(s - max) of a block of learned tokens (BLOCK_K, TOKENS), as in forward, and their rho (BLOCK_K)."""
    second = load_matrix(w2, slot, tl.arange(0, BLOCK_H), K, H, BLOCK_K, BLOCK_H)
    bias = load_vector(b2, slot, K, BLOCK_K).to(tl.float32)
    s = tl.dot(second, units, input_precision="ieee") + bias[:, None]
    m = load_vector(maximum + b * K, slot, K, BLOCK_K)
    m = tl.where(m == float("-inf"), 0.0, m)  # no token counts: `live` is nowhere
    p = tl.where(live[None, :], tl.exp2((s - m[:, None]) * LOG2E), 0.0)
    return p, load_vector(rho + b * K, slot, K, BLOCK_K)


@triton.jit
def score_gradient(
    p,
    scale,
    slot,
    b,
    x,
    x_row,
    table,
    token,
    stop,
    g,
    offset,
    C: tl.constexpr,
    K: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """ds = p rho (g x + offset) (BLOCK_K, TOKENS)."""
    dp = tl.zeros([BLOCK_K, TOKENS], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        lines = load_matrix(g + b * K * C, slot, channel, K, C, BLOCK_K, BLOCK_C)
        tile = load_tokens(x, x_row, table, token, stop, first, C, BLOCK_C)
        dp = add_product(dp, lines, tl.trans(tile))
    return p * (dp + load_vector(offset + b * K, slot, K, BLOCK_K)[:, None]) * scale[:, None]
