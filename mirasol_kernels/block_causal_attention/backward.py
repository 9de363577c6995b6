"""The backward by hand in PyTorch: what kernels port.  Rectangles instead of masks, one owner per written element.

Every row of a group sees every key of the group's ranges, and every key of a segment is seen by every row of the
segment's ranges.  So a (group, range) or (segment, range) pair is a full rectangle of the score matrix, and no pair
that is not seen is ever computed.  dq walks the table of the rows, dk and dv the transposed one: each sums its own
rectangles in a fixed order, which makes the result reproducible without atomics.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

TILE = 1024  # rows and keys of a rectangle that are worked on at a time


def block_causal_attention_backward(
    dout: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_offsets: Tensor,
    k_ranges: Tensor,
    k_offsets: Tensor,
    q_index: Tensor,
    q_ranges: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of attention whose results got the gradients dout (B, Hq, Nq, Dv) and dlse (B, Hq, Nq).

    P = exp(scale q k^T - lse),  delta = rowsum(dout * out) - dlse,  dS = P * (dout v^T - delta),
    dq = scale dS k,  dk = scale dS^T q,  dv = P^T dout;  lse enters through delta because d lse / dS = P.
    """
    dtype = lse.dtype
    heads = (k.shape[1], q.shape[1] // k.shape[1])  # (Hkv, g): the g query heads of a key head sum into its gradients
    q5, dout5, out5 = (x.to(dtype).unflatten(1, heads) for x in (q, dout, out))  # (B, Hkv, g, Nq, D or Dv)
    k5, v5 = k.to(dtype)[:, :, None], v.to(dtype)[:, :, None]  # (B, Hkv, 1, Nk, D or Dv)
    lse5 = lse.unflatten(1, heads)[..., None]  # (B, Hkv, g, Nq, 1)
    delta = (dout5 * out5).sum(-1, keepdim=True) - dlse.to(dtype).unflatten(1, heads)[..., None]

    def rectangle(b: slice, i: slice, j: slice) -> tuple[Tensor, Tensor]:
        """P and dS of batch rows b, query rows i and keys j: (B, Hkv, g, i, j) each."""
        p = torch.exp(q5[b, :, :, i] @ k5[b, :, :, j].mT * scale - lse5[b, :, :, i])
        return p, p * (dout5[b, :, :, i] @ v5[b, :, :, j].mT - delta[b, :, :, i])

    dq, dk, dv = torch.zeros_like(q5), torch.zeros_like(k5[:, :, 0]), torch.zeros_like(v5[:, :, 0])
    for b, owned, ranges in row_table(q_offsets, k_ranges):
        for i in tiles(*owned):
            for j in (tile for r in ranges for tile in tiles(*r)):
                _, ds = rectangle(b, i, j)
                dq[b, :, :, i] += scale * (ds @ k5[b, :, :, j])
    for b, owned, ranges in key_table(k_offsets, q_index, q_ranges):
        for j in tiles(*owned):
            for i in (tile for r in ranges for tile in tiles(*r)):
                p, ds = rectangle(b, i, j)
                dk[b, :, j] += scale * (ds.mT @ q5[b, :, :, i]).sum(2)
                dv[b, :, j] += (p.mT @ dout5[b, :, :, i]).sum(2)
    return dq.flatten(1, 2).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


Owned = tuple[slice, tuple[int, int], list[list[int]]]


def row_table(q_offsets: Tensor, k_ranges: Tensor) -> Iterator[Owned]:
    """Batch rows, [begin, end) of the rows of a group, and the key ranges they see."""
    for b, (offsets, groups) in enumerate(zip(q_offsets.tolist(), k_ranges.tolist(), strict=True)):
        for begin, end, ranges in zip(offsets, offsets[1:], groups, strict=False):
            yield batch_rows(b, len(q_offsets)), (begin, end), ranges


def key_table(k_offsets: Tensor, q_index: Tensor, q_ranges: Tensor) -> Iterator[Owned]:
    """Batch rows, [begin, end) of the keys of a segment, and the ranges of query rows that see them."""
    for b, (offsets, index, pairs) in enumerate(
        zip(k_offsets.tolist(), q_index.tolist(), q_ranges.tolist(), strict=True)
    ):
        for begin, end, first, last in zip(offsets, offsets[1:], index, index[1:], strict=False):
            yield batch_rows(b, len(k_offsets)), (begin, end), pairs[first:last]


def batch_rows(b: int, tables: int) -> slice:
    return slice(None) if tables == 1 else slice(b, b + 1)


def tiles(begin: int, end: int) -> Iterator[slice]:
    for start in range(begin, end, TILE):
        yield slice(start, min(start + TILE, end))
