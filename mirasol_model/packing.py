"""Snippets whose tokens differ in number, laid end to end: what is absent is packed away, never masked.

All of this is host arithmetic on counts the caller knows; a device only ever receives finished indices. `lengths` is
(B, T), the tokens of each snippet, as NumPy integers. Tokens are either **dense**, (B, T*n, ...), every snippet n long,
or **packed**, (1, total, ...), row after row, snippet after snippet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from mirasol_kernels import SnippetLayout

Counts = np.ndarray | None  # (B, T): leading tokens of each snippet that are real; None is all


def to_index(index: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)).to(like.device, non_blocking=True)


def merge_sources(sources: Sequence[Tensor], counts: Sequence[Counts]) -> tuple[Tensor, np.ndarray, bool]:
    """Sources (B, T, n_i, d), one after the other within each snippet -> tokens, lengths (B, T), whether dense."""
    rows, snippets = sources[0].shape[:2]
    sizes = [source.shape[2] for source in sources]
    real = [
        np.full((rows, snippets), n) if count is None else np.clip(count, 0, n)
        for n, count in zip(sizes, counts, strict=True)
    ]
    lengths = np.sum(real, axis=0)
    # The copy is under 1 % of a Combiner's forward pass and 0.2 % of its training step: not worth avoiding (NOTES.md).
    x = torch.cat(tuple(sources), dim=2) if len(sources) > 1 else sources[0]  # (B, T, n, d)
    if (lengths == sum(sizes)).all():
        return x.flatten(1, 2), lengths, True
    kept = np.concatenate([np.arange(n) < count[..., None] for n, count in zip(sizes, real, strict=True)], axis=2)
    return x.flatten(0, 2)[to_index(np.flatnonzero(kept), x)][None], lengths, False


def last_tokens(lengths: np.ndarray, asking: np.ndarray, dense: bool) -> Callable[[Tensor], Tensor]:
    """The function that keeps the last `asking` (B, T) tokens of every snippet."""
    if (asking == lengths).all():
        return lambda x: x
    if dense:
        snippets, n, m = lengths.shape[1], int(lengths[0, 0]), int(asking[0, 0])
        return lambda x: x.unflatten(1, (snippets, n))[:, :, n - m :].flatten(1, 2)  # (B, T*m, ...)
    ends, flat = np.cumsum(lengths), asking.reshape(-1)
    index = np.repeat(ends - np.cumsum(flat), flat) + np.arange(flat.sum())
    return lambda x: x[:, to_index(index, x)]


def look_back(past: np.ndarray, own: np.ndarray, asking: np.ndarray, window: int | None, dense: bool) -> SnippetLayout:
    """The last `asking` (B, T) tokens of each snippet see their own snippet and the earlier ones, `past` (B, P) first.

    window: how many snippets, the own one included; None is all.
    """
    upto = past.shape[1] + 1 + np.arange(own.shape[1])
    first = None if window is None else np.maximum(upto - window, 0)
    rows = 1 if dense else len(own)  # dense rows are all alike
    layouts = [SnippetLayout.cross(asking[b], np.concatenate([past[b], own[b]]), upto, first) for b in range(rows)]
    return layouts[0] if rows == 1 else SnippetLayout.packed(layouts)


def row_order(pieces: Sequence[np.ndarray]) -> np.ndarray | None:
    """Packed pieces, (B, T_i) lengths each, lie one after the other: the order that puts all of a row together.

    None if that is how they lie.
    """
    if len(pieces[0]) == 1 or len(pieces) == 1:
        return None
    row = np.concatenate([np.repeat(np.arange(len(piece)), piece.sum(axis=1)) for piece in pieces])
    return np.argsort(row, kind="stable")


def join(pieces: Sequence[Tensor], order: np.ndarray | None) -> Tensor:
    """Packed pieces (1, total_i, ...) in one sequence, in `row_order`."""
    joined = torch.cat(tuple(pieces), dim=1)
    return joined if order is None else joined[:, to_index(order, joined)]
