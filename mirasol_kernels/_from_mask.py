"""Lines of key ranges from a mask function, evaluated over blocks of query rows: the whole mask never exists."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from mirasol_kernels import _ranges
from mirasol_kernels._ranges import Lines

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Of b (B,), h (2,), q (R,) and k (Nk,), int32.  Gives (B, 2, R, Nk); 1 or expanded where nothing depends on it.
Evaluate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

PAIRS = 2**21  # of a row and a key, evaluated at once: tens of MB on the way, and enough that a call's cost is hidden


def vmapped(where: str, fn: MaskMod) -> Evaluate:
    """fn of 0-dimensional indices, as FlexAttention defines it, over (b, h, q, k)."""
    # `table[q]` with a mapped index; what FlexAttention wraps its own calls in, and has no public name
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    if not callable(fn):
        raise TypeError(f"{where}: fn: expected a function of (b, h, q, k), got {type(fn).__name__}")
    for places in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
        fn = torch.vmap(fn, in_dims=places)

    def evaluate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        with TransformGetItemToIndex():
            return fn(b, h, q, k)

    return evaluate


def broadcast(fn: MaskMod) -> Evaluate:
    """fn of indices that broadcast against each other: cheaper than vmap, for functions known to allow it."""

    def evaluate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return fn(b.view(-1, 1, 1, 1), h[:1].view(1, 1, 1, 1), q.view(1, 1, -1, 1), k.view(1, 1, 1, -1))

    return evaluate


def lines_of(
    where: str, evaluate: Evaluate, q_len: int, k_len: int, batch: int = 1, device: torch.device | str = "cpu"
) -> list[Lines]:
    """Who sees whom: one `Lines`, or one per batch row where these differ.

    Refuses a mask that is not bool or depends on the head, and the first row that sees more than four ranges.
    """
    b, h, k = (torch.arange(n, dtype=torch.int32, device=device) for n in (batch, 2, k_len))
    step = max(1, PAIRS // max(1, batch * k_len))
    parts: list[list[Lines]] = []  # of each block of rows
    for begin in range(0, q_len, step) if k_len else ():
        q = torch.arange(begin, min(begin + step, q_len), dtype=torch.int32, device=device)
        mask = evaluate(b, h, q, k)
        if mask.dtype != torch.bool:
            raise TypeError(f"{where}: fn: expected a mask function that gives bool, got {mask.dtype}")
        if mask.shape[1] > 1 and mask.stride(1):  # a dimension that nothing depends on is expanded
            raise ValueError(f"{where}: fn: expected a mask that is the same for every head, got one that is not")
        mask = mask[: 1 if mask.stride(0) == 0 else batch, 0].expand(-1, len(q), k_len)  # (1 or B, R, Nk)
        names = [where] if len(mask) == 1 else [f"{where}: batch row {i}" for i in range(batch)]
        parts.append([_ranges.at_most_four(*named, begin) for named in zip(names, _lines(mask), strict=True)])
    if not parts:
        return [Lines(np.unique([0, q_len]), np.zeros(1 + (q_len > 0), np.int64), np.zeros((0, 2), np.int64))]
    rows = parts[0]
    if len(parts) > 1:
        rows = [
            _ranges.concatenate([(part[b if len(part) > 1 else 0], 0) for part in parts], k_len)
            for b in range(max(map(len, parts)))
        ]
    alike = all(np.array_equal(a, b) for row in rows[1:] for a, b in zip(row, rows[0], strict=True))
    return rows[:1] if alike else rows


def _lines(mask: Tensor) -> list[Lines]:
    """Of a block of rows of the mask, bool (B, R, Nk): the lines of each batch row."""
    batch, rows, keys = mask.shape
    changes = mask.new_empty(batch, rows, keys + 1)  # at the first key of a range, and at the first behind it
    changes[..., 0], changes[..., -1] = mask[..., 0], mask[..., -1]
    torch.ne(mask[..., 1:], mask[..., :-1], out=changes[..., 1:-1])
    # NumPy's search is twice as fast as torch's; from another device come only the places
    at = np.flatnonzero(changes.numpy()) if mask.is_cpu else changes.flatten().nonzero()[:, 0].cpu().numpy()
    line, place = np.divmod(at, keys + 1)
    line, ranges = line[::2], place.reshape(-1, 2)
    cuts = np.searchsorted(line, np.arange(batch + 1) * rows)
    offsets = np.arange(rows + 1)
    return [
        _ranges.merged(offsets, line[cuts[b] : cuts[b + 1]] - b * rows, ranges[cuts[b] : cuts[b + 1]])
        for b in range(batch)
    ]
