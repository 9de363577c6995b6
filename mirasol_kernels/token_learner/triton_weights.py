"""Gradients that are sums over all tokens: programs keep slices of partial sums, which are added in a fixed order.

Of the first layer and the norm all follow from S = sum dz^T xhat (h, c) and r = sum dz (h):

    dw1 = S norm_weight + r norm_bias     db1 = r     dnorm_weight = sum_h S w1     dnorm_bias = sum_h r w1
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import Launch, Machine, add_product, load_matrix, power_of_two
from mirasol_kernels.token_learner.triton_config import tile_of
from mirasol_kernels.token_learner.triton_layer import (
    LENGTHS,
    count_of,
    layer_constants,
    load_tokens,
)

ADDED = 512  # elements that a program of `add_slices` or `add_rows` owns
FINISHED_CHANNELS = 32  # that a program of `finish` owns


class WeightSums:
    """Slices of partial sums, as many as programs run at a time, and the kernels that fill and add them."""

    def __init__(self, w1: Tensor, w2: Tensor, tiles: int, machine: Machine) -> None:
        (h, c), k = w1.shape, w2.shape[0]
        self.machine, self.tile = machine, tile_of("weights", h, w1.dtype, machine)
        self.blocks = triton.cdiv(c, self.tile.channels)

        def zeros(programs: int, *shape: int) -> Tensor:
            return torch.zeros(max(1, min(tiles, programs)), *shape, dtype=torch.float32, device=w1.device)

        self.second = zeros(2 * machine.processors, k * h + k)  # dw2 and db2
        self.first = zeros(2 * machine.processors // self.blocks, h * c + h)  # S and r
        self.w1 = w1

    def weights_launch(self, read: dict[str, Any], moments: Tensor, dz: Tensor) -> Launch:
        batch, n, _ = dz.shape
        tiles = triton.cdiv(n, self.tile.tokens)
        arguments = {
            **read,
            **{"moments": moments, "dz": dz, "first_sums": self.first, "batch": batch, "tiles": tiles},
            **layer_constants(self.w1, self.tile),
        }
        return Launch(weights, (self.blocks, min(batch * tiles, len(self.first))), arguments, self.tile.options())

    def finish_launches(
        self,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        dnorm_weight: Tensor,
        dnorm_bias: Tensor,
        dw1: Tensor,
        db1: Tensor,
        dw2: Tensor,
        db2: Tensor,
        *,
        divide: bool,
    ) -> list[Launch]:
        h, c = w1.shape
        arguments = {
            **{"first_sums": self.first, "norm_weight": norm_weight, "norm_bias": norm_bias, "w1": w1},
            **{"dnorm_weight": dnorm_weight, "dnorm_bias": dnorm_bias, "dw1": dw1, "db1": db1},
            **{"count": len(self.first), "C": c, "H": h},
            **{"BLOCK_C": FINISHED_CHANNELS, "BLOCK_H": power_of_two(h)},
        }
        dw2_sums, db2_sums = self.second.split([dw2.numel(), db2.numel()], 1)
        done = [
            Launch(finish, (triton.cdiv(c, FINISHED_CHANNELS),), arguments, {"num_warps": 4}),
            added(dw2_sums, dw2),
        ]
        if divide:
            db2.zero_()  # softmax does not change if all logits of a learned token move together: not even a rounding
        else:
            done.append(added(db2_sums, db2))
        return done


def added(slices: Tensor, result: Tensor) -> Launch:
    """Fills result with the sum of slices (count, result.numel()), first to last."""
    arguments = {
        **{"slices": slices, "result": result, "count": slices.shape[0], "stride": slices.stride(0)},
        **{"size": result.numel(), "BLOCK": ADDED},
    }
    return Launch(add_slices, (triton.cdiv(result.numel(), ADDED),), arguments, {"num_warps": 4})


def position_launch(dx: Tensor, dtable: Tensor) -> Launch:
    """Every batch row's tokens had the same positions: dtable (n, c) = sum over the batch of dx (B, n, c)."""
    return added(dx.flatten(1), dtable)


