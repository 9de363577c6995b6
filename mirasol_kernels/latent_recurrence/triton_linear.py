"""Linear layers of a few rows on GPU: LayerNorm in front, GELU or a residual behind, attention instead of an input."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import (
    LOG2E,
    Launch,
    Machine,
    add_product,
    load_matrix,
    load_vector,
    power_of_two,
    share_of,
)
from mirasol_kernels.latent_recurrence.triton_config import attend_tile, linear_tile

EPS = tl.constexpr(1e-6)  # of every LayerNorm

# Numbers that follow the lengths must not compile a kernel of their own.
LENGTHS = ["rows", "batch", "steps", "t", "from_steps", "from_t", "to_steps", "to_t"]


def linear_launch(
    x: Tensor,
    layer: list[Tensor],
    out: Tensor,
    machine: Machine,
    *,
    norm: bool = False,
    gelu: bool = False,
    add: bool = False,
) -> Launch:
    """out (rows, n) = the layer, weight (n, c) and bias, of x (rows, c), after a norm, before GELU, or added to out.

    A norm's own weight and bias are in those of the layer."""
    weight, bias = layer
    (rows, c), n = x.shape, len(weight)
    tile = linear_tile(rows, n, machine.processors)
    arguments = {
        **{"x": x, "weight": weight, "bias": bias, "out": out, "rows": rows},
        **{"C": c, "N": n, "NORM": norm, "GELU": gelu, "ADD": add},
        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "BLOCK_C": tile.channels},
    }
    return Launch(linear, (triton.cdiv(rows, tile.rows), triton.cdiv(n, tile.columns)), arguments, tile.options())


