"""Schemas, fakes, autograd and backends: what is the same whichever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirasol_kernels._dispatch import Op

FWD = "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_ranges, float scale) -> (Tensor, Tensor)"
BWD = (
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor q_offsets, "
    "Tensor k_ranges, Tensor k_offsets, Tensor q_index, Tensor q_ranges, float scale) -> (Tensor, Tensor, Tensor)"
)


def _fake_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_ranges: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=torch.promote_types(q.dtype, torch.float32))
    if q.stride(1) < q.stride(2):  # a view of (B, N, H, D): the result is one too
        return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2), lse
    return q.new_empty(batch, heads, rows, v.shape[3]), lse


def _fake_bwd(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


OP = Op("block_causal_attention", cases=f"{__package__}.cases", fwd=(FWD, _fake_fwd), bwd=(BWD, _fake_bwd))


def _float32(q: Tensor, *_: Any) -> str | None:
    return None if q.dtype == torch.float32 else "float32 only"


OP.backend("native", "cpu", _float32)


class Fused(torch.autograd.Function):
    """q, k and v with unit stride in the last dimension, the five tables of `LayoutTables`, scale, name of the backend."""

    @staticmethod
    def forward(ctx, q, k, v, q_offsets, k_ranges, k_offsets, q_index, q_ranges, scale, backend):
        out, lse = calls(backend)["fwd"](q, k, v, q_offsets, k_ranges, scale)
        ctx.save_for_backward(q, k, v, out, lse, q_offsets, k_ranges, k_offsets, q_index, q_ranges)
        ctx.scale, ctx.backend = scale, backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        # A gradient may come with any strides: that of a sum is one number, expanded.
        dout = dout if dout.stride(3) == 1 else dout.contiguous()
        grads = calls(ctx.backend)["bwd"](dout, dlse.contiguous(), *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None, None, None, None, None


def calls(backend: str) -> dict[str, Any]:
    return next(b.calls for b in OP.backends if b.name == backend)
