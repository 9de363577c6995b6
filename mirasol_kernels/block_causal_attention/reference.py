"""The definition, in blocks of query rows: eager PyTorch, any device and float dtype, differentiable at will."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mirasol_kernels._autocast import without_autocast
from mirasol_kernels.layout import visible

# Scores that may exist at a time, in bytes: past it, rows are taken block by block and recomputed in backward.
BUDGET = 256 << 20

Span = Callable[[int, int], tuple[int, int]]


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T over the seen keys) v, and the logarithm of the softmax's denominator.

    q (B, Hq, n, D), k (B, Hkv, w, D), v (B, Hkv, w, Dv), seen (B or 1, n, w) -> (B, Hq, n, Dv), (B, Hq, n)
    """
    asks, read = seen.any(2)[:, None, :], seen.any(1)[:, None, :, None]  # (Bt, 1, n), (Bt, 1, w, 1)
    # 0 * NaN is NaN: what nobody sees, and rows that see nothing, leave before the products, not after them.
    q, k, v = torch.where(asks[..., None], q * scale, 0), torch.where(read, k, 0), torch.where(read, v, 0)
    grouped = q.unflatten(1, (k.shape[1], -1))  # (B, Hkv, g, n, D)
    scores = grouped.flatten(2, 3) @ k.mT  # (B, Hkv, g*n, w)
    scores = scores.unflatten(2, grouped.shape[2:4]).flatten(1, 2)  # (B, Hq, n, w)
    # A row that sees nothing hides nothing, so that no derivative meets inf - inf; its result is dropped below.
    scores = scores.masked_fill(~seen[:, None] & asks[..., None], -torch.inf)
    weights = scores.softmax(3).unflatten(1, grouped.shape[1:3]).flatten(2, 3)  # (B, Hkv, g*n, w)
    out = (weights @ v).unflatten(2, grouped.shape[2:4]).flatten(1, 2)  # (B, Hq, n, Dv)
    return torch.where(asks[..., None], out, 0), torch.where(asks, scores.logsumexp(3), -torch.inf)


def block_causal_attention(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_ranges: Tensor, scale: float, span: Span | None = None
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, Nq, Dv) in q's dtype and lse (B, Hq, Nq) float32 (float64 for float64).

    q (B, Hq, Nq, D), k (B, Hkv, Nk, D), v (B, Hkv, Nk, Dv); q_offsets and k_ranges as in `LayoutTables`.  Half
    precision is widened to float32, so that the dtype's only rounding is that of the result.
    span(begin, end): a range of keys that holds all that rows begin .. end-1 see; the others are never touched.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_k, wide_v = q.to(dtype), k.to(dtype), v.to(dtype)
    rows, keys = q.shape[2], k.shape[2]
    # A power of two, so that a compiled graph is guarded by an inequality and not by the number of blocks.
    blocks, size = 1, q.shape[0] * q.shape[1] * rows * keys * dtype.itemsize
    while size > blocks * BUDGET and blocks < rows:
        blocks *= 2

    def block(q: Tensor, k: Tensor, v: Tensor, i: int, j: int) -> tuple[Tensor, Tensor]:  # rows i .. j-1
        a, b = span(i, j) if span else (0, keys)
        asking, read = torch.arange(i, j, device=q.device), torch.arange(a, b, device=q.device)
        seen = visible(q_offsets, k_ranges, asking, read)  # (B or 1, j-i, b-a)
        with without_autocast(q.device.type):
            return _attend(q[:, :, i:j], k[:, :, a:b], v[:, :, a:b], seen, scale)

    if blocks == 1:
        out, lse = block(wide_q, wide_k, wide_v, 0, rows)
        return out.to(q.dtype), lse
    edges = [rows * n // blocks for n in range(blocks + 1)]
    parts = [
        checkpoint(block, wide_q, wide_k, wide_v, i, j, use_reentrant=False, preserve_rng_state=False)
        for i, j in itertools.pairwise(edges)
    ]
    return torch.cat([out.to(q.dtype) for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