def attend_launch(qkv: Tensor, layer: list[Tensor], x: Tensor, read: int, heads: int) -> Launch:
    """x (B r, c) += the layer of what the r tokens of a video see of each other; qkv (B r, 3 c)."""
    (weight, bias), (rows, c) = layer, x.shape
    tile = attend_tile(read, c // heads)
    arguments = {
        **{"qkv": qkv, "weight": weight, "bias": bias, "x": x},
        **{"C": c, "HEAD": c // heads, "READ": read, "TILES": triton.cdiv(read, tile.rows)},
        **{"ROWS": tile.rows, "KEYS": tile.channels, "COLUMNS": tile.columns, "BLOCK_D": power_of_two(c // heads)},
    }
    grid = rows // read * arguments["TILES"], triton.cdiv(c, tile.columns)
    return Launch(attend, grid, arguments, tile.options())


@triton.jit
def tile_at(x, at, inside, channel, C: tl.constexpr, BLOCK_C: tl.constexpr):  # -> (len(at), BLOCK_C)
    """Rows `at` of x (., C), where they are inside; zeros elsewhere and from channel C on, which are not read."""
    mask = inside[:, None]
    if C % BLOCK_C:
        mask = mask & (channel < C)[None, :]
    return tl.load(x + at.to(tl.int64)[:, None] * C + channel[None, :], mask=mask, other=0.0)


@triton.jit
def normed(tile, mean, rstd, norm, channel, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """LayerNorm of a tile with the moments of its rows; 0 from channel C on."""
    weight, bias = load_vector(norm[0], channel, C, BLOCK_C), load_vector(norm[1], channel, C, BLOCK_C)
    return (tile - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]


@triton.jit
def tokens_at(source, place, table, channel, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows of a source, which is (x, at, inside, mean, rstd, norm), through its norm if it has one, and those of the
    table at `place` added if there is one."""
    x, at, inside, mean, rstd, norm = source
    tile = tile_at(x, at, inside, channel, C, BLOCK_C)
    if norm is not None:
        tile = normed(tile, mean, rstd, norm, channel, C, BLOCK_C)
    if table is not None:
        tile += tile_at(table, place, inside, channel, C, BLOCK_C)
    return tile


@triton.jit
def moments(source, place, table, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):  # -> two of (ROWS)
    """mean and 1 / sqrt(variance + eps) of the rows of `tokens_at`.

    Of what is left of a row without the mean of its first BLOCK_C channels: a large mean would cancel in the variance.
    Unrolled, so that all of a row is on its way at once; in the tiles of the product that follows, since a wider one
    would have Triton hold the product's tile once in every warp.
    """
    head = tokens_at(source, place, table, tl.arange(0, BLOCK_C), C, BLOCK_C)
    shift = tl.sum(head, 1) / min(C, BLOCK_C)
    total = tl.zeros([ROWS, BLOCK_C], tl.float32)
    square = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for first in tl.static_range(0, C, BLOCK_C):
        left = centred_at(source, place, table, shift, first + tl.arange(0, BLOCK_C), C, BLOCK_C)
        total += left
        square += left * left
    drift = tl.sum(total, 1) / C
    return shift + drift, tl.rsqrt(tl.maximum(tl.sum(square, 1) / C - drift * drift, 0.0) + EPS)


@triton.jit
def centred_at(source, place, table, mean, channel, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """`tokens_at` without their means; 0 from channel C on."""
    tile = tokens_at(source, place, table, channel, C, BLOCK_C) - mean[:, None]
    if C % BLOCK_C:
        tile = tl.where((channel < C)[None, :], tile, 0.0)
    return tile


@triton.jit(do_not_specialize=LENGTHS)
def linear(
    x,
    weight,
    bias,
    out,
    rows,
    C: tl.constexpr,
    N: tl.constexpr,
    NORM: tl.constexpr,
    GELU: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile of out (rows, N) = [out +] [gelu]([norm] x (rows, C) weight^T + bias)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < rows
    source = x, row, inside, None, None, None
    if NORM:
        mean, rstd = moments(source, None, None, C, ROWS, BLOCK_C)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        if NORM:
            tile = centred_at(source, None, None, mean, channel, C, BLOCK_C)
        else:
            tile = tokens_at(source, None, None, channel, C, BLOCK_C)
        factor = load_matrix(weight, column, channel, N, C, COLUMNS, BLOCK_C)  # (COLUMNS, BLOCK_C)
        acc = add_product(acc, tile, tl.trans(factor))
    if NORM:
        acc *= rstd[:, None]
    acc += load_vector(bias, column, N, COLUMNS)[None, :]
    if GELU:
        acc = acc * share_of(acc)
    store_rows(out, row, inside, column, acc, N, COLUMNS, ADD)


@triton.jit
def store_rows(out, at, inside, column, tile, N: tl.constexpr, COLUMNS: tl.constexpr, ADD: tl.constexpr):
    """Into rows `at` of out (., N), or added to them."""
    if ADD:
        tile += tile_at(out, at, inside, column, N, COLUMNS)
    mask = inside[:, None] & (column < N)[None, :]
    tl.store(out + at.to(tl.int64)[:, None] * N + column[None, :], tile, mask=mask)


@triton.jit(do_not_specialize=LENGTHS)
def attend(
    qkv,
    weight,
    bias,
    x,
    C: tl.constexpr,
    HEAD: tl.constexpr,
    READ: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """COLUMNS channels of x for a tile of the rows of one video, which see each other.

    Never of several: a weight of 0 does not keep out an infinite or NaN value of another video.

    Every block of channels attends again, head by head: as much as its part of the projection, and one launch less.
    """
    start = tl.program_id(0) // TILES * READ
    index = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    column, d = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, BLOCK_D)
    row, inside = start + index, index < READ
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, C, HEAD):
        q = head_at(qkv, row, inside, first, d, C, HEAD, BLOCK_D)
        m = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        seen = tl.zeros([ROWS, BLOCK_D], tl.float32)
        for key in range(0, READ, KEYS):
            other = key + tl.arange(0, KEYS)
            exists = other < READ
            k = head_at(qkv, start + other, exists, first + C, d, C, HEAD, BLOCK_D)  # (KEYS, BLOCK_D)
            v = head_at(qkv, start + other, exists, first + 2 * C, d, C, HEAD, BLOCK_D)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * (HEAD**-0.5)  # (ROWS, KEYS)
            s = tl.where(exists[None, :], s, float("-inf"))
            m, total, seen = add_tokens(m, total, seen, s, v)
        mask = column[:, None] < C
        if HEAD != BLOCK_D:
            mask = mask & (d < HEAD)[None, :]
        factor = tl.load(weight + column[:, None] * C + first + d[None, :], mask=mask, other=0.0)
        acc = add_product(acc, seen / total[:, None], tl.trans(factor))
    acc += load_vector(bias, column, C, COLUMNS)[None, :]
    store_rows(x, row, inside, column, acc, C, COLUMNS, True)


@triton.jit
def head_at(qkv, row, inside, first, d, C: tl.constexpr, HEAD: tl.constexpr, BLOCK_D: tl.constexpr):
    """(len(row), BLOCK_D) of qkv (., 3 C): HEAD channels from `first` on; zeros past them and outside."""
    mask = inside[:, None]
    if HEAD != BLOCK_D:
        mask = mask & (d < HEAD)[None, :]
    return tl.load(qkv + row.to(tl.int64)[:, None] * (3 * C) + (first + d)[None, :], mask=mask, other=0.0)


@triton.jit
def add_tokens(m, weight, acc, s, tile):
    """The state (max, sum, weighted sum) of the tokens so far, and of a tile of them with logits s; not all -inf."""
    m_new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2((s - m_new[:, None]) * LOG2E)
    fade = tl.exp2((m - m_new) * LOG2E)
    return m_new, weight * fade + tl.sum(p, 1), add_product(acc * fade[:, None], p, tile)
