"""What forward and backward share: tokens read tile by tile, and the first layer, transposed: z^T = w1 LayerNorm(x)^T.

LayerNorm costs no pass of its own.  `fold` puts its weight into w1 once; then, with u the sums of the rows of that,

    w1 (norm_weight xhat + norm_bias) + b1 = rstd (folded x - u mean) + v        v = w1 norm_bias + b1

The difference cancels where a token's mean is large beside its spread, so moments, and products of float32, are of
x - shift, shift being the mean of the token's first block of channels.  With m blocks in a token |mean - shift| is at
most sqrt(m) standard deviations, whatever the token: at most five bits of the variance's 24 are lost (c 2048, blocks of
64), and hardly one in tokens whose blocks are alike.  16-bit tokens multiply as they are: a shifted one would have to
be rounded, and what float32 loses at a mean of 2^8 (bfloat16) or 2^10 (float16) deviations, where the tokens themselves
have no bits left, is less than their last bit.

Everything is kept transposed, tokens last: the next product takes z^T as it is, and transposing the result of a product
is miscompiled by Triton 3.4 to 3.7.0.  Backward must find the logits of forward to the bit, since exp of a difference
of two numbers near 1e4 forgives nothing: both come through `first_layer`, with one tile, and multiplications that an
addition follows are fused by hand, which a compiler would do in one kernel and not in another.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import Launch, Machine, add_product, load_matrix, load_vector, power_of_two, share_of
from mirasol_kernels.token_learner.triton_config import Tile, tile_of

WORKSPACE = 64 << 20  # bytes that the hidden units of some batch rows take at a time; one row may take more

HALF_LOG2E = tl.constexpr(-0.7213475204444817)

# Numbers that follow the lengths must not compile a kernel of their own.
LENGTHS = ["n", "tiles", "splits", "programs", "batch", "slabs", "blocks"]


def fold_launch(norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor) -> tuple[Launch, dict[str, Tensor]]:
    """The kernel that prepares the first layer, and what it fills: folded (h, c) in w1's dtype, u (h) and v (h)."""
    h, c = w1.shape
    lines = torch.empty(2, h, dtype=torch.float32, device=w1.device)
    first = {"folded": torch.empty_like(w1), "u": lines[0], "v": lines[1]}
    weights = {"norm_weight": norm_weight, "norm_bias": norm_bias, "w1": w1, "b1": b1}
    constants = {"C": c, "BLOCK_C": power_of_two(c)}
    return Launch(fold, (h,), {**weights, **first, **constants}, {"num_warps": 4}), first


def layer_launch(
    read: dict[str, Any], first: dict[str, Tensor], z: Tensor, moments: Tensor | None, erf: bool, machine: Machine
) -> Launch:
    """The kernel that fills z (B, n, h): the hidden units gelu(z) in z's dtype; or, given the moments (2, B, n) to
    fill, mean and rstd, what `first_layer` returns, in float32: all that backward wants to know."""
    batch, n, h = z.shape
    tile = tile_of("layer", h, read["x"].dtype, machine)
    tiles = triton.cdiv(n, tile.tokens)
    arguments = {
        **read,
        **first,
        **{"z": z, "moments": moments, "batch": batch, "tiles": tiles, "ERF": erf},
        **layer_constants(first["folded"], tile),
    }
    return Launch(layer, (batch * tiles,), arguments, tile.options())


def layer_constants(folded: Tensor, tile: Tile) -> dict[str, int]:
    h, c = folded.shape
    return {"C": c, "H": h, "TOKENS": tile.tokens, "BLOCK_C": tile.channels, "BLOCK_H": power_of_two(h)}


def reader(source: Tensor, table: Tensor | None, valid: Tensor | None, index: int, eps: float) -> dict[str, Any]:
    """Arguments by which kernels read the tokens of source `index`, some of its batch rows or all, in tiles."""
    return {
        **{"x": source, "x_batch": source.stride(0), "x_row": source.stride(1), "table": table, "n": source.shape[1]},
        **{"valid": None if valid is None else valid[:, index], "sources": 0 if valid is None else valid.stride(0)},
        "eps": eps,
    }


