"""SnippetLayout: who sees whom.

Everything derives from one fact: each query row sees a few contiguous key ranges, at most four.  They are stored once
per group of equal rows, so a layout of T snippets is a table of T lines; no mask, no padding, no compile step.

On the host a layout is `_ranges.Lines` per batch row, in NumPy: lines of query rows, each with its key ranges.  Seen
from the keys it is `Lines` again (`transpose`), which is what backward needs.  Ops get both as the int32 tensors of
`LayoutTables`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirasol_kernels import _from_mask, _ranges
from mirasol_kernels._from_mask import MaskMod
from mirasol_kernels._ranges import Lines, offsets_of, read_int, read_integers, read_lengths, read_slices

Ints = Sequence[int] | np.ndarray | Tensor
Ranges = Sequence[tuple[int, int]] | np.ndarray | Tensor


class LayoutTables(NamedTuple):
    """What kernels read: contiguous int32 tensors on one device.  Bt is 1 (every batch row is alike) or B.

    Forward: group g is query rows [q_offsets[b, g], q_offsets[b, g+1]), and all of them see the keys of
    k_ranges[b, g, r] = [begin, end) for r < R: sorted, disjoint, never touching; unused ones last, begin = end = Nk.
    Backward: segment s is keys [k_offsets[b, s], k_offsets[b, s+1]), and all of them are seen by the query rows of
    q_ranges[b, e] for q_index[b, s] <= e < q_index[b, s+1]: sorted, disjoint, never touching.

    Rows of a batch with fewer lines than others are padded with empty ones; and there is always an empty group and an
    unused row range at the end, since torch.compile takes a size of 1 for a constant and would compile again for 2.
    R belongs to the kind of layout where it can (block-causal 1, with window and sink 2), not to its numbers.
    """

    q_offsets: Tensor  # (Bt, G+1)
    k_ranges: Tensor  # (Bt, G, R, 2)
    k_offsets: Tensor  # (Bt, S+1)
    q_index: Tensor  # (Bt, S+1)
    q_ranges: Tensor  # (Bt, E, 2)


def visible(q_offsets: Tensor, k_ranges: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """Whether query row i sees key j, for any `rows` (q,) and `keys` (k,), from the forward half of `LayoutTables`.

    Returns bool (Bt, q, k).  Traceable; this is the meaning of the tables.
    """
    rows = rows.to(q_offsets.dtype).expand(q_offsets.shape[0], -1).contiguous()
    group = torch.searchsorted(q_offsets[:, 1:].contiguous(), rows, right=True)  # (Bt, q); right skips empty groups
    # gather, because take_along_dim makes a compiled graph depend on the number of groups
    ranges = k_ranges.gather(1, group[:, :, None, None].expand(-1, -1, *k_ranges.shape[2:]))  # (Bt, q, R, 2)
    begin, end = ranges[..., 0, None], ranges[..., 1, None]  # (Bt, q, R, 1)
    return ((begin <= keys) & (keys < end)).any(2)


class SnippetLayout:
    """Which query rows see which keys.  Immutable, hashable, equal when it means the same; built by its constructors.

    q_len, k_len: tokens of the queries and of the keys.  batch: None where every batch row is alike and any number of
    them will do, else their number.  Build layouts outside a compiled region and pass them in: a compiled function
    does not depend on their numbers.
    """

    q_len: int
    k_len: int
    batch: Any  # on a layout None or int; on the class the constructor
    _rows: tuple[Lines, ...]  # one, or one per batch row; query rows -> key ranges
    _tables: LayoutTables  # on the CPU
    _devices: dict[torch.device, LayoutTables]  # copies elsewhere, made at first use
    _kind: str

    def __init__(
        self, kind: str, rows: Sequence[Lines], k_len: int, batch: int | None = None, *, ranges: int = 1
    ) -> None:
        """For the constructors: `rows` canonical and of one number of queries; room for `ranges` ranges or more."""
        q_len = int(rows[0].offsets[-1])
        self.__dict__.update(q_len=q_len, k_len=k_len, batch=batch, _rows=tuple(rows), _kind=kind, _devices={})
        # Kept, so neither an inference tensor, which no backward could save, nor a fake one of a mode that will end.
        with torch.inference_mode(False), torch._C._DisableTorchDispatch():
            tables = [torch.from_numpy(table) for table in _ranges.tabulate(self._rows, k_len, ranges)]
        self.__dict__["_tables"] = LayoutTables(*tables)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"SnippetLayout is immutable: {name} cannot be set")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"SnippetLayout is immutable: {name} cannot be deleted")

    # ---------------------------------------------------------------- constructors

    @classmethod
    def uniform(
        cls,
        snippets: int,
        tokens: int,
        *,
        q_tokens: int | None = None,
        window: int | None = None,
        sink: int = 0,
    ) -> SnippetLayout:
        """Block-causal: `snippets` snippets of `tokens` tokens, a token sees its own snippet and the earlier ones.

        window: of these only the last `window` snippets, its own counted (1 is the own snippet alone); None is all.
        sink: and the first `sink` snippets whatever the window, as far as they are not in the future.
        q_tokens: only the last q_tokens of each snippet ask, so Nq = snippets * q_tokens; None is all.
        Cached: the same numbers give the same object.
        """
        where = "SnippetLayout.uniform"
        snippets = read_int(f"{where}: snippets", snippets)
        tokens = read_int(f"{where}: tokens", tokens)
        q_tokens = tokens if q_tokens is None else read_int(f"{where}: q_tokens", q_tokens)
        if q_tokens > tokens:
            raise ValueError(f"{where}: q_tokens: expected at most tokens = {tokens}, got {q_tokens}")
        return _uniform(snippets, tokens, q_tokens, *_window(where, window, sink))

    @classmethod
    def ragged(
        cls, k_lengths: Ints, q_lengths: Ints | None = None, *, window: int | None = None, sink: int = 0
    ) -> SnippetLayout:
        """Block-causal over snippets of any lengths (T,), zero included; window and sink as in `uniform`.

        q_lengths (T,): how many queries ask on behalf of each snippet; None is one per token.
        """
        where = "SnippetLayout.ragged"
        keys = read_lengths(f"{where}: k_lengths", k_lengths)
        queries = keys if q_lengths is None else read_lengths(f"{where}: q_lengths", q_lengths)
        if len(queries) != len(keys):
            raise ValueError(f"{where}: q_lengths: expected {len(keys)} like k_lengths, got {len(queries)}")
        return _block_causal(f"ragged {len(keys)} snippets", queries, keys, *_window(where, window, sink))

    @classmethod
    def teacher_forcing(cls, lengths: Ints, *, window: int | None = None, sink: int = 0) -> SnippetLayout:
        """The sequence [clean | noisy], each all snippets of `lengths` (T,); queries and keys are both of them.

        Clean is block-causal as in `ragged`.  Noisy snippet t sees itself, and of the strictly earlier clean ones those
        that clean snippet t sees: t counts in its window, so window=1 leaves it itself and the sinks.
        """
        where = "SnippetLayout.teacher_forcing"
        sizes = read_lengths(f"{where}: lengths", lengths)
        ends, own, tokens = offsets_of(sizes), np.arange(len(sizes)), int(sizes.sum())
        k_len = read_int(f"{where}: tokens of [clean | noisy]", 2 * tokens)
        limits = _window(where, window, sink)
        first, sunk = _ranges.seen_snippets(len(sizes), *limits)
        none = np.zeros_like(own)
        rows = _ranges.from_columns(
            np.append(sizes, sizes),
            k_len,
            (0, ends[np.append(sunk, np.minimum(sunk, own))]),
            (ends[np.append(first, first)], ends[np.append(own + 1, own)]),
            (np.append(none, tokens + ends[:-1]), np.append(none, tokens + ends[1:])),  # noisy itself
        )
        kind = f"teacher forcing {len(sizes)} snippets" + _limits(*limits)
        return cls(kind, [rows], k_len, ranges=3 if window is not None and sink else 2)

    @classmethod
    def from_block_ids(
        cls,
        ids: Ints | Sequence[Sequence[int]],
        *,
        valid: Any = None,
        queries: int | tuple[int, int] | None = None,
        window_tokens: int | None = None,
    ) -> SnippetLayout:
        """Token i sees token j iff (j <= i, and i - j < window_tokens) or both are of one block; and j is valid.

        The mask of Hugging Face's `block_sequence_ids` (huggingface/transformers, masking_utils.py): its block part is
        not cut by the window (Gemma 3 and 4 cut it: `from_mask_mod`), and its padding hides keys only.  A padding token
        as a query sees what its place sees.

        ids: (N,) or (B, N) integers, one per key.  Equal ids are one block; a negative id is in none (text).
        valid: like ids, bool or 0/1 (an `attention_mask`); False for padding on either side.
        queries: only the last `queries` tokens ask (decoding with a cache), or a pair: tokens [begin, end) ask.
        """
        where = "SnippetLayout.from_block_ids"
        blocks = read_integers(f"{where}: ids", ids, "integers (N,) or (B, N)")
        if blocks.ndim not in (1, 2) or blocks.shape[:-1] == (0,):
            raise ValueError(f"{where}: ids: expected integers (N,) or (B, N), got shape {blocks.shape}")
        blocks = blocks.astype(np.int64)
        allowed = np.ones_like(blocks)
        if valid is not None:
            allowed = read_integers(f"{where}: valid", valid, "bool or 0/1, of the shape of ids", "biu")
            if allowed.shape != blocks.shape or ((allowed != 0) & (allowed != 1)).any():
                raise ValueError(
                    f"{where}: valid: expected bool or 0/1 {blocks.shape} like ids, got {allowed.dtype} {allowed.shape}"
                )
        k_len = read_int(f"{where}: ids: tokens", blocks.shape[-1])
        if isinstance(queries, tuple) and len(queries) == 2:
            begin, end = (read_int(f"{where}: queries", place) for place in queries)
        else:
            begin, end = k_len - (k_len if queries is None else read_int(f"{where}: queries", queries)), k_len
        if not 0 <= begin <= end <= k_len:
            raise ValueError(f"{where}: queries: expected some of the {k_len} tokens of ids, got {queries}")
        window, _ = _window(where, window_tokens, 0, "window_tokens")
        kind = "block ids" + (f", window {window} tokens" if window else "")
        rows = [
            _ranges.at_most_four(where, _ranges.of_blocks(row, keep, begin, end, window))
            for row, keep in zip(np.atleast_2d(blocks), np.atleast_2d(allowed != 0), strict=True)
        ]
        return cls(kind, rows, k_len, len(blocks) if blocks.ndim == 2 else None)

    @classmethod
    def cross(cls, q_lengths: Ints, k_lengths: Ints, upto: Ints, first: Ints | None = None) -> SnippetLayout:
        """Query group i, q_lengths[i] rows, sees the key snippets first[i] .. upto[i]-1; first None is from snippet 0.

        q_lengths, upto, first: (G,).  k_lengths: (S,).  first[i] == upto[i] sees nothing.  Where upto jumps up and down
        among G groups, the table for backward may grow as G * S.
        """
        where = "SnippetLayout.cross"
        queries = read_lengths(f"{where}: q_lengths", q_lengths)
        keys = read_lengths(f"{where}: k_lengths", k_lengths)
        last = read_lengths(f"{where}: upto", upto, total=False)
        start = np.zeros_like(last) if first is None else read_lengths(f"{where}: first", first, total=False)
        for name, values in (("upto", last), ("first", start)):
            if len(values) != len(queries):
                raise ValueError(f"{where}: {name}: expected {len(queries)} like q_lengths, got {len(values)}")
        wrong = np.flatnonzero((start > last) | (last > len(keys)))
        if len(wrong):
            i = wrong[0]
            raise ValueError(
                f"{where}: upto: expected first <= upto <= {len(keys)}, the number of k_lengths, got {start[i]} and"
                f" {last[i]} for query group {i}"
            )
        ends = offsets_of(keys)
        rows = _ranges.from_columns(queries, int(ends[-1]), (ends[start], ends[last]))
        return cls(f"cross {len(queries)} query groups, {len(keys)} key snippets", [rows], int(ends[-1]))

    @classmethod
    def from_ranges(
        cls, q_ranges: Ranges, k_ranges: Ranges, *, q_len: int | None = None, k_len: int | None = None
    ) -> SnippetLayout:
        """The query rows of q_ranges[i] = [begin, end) see the keys of k_ranges[i]; both (S, 2), in any order.

        Slices may overlap and touch: their union counts.  A row that then sees more than four separate ranges is an
        error.  q_len, k_len: by default the largest end.  Rows in no slice see nothing.
        """
        where = "SnippetLayout.from_ranges"
        queries, q_len = read_slices(f"{where}: q_ranges", q_ranges, q_len)
        keys, k_len = read_slices(f"{where}: k_ranges", k_ranges, k_len)
        if len(queries) != len(keys):
            raise ValueError(f"{where}: k_ranges: expected {len(queries)} slices like q_ranges, got {len(keys)}")
        full = (queries[:, 0] < queries[:, 1]) & (keys[:, 0] < keys[:, 1])
        rows = _ranges.from_slices(q_len, queries[full], k_len, keys[full])
        return cls(f"{len(queries)} slices", [_ranges.at_most_four(where, rows)], k_len)

    @classmethod
    def from_mask_mod(
        cls, fn: MaskMod, q_len: int, k_len: int, *, batch: int = 1, device: torch.device | str = "cpu"
    ) -> SnippetLayout:
        """Query row q of batch row b sees key k iff fn(b, h, q, k): a `mask_mod` of FlexAttention, the same for all h.

        Evaluated for every pair, a block of rows at a time, on `device`: where the tensors are that fn reads.  A row
        that sees more than four separate ranges is a ValueError.  Alike for all `batch` rows, it serves any batch.
        """
        where = "SnippetLayout.from_mask_mod"
        q_len, k_len = read_int(f"{where}: q_len", q_len), read_int(f"{where}: k_len", k_len)
        evaluate, batch = _from_mask.vmapped(where, fn), read_int(f"{where}: batch", batch, 1)
        rows = _from_mask.lines_of(where, evaluate, q_len, k_len, batch, device)
        return cls("mask", rows, k_len, len(rows) if len(rows) > 1 else None)

    @classmethod
    def packed(cls, layouts: Sequence[SnippetLayout]) -> SnippetLayout:
        """Several sequences end to end in one, queries and keys alike, none seeing another."""
        where = "SnippetLayout.packed"
        parts = _parts(where, layouts)
        batches = {part.batch for part in parts} - {None}
        if len(batches) > 1:
            raise ValueError(f"{where}: layouts: expected one batch size, got {sorted(batches)}")
        read_int(f"{where}: queries", sum(part.q_len for part in parts))
        k_len = read_int(f"{where}: keys", sum(part.k_len for part in parts))
        starts = offsets_of(np.array([part.k_len for part in parts], np.int64)).tolist()
        batch = batches.pop() if batches else None
        rows = [
            _ranges.concatenate([(part._row(b), start) for part, start in zip(parts, starts, strict=False)], k_len)
            for b in range(max(len(part._rows) for part in parts))
        ]
        return cls("packed " + _kinds(parts), rows, k_len, batch, ranges=_room(parts))

    @classmethod  # type: ignore[no-redef]
    def batch(cls, layouts: Sequence[SnippetLayout]) -> SnippetLayout:
        """One layout per row of the batch (a layout with batch rows of its own brings them all).

        All become as long as the longest: the tokens that a shorter one lacks see nothing and are not seen.
        """
        where = "SnippetLayout.batch"
        parts = _parts(where, layouts)
        q_len, k_len = max(part.q_len for part in parts), max(part.k_len for part in parts)
        rows = [_ranges.extend(row, q_len) for part in parts for row in part._rows]
        return cls("batch of " + _kinds(parts), rows, k_len, len(rows), ranges=_room(parts))

    # ---------------------------------------------------------------- what ops use

    def tables(self, device: torch.device | str = "cpu") -> LayoutTables:
        """The tables on `device`, copied there at first use.  Shared: do not write into them.

        A layout not yet on `device` is copied inside the graph when torch.compile traces this; and its copy would
        break the capture of a CUDA graph.  `to(device)` before avoids both.  Keep the layout as long as a graph.
        """
        if device == "cpu":  # before a torch.device is made: of a small call that is a twentieth
            return self._tables
        if not isinstance(device, torch.device):
            device = torch.device(device)
        if device.type == "cpu":
            return self._tables
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        ready = self._devices.get(device)
        if ready is not None:
            return ready
        if torch.compiler.is_compiling():
            return LayoutTables(*[table.to(device) for table in self._tables])
        with torch.inference_mode(False):
            ready = LayoutTables(*[table.to(device) for table in self._tables])
        if type(ready.q_offsets) is Tensor:  # not a fake one of whoever traces us
            self._devices[device] = ready
        return ready

    def to(self, device: torch.device | str) -> SnippetLayout:
        """Prepares the tables on `device`; returns this layout."""
        self.tables(device)
        return self

    def validate(self, q_len: int, k_len: int, batch: int, *, op: str = "SnippetLayout") -> None:
        """ValueError, in the name of `op`, unless queries, keys and batch of these sizes fit this layout."""
        if q_len != self.q_len:
            raise ValueError(f"{op}: q: expected {self.q_len} tokens as in the layout, got {q_len}")
        if k_len != self.k_len:
            raise ValueError(f"{op}: k: expected {self.k_len} tokens as in the layout, got {k_len}")
        if self.batch is not None and batch != self.batch:
            raise ValueError(f"{op}: q: expected a batch of {self.batch} as in the layout, got {batch}")

    def span(self, q_begin: int, q_end: int) -> tuple[int, int]:
        """The smallest [k_begin, k_end) that covers all keys seen by query rows [q_begin, q_end), in any batch row.

        (0, 0) where they see nothing.  Under torch.compile it is all keys: also a cover, and the same for every layout.
        """
        if torch.compiler.is_compiling():
            return 0, self.k_len
        if not 0 <= q_begin <= q_end <= self.q_len:
            raise ValueError(f"SnippetLayout.span: expected rows within 0 .. {self.q_len}, got {q_begin} .. {q_end}")
        begin, end = self.k_len, 0
        for row in self._rows if q_begin < q_end else ():
            lines = np.searchsorted(row.offsets, [q_begin, q_end - 1], "right")
            seen = row.ranges[row.starts[lines[0] - 1] : row.starts[lines[1]]]
            if len(seen):
                begin, end = min(begin, int(seen[:, 0].min())), max(end, int(seen[:, 1].max()))
        return (begin, end) if begin < end else (0, 0)

    # ---------------------------------------------------------------- for people and tests

    def dense_mask(self, device: torch.device | str = "cpu") -> Tensor:
        """bool (B or 1, Nq, Nk): whether query row i sees key j.  For tests and debugging: it is N x N."""
        tables = self.tables(device)
        rows, keys = (torch.arange(n, device=device, dtype=torch.int32) for n in (self.q_len, self.k_len))
        return visible(tables.q_offsets, tables.k_ranges, rows, keys)

    def picture(self, width: int = 64) -> str:
        """The mask in text, queries down, keys across, in at most `width` columns and half as many lines.

        A cell is one query and one key, or a tile of them: # all seen, + some, . none.  At most four rows of a batch.
        """
        if width < 1:
            raise ValueError(f"SnippetLayout.picture: width: expected at least 1, got {width}")
        lines, cells = [repr(self)], []
        for n, most in ((self.q_len, max(1, width // 2)), (self.k_len, width)):
            cells.append(np.append(np.arange(0, n, max(1, -(-n // most))), n))
        tall, wide = (max(1, int(edges[1:2].sum())) for edges in cells)
        if (tall, wide) != (1, 1):
            lines.append(f"one cell is {tall} x {wide}: # all seen, + some, . none")
        for b, row in enumerate(self._rows[:4]):
            if len(self._rows) > 1:
                lines.append(f"batch row {b}")
            lines += ["".join(line) for line in _ranges.cells(row, *cells)]
        if len(self._rows) > 4:
            lines.append(f"and {len(self._rows) - 4} batch rows more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        pairs = self.q_len * self.k_len * len(self._rows)
        seen = sum(row.seen for row in self._rows)
        batch = "" if self.batch is None else f"batch {self.batch}, "
        return (
            f"SnippetLayout({self._kind}: {batch}{self.q_len} queries x {self.k_len} keys, "
            f"{100 * seen / max(1, pairs):.3g}% seen)"
        )

    def _row(self, b: int) -> Lines:
        return self._rows[b if len(self._rows) > 1 else 0]

    def _meaning(self) -> tuple:
        return (self.q_len, self.k_len, self.batch, *[array.tobytes() for row in self._rows for array in row])

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, SnippetLayout) and self._meaning() == other._meaning())

    def __hash__(self) -> int:
        return hash(self._meaning())

    def __reduce__(self) -> tuple:
        return functools.partial(SnippetLayout, ranges=_room([self])), (self._kind, self._rows, self.k_len, self.batch)


@functools.lru_cache(maxsize=64)
def _uniform(snippets: int, tokens: int, q_tokens: int, window: int | None, sink: int) -> SnippetLayout:
    where = "SnippetLayout.uniform: snippets * tokens"
    read_int(where, snippets * tokens)
    kind = f"uniform {snippets} x {tokens}" + (f", the last {q_tokens} ask" if q_tokens < tokens else "")
    return _block_causal(kind, np.full(snippets, q_tokens), np.full(snippets, tokens), window, sink)


def _block_causal(
    kind: str, q_lengths: np.ndarray, k_lengths: np.ndarray, window: int | None, sink: int
) -> SnippetLayout:
    ends, (first, sunk) = offsets_of(k_lengths), _ranges.seen_snippets(len(k_lengths), window, sink)
    k_len = int(ends[-1])
    rows = _ranges.from_columns(q_lengths, k_len, (0, ends[sunk]), (ends[first], ends[1:]))
    ranges = 2 if window is not None and sink else 1
    return SnippetLayout(kind + _limits(window, sink), [rows], k_len, ranges=ranges)


def _window(where: str, window: Any, sink: Any, name: str = "window") -> tuple[int | None, int]:
    return None if window is None else read_int(f"{where}: {name}", window, 1), read_int(f"{where}: sink", sink)


def _limits(window: int | None, sink: int) -> str:
    return "" if window is None else f", window {window}" + (f", sink {sink}" if sink else "")


def _parts(where: str, layouts: Sequence[SnippetLayout]) -> list[SnippetLayout]:
    parts = list(layouts)
    for part in parts:
        if not isinstance(part, SnippetLayout):
            raise TypeError(f"{where}: layouts: expected SnippetLayouts, got {type(part).__name__}")
    if not parts:
        raise ValueError(f"{where}: layouts: expected at least one, got none")
    return parts


def _room(parts: Sequence[SnippetLayout]) -> int:
    return max(part._tables.k_ranges.shape[2] for part in parts)


def _kinds(parts: Sequence[SnippetLayout]) -> str:
    kinds = list(dict.fromkeys(part._kind for part in parts))
    return f"{len(parts)} ({'; '.join(kinds[:3])}{'; ...' if len(kinds) > 3 else ''})"