@triton.jit(do_not_specialize=["count", "size"])
def add_slices(slices, result, count, stride, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    acc = tl.zeros([BLOCK], tl.float32)
    slices += at
    for _ in range(count):
        acc += tl.load(slices, mask=inside, other=0.0).to(tl.float32)
        slices += stride
    tl.store(result + at, acc.to(result.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=LENGTHS)
def weights(
    x,
    x_batch,
    x_row,
    table,
    n,
    valid,
    sources,
    eps,
    moments,
    dz,
    first_sums,
    batch,
    tiles,
    C: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Every so-many-th tile of tokens, a block of channels: adds dz^T xhat (H, BLOCK_C), and dz (H), to a slice."""
    unit = tl.arange(0, BLOCK_H)
    first = tl.program_id(0) * BLOCK_C
    channel = first + tl.arange(0, BLOCK_C)
    first_sums += tl.program_id(1).to(tl.int64) * (H * C + H)
    at = first_sums + unit[:, None] * C + channel[None, :]
    mask = (unit < H)[:, None] & (channel < C)[None, :]
    acc = tl.load(at, mask=mask, other=0.0)
    bias = tl.load(first_sums + H * C + unit, mask=unit < H, other=0.0)
    for index in range(tl.program_id(1), batch * tiles, tl.num_programs(1)):
        b = (index // tiles).to(tl.int64)
        token = (index % tiles) * TOKENS + tl.arange(0, TOKENS)
        stop = count_of(valid, sources, b, n)
        row, live = b * n + token, token < stop
        lines = tl.load(dz + row[:, None] * H + unit[None, :], mask=live[:, None] & (unit < H)[None, :], other=0.0)
        mean = tl.load(moments + row, mask=live, other=0.0)
        rstd = tl.load(moments + batch.to(tl.int64) * n + row, mask=live, other=0.0)
        tile = load_tokens(x + b * x_batch, x_row, table, token, stop, first, C, BLOCK_C)
        xhat = ((tile.to(tl.float32) - mean[:, None]) * rstd[:, None]).to(tile.dtype)
        acc = add_product(acc, tl.trans(lines), xhat)
        bias += tl.sum(lines.to(tl.float32), 0)
    tl.store(at, acc, mask=mask)
    if first == 0:
        tl.store(first_sums + H * C + unit, bias, mask=unit < H)


@triton.jit(do_not_specialize=["count"])
def finish(
    first_sums,
    norm_weight,
    norm_bias,
    w1,
    dnorm_weight,
    dnorm_bias,
    dw1,
    db1,
    count,
    C: tl.constexpr,
    H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """A block of channels: adds the slices (count, H C + H), first to last, and writes what follows from them."""
    unit = tl.arange(0, BLOCK_H)
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (unit < H)[:, None] & (channel < C)[None, :]
    s = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    r = tl.zeros([BLOCK_H], tl.float32)
    for _ in range(count):
        s += tl.load(first_sums + unit[:, None] * C + channel[None, :], mask=mask, other=0.0)
        r += tl.load(first_sums + H * C + unit, mask=unit < H, other=0.0)
        first_sums += H * C + H
    weight = tl.load(norm_weight + channel, mask=channel < C, other=0.0).to(tl.float32)
    bias = tl.load(norm_bias + channel, mask=channel < C, other=0.0).to(tl.float32)
    first = load_matrix(w1, unit, channel, H, C, BLOCK_H, BLOCK_C).to(tl.float32)
    result = dw1.dtype.element_ty
    into = dw1 + unit[:, None] * C + channel[None, :]
    tl.store(into, (s * weight[None, :] + r[:, None] * bias[None, :]).to(result), mask=mask)
    tl.store(dnorm_weight + channel, tl.sum(s * first, 0).to(result), mask=channel < C)
    tl.store(dnorm_bias + channel, tl.sum(r[:, None] * first, 0).to(result), mask=channel < C)
    if tl.program_id(0) == 0:
        tl.store(db1 + unit, r.to(result), mask=unit < H)