def chunks(source: Tensor, h: int) -> list[slice]:
    """Batch rows whose hidden units, 4 bytes each, fit the workspace together."""
    rows = max(1, WORKSPACE // (4 * h * max(1, source.shape[1])))
    return [slice(b, b + rows) for b in range(0, source.shape[0], rows)]


def most_tokens(sources: list[Tensor], h: int) -> int:
    """Of any chunk of any source.  Launches are all made before the first runs, so chunks that had buffers of their own
    would hold them all at once; in one stream they can use the same ones after another."""
    return max((source[rows].shape[:2].numel() for source in sources for rows in chunks(source, h)[:1]), default=0)


@triton.jit
def fold(norm_weight, norm_bias, w1, b1, folded, u, v, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """One row of w1 (h, C).  u sums what `folded` holds after rounding, since that is what multiplies."""
    unit, channel = tl.program_id(0), tl.arange(0, BLOCK_C)
    inside = channel < C
    row = tl.load(w1 + unit * C + channel, mask=inside, other=0.0).to(tl.float32)
    scaled = row * tl.load(norm_weight + channel, mask=inside, other=0.0).to(tl.float32)
    scaled = scaled.to(folded.dtype.element_ty)
    tl.store(folded + unit * C + channel, scaled, mask=inside)
    bias = tl.load(norm_bias + channel, mask=inside, other=0.0).to(tl.float32)
    tl.store(u + unit, tl.sum(scaled.to(tl.float32), 0))
    tl.store(v + unit, tl.sum(row * bias, 0) + tl.load(b1 + unit).to(tl.float32))


@triton.jit
def count_of(valid, sources, b, n):
    """How many leading tokens of batch row b count."""
    # No early return: what follows one is compiled all the same, and there is nothing to load where all tokens count.
    return n if valid is None else tl.minimum(tl.maximum(tl.load(valid + b * sources), 0), n).to(tl.int32)


@triton.jit
def load_tokens(x, x_row, table, token, stop, first, C: tl.constexpr, BLOCK_C: tl.constexpr):  # -> (TOKENS, BLOCK_C)
    """source + position of channels first .. first+BLOCK_C-1, rounded as the sum of two tensors is; 0 from token `stop`
    and channel C on, which are not read."""
    channel = first + tl.arange(0, BLOCK_C)
    mask = (token < stop)[:, None]
    if C % BLOCK_C:
        mask = mask & (channel < C)[None, :]
    at = token.to(tl.int64)[:, None]
    tile = tl.load(x + at * x_row + channel[None, :], mask=mask, other=0.0)
    if table is not None:
        position = tl.load(table + at * C + channel[None, :], mask=mask, other=0.0)
        tile = (tile.to(tl.float32) + position.to(tl.float32)).to(tile.dtype)
    return tile


@triton.jit
def first_layer(
    x,
    x_row,
    table,
    token,
    stop,
    folded,
    u,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(folded x - u mean)^T (BLOCK_H, TOKENS), of which z^T is rstd times this plus v, with the mean and rstd of the
    tokens (TOKENS)."""
    unit = tl.arange(0, BLOCK_H)
    head = load_tokens(x, x_row, table, token, stop, 0, C, BLOCK_C).to(tl.float32)
    shift = tl.sum(head, 1) / min(C, BLOCK_C)
    total = tl.zeros([TOKENS], tl.float32)
    square = tl.zeros([TOKENS], tl.float32)
    acc = tl.zeros([BLOCK_H, TOKENS], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        tile = load_tokens(x, x_row, table, token, stop, first, C, BLOCK_C)
        centred = tile.to(tl.float32) - shift[:, None]
        if C % BLOCK_C:
            centred = tl.where((channel < C)[None, :], centred, 0.0)
        total += tl.sum(centred, 1)
        square += tl.sum(centred * centred, 1)
        rows = load_matrix(folded, unit, channel, H, C, BLOCK_H, BLOCK_C)  # (BLOCK_H, BLOCK_C)
        if tile.dtype == tl.float32:
            tile = centred
        acc = add_product(acc, rows, tl.trans(tile))
    drift = total / C
    rstd = tl.rsqrt(tl.maximum(square / C - drift * drift, 0.0) + eps)
    mean = shift + drift
    left = drift if x.dtype.element_ty == tl.float32 else mean  # of the mean, in acc
    sums = load_vector(u, unit, H, BLOCK_H)
    return tl.fma(-sums[:, None], left[None, :], acc), mean, rstd


@triton.jit
def gelu(z, ERF: tl.constexpr):
    if ERF:
        return z * (0.5 + 0.5 * tl.erf(z * 0.7071067811865476))
    return z * share_of(z)


@triton.jit
def gelu_slope(z, ERF: tl.constexpr):
    if ERF:
        density = tl.exp2(z * z * HALF_LOG2E) * 0.3989422804014327
        return 0.5 + 0.5 * tl.erf(z * 0.7071067811865476) + z * density
    share = share_of(z)
    return share + z * share * (1 - share) * (1.5957691216057308 + z * z * 0.2140644488)


@triton.jit(do_not_specialize=LENGTHS)
def layer(
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
    z,
    moments,
    batch,
    tiles,
    ERF: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One tile of tokens of one batch row: its rows of z (B, n, H)."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    token = (tl.program_id(0) % tiles) * TOKENS + tl.arange(0, TOKENS)
    stop = count_of(valid, sources, b, n)
    way, mean, rstd = first_layer(
        x + b * x_batch, x_row, table, token, stop, folded, u, eps, C, H, TOKENS, BLOCK_C, BLOCK_H
    )
    unit, row = tl.arange(0, BLOCK_H), b * n + token
    if moments is None:
        way = gelu(tl.fma(way, rstd[None, :], load_vector(v, unit, H, BLOCK_H)[:, None]), ERF)
    else:
        tl.store(moments + row, mean, mask=token < n)
        tl.store(moments + batch.to(tl.int64) * n + row, rstd, mask=token < n)
    mask = (token < n)[None, :] & (unit < H)[:, None]
    tl.store(z + row[None, :] * H + unit[:, None], way.to(z.dtype.element_ty), mask=mask)
