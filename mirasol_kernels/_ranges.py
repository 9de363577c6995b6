"""Lines and ranges: how `SnippetLayout` computes who sees whom, in NumPy, without ever forming a mask.

Everything is int64 here.  Lengths are checked to fit in int32, so that line * length cannot overflow.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

MAX_RANGES = 4
INT32_MAX = 2**31 - 1


class Lines(NamedTuple):
    """Line g is rows [offsets[g], offsets[g+1]); all of them see the keys of ranges[starts[g]:starts[g+1]].

    Canonical: a line's ranges are sorted, disjoint and never touch; no line is empty; neighbours differ.
    """

    offsets: np.ndarray  # (G+1,)
    starts: np.ndarray  # (G+1,)
    ranges: np.ndarray  # (E, 2)

    @property
    def counts(self) -> np.ndarray:
        """How many ranges each line has, (G,)."""
        return np.diff(self.starts)

    @property
    def owner(self) -> np.ndarray:
        """The line of each range, (E,)."""
        return np.repeat(np.arange(len(self.counts)), self.counts)

    @property
    def seen(self) -> int:
        """How many pairs of a row and a key see each other."""
        return int((np.diff(self.offsets)[self.owner] * (self.ranges[:, 1] - self.ranges[:, 0])).sum())


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.append(0, np.cumsum(lengths)).astype(np.int64)


def union(offsets: np.ndarray, line: np.ndarray, begin: np.ndarray, end: np.ndarray, k_len: int) -> Lines:
    """Canonical lines from ranges [begin, end) of the rows of `line`: empty, overlapping, touching, in any order."""
    offsets, renumbered = np.unique(offsets, return_inverse=True)  # leaves lines without rows out
    full = (begin < end) & (renumbered[line] < renumbered[line + 1])
    line = renumbered[line[full]]
    stride = k_len + 1  # all lines on one axis with a gap of one between them: one pass merges within each
    order = np.argsort(line * stride + begin[full], kind="stable")
    begin = (line * stride + begin[full])[order]
    reach = np.maximum.accumulate((line * stride + end[full])[order])
    gap = begin[1:] > reach[:-1]
    n = len(begin)
    begin, end = begin[np.append(True, gap)[:n]], reach[np.append(gap, True)[:n]]
    line = begin // stride
    return merged(offsets, line, np.stack([begin, end], 1) - (line * stride)[:, None])


def merged(offsets: np.ndarray, line: np.ndarray, ranges: np.ndarray) -> Lines:
    """Canonical lines from canonical ranges of the rows of `line`, in order: neighbours that are alike become one."""
    count = np.bincount(line, minlength=len(offsets) - 1)
    alike = np.append(False, count[1:] == count[:-1])[: len(count)]  # as the line before it
    at = np.flatnonzero(alike[line])
    alike[line[at[(ranges[at] != ranges[at - count[line[at]]]).any(1)]]] = False
    new = ~alike
    return Lines(np.append(offsets[:-1][new], offsets[-1]), offsets_of(count[new]), ranges[new[line]])


def transpose(lines: Lines, k_len: int) -> Lines:
    """The same relation from the side of the keys: a line per maximal run of keys that the same rows see.

    Going down the rows, a key changes between seen and unseen.  The boundaries of a line and of the one before it,
    sorted together, pair up into exactly the key ranges that change there (equal ones cancel); the changes of a key, in
    the order of the rows, pair up into the row ranges that see it.  What stays the same costs nothing: a block-causal
    layout of T snippets takes T log T steps.
    """
    stride = k_len + 1
    at = lines.owner[:, None]
    events = np.concatenate([at * stride + lines.ranges, (at + 1) * stride + lines.ranges]).ravel()
    events.sort(kind="stable")  # a merge: both halves are sorted
    line, change = np.divmod(events.reshape(-1, 2), stride)  # both (changes, 2)
    real = change[:, 0] < change[:, 1]
    line, change = line[real, 0], change[real]
    cuts = np.unique(np.append(change, [0, k_len]))  # (S+1,)
    segment, source = expand(cuts, change)
    order = np.argsort(segment, kind="stable")
    ranges = lines.offsets[line[source[order]]].reshape(-1, 2)
    return Lines(cuts, np.searchsorted(segment[order][::2], np.arange(len(cuts))), ranges)


def expand(cuts: np.ndarray, ranges: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every (segment between two cuts, index of a range that covers it), range by range; they begin and end at cuts."""
    first, last = np.searchsorted(cuts, ranges).T
    count = last - first
    source = np.repeat(np.arange(len(ranges)), count)
    return np.arange(len(source)) - np.repeat(np.cumsum(count) - last, count), source


def from_columns(lengths: np.ndarray, k_len: int, *columns: tuple[np.ndarray | int, np.ndarray | int]) -> Lines:
    """Line g is lengths[g] rows, and column c adds the range [begin, end) = (columns[c][0][g], columns[c][1][g])."""
    lines = len(lengths)
    begin, end = (np.stack([np.broadcast_to(c[side], lines) for c in columns], 1).ravel() for side in (0, 1))
    return union(offsets_of(lengths), np.repeat(np.arange(lines), len(columns)), begin, end, k_len)


def from_slices(q_len: int, queries: np.ndarray, k_len: int, keys: np.ndarray) -> Lines:
    """Rows queries[i] = [begin, end) see keys[i], for (S, 2) slices that overlap as they like; none is empty."""
    cuts, k_cuts = np.unique(np.append(queries, [0, q_len])), np.unique(np.append(keys, [0, k_len]))
    cost, k_cost = (np.diff(np.searchsorted(c, s)).sum() for c, s in ((cuts, queries), (k_cuts, keys)))
    if k_cost < cost:  # long columns, such as "from here on every row sees this key", would be cut once per row
        return transpose(from_slices(k_len, keys, q_len, queries), q_len)
    line, source = expand(cuts, queries)
    return union(cuts, line, keys[source, 0], keys[source, 1], k_len)


def concatenate(parts: Sequence[tuple[Lines, int]], k_len: int) -> Lines:
    """The rows of all parts one after the other; the keys of each are moved by its number."""
    starts = offsets_of(np.array([part.offsets[-1] for part, _ in parts]))
    lines = offsets_of(np.array([len(part.offsets) for part, _ in parts]))  # a line without rows between two parts
    offsets = np.concatenate([part.offsets + start for (part, _), start in zip(parts, starts, strict=False)])
    line = np.concatenate([part.owner + first for (part, _), first in zip(parts, lines, strict=False)])
    begin, end = np.concatenate([part.ranges + by for part, by in parts]).T
    return union(offsets, line, begin, end, k_len)


def part(lines: Lines, queries: np.ndarray, keys: np.ndarray) -> Lines:
    """The relation between some rows and some keys: (S, 2) slices [begin, end), sorted and disjoint, laid end to end.

    What lies between two slices of keys is gone, so a range stays one range: there are never more than before.
    """
    cuts = np.unique(np.append(lines.offsets, queries))
    rows, _ = expand(cuts, queries)  # the segments of rows that are kept, in order
    source = np.searchsorted(lines.offsets, cuts[rows], "right") - 1
    starts = offsets_of(keys[:, 1] - keys[:, 0])
    line = np.repeat(np.arange(len(source)), lines.counts[source])
    ranges = lines.ranges[_spread(lines.starts[source], lines.counts[source])]
    behind = np.searchsorted(keys[:, 0], ranges, "right")  # of slices that begin at an edge or before it
    at = np.maximum(behind - 1, 0)
    edges = ranges if not len(keys) else starts[at] + np.minimum(ranges, keys[at, 1]) - keys[at, 0]
    edges = np.where(behind > 0, edges, 0)
    return union(offsets_of(cuts[rows + 1] - cuts[rows]), line, edges[:, 0], edges[:, 1], int(starts[-1]))


def _spread(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """first[0], first[0] + 1, ... counts[0] numbers, then those from first[1] on, and so on."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - first, counts)


def extend(lines: Lines, q_len: int) -> Lines:
    """The same rows, and after them up to q_len rows that see nothing."""
    if q_len == lines.offsets[-1]:
        return lines
    kept = len(lines.offsets) - int(lines.counts[-1:].tolist() == [0])  # a last line that sees nothing grows
    return Lines(np.append(lines.offsets[:kept], q_len), np.append(lines.starts[:kept], lines.starts[-1]), lines.ranges)


def of_blocks(ids: np.ndarray, valid: np.ndarray, q_begin: int, q_end: int, window: int | None) -> Lines:
    """The rows of `SnippetLayout.from_block_ids`: tokens [q_begin, q_end) of ids (N,), valid (N,) bool.

    A row with five separate ranges or more is an error to the caller, so it is enough to find five of them.
    """
    row = np.arange(q_begin, q_end)
    earliest = np.zeros_like(row) if window is None else np.maximum(row + 1 - window, 0)
    columns = []
    runs, _ = _runs(valid.astype(np.int64))
    runs = runs[valid[runs[:, 0]]]
    touched = np.searchsorted(runs[:, 1], earliest, "right")
    for begin, end in _picks(runs, touched, np.full_like(touched, len(runs)), min(5, len(runs))):
        columns.append((np.maximum(begin, earliest), np.minimum(end, row + 1)))

    # The runs of one block, in order: rows look up their own block's by its rank.
    runs, blocks = _runs(np.where(valid, ids, -1))
    runs, blocks = runs[blocks >= 0], blocks[blocks >= 0]
    runs, blocks = runs[np.argsort(blocks, kind="stable")], np.sort(blocks)
    mine = ids[q_begin:q_end]
    first, last = np.searchsorted(blocks, mine), np.searchsorted(blocks, mine, "right")
    most = int((last - first).max(initial=0))
    columns += _picks(runs, first, last, min(5, most))
    if most > 5:  # the first five, and those around the row: what lies between them the causal part sees
        stride = len(ids) + 1
        rank = np.unique(blocks, return_inverse=True)[1]
        here = np.searchsorted(rank * stride + runs[:, 0], np.append(rank, 0)[first] * stride + row, "right")
        columns += _picks(runs, np.maximum(here - 1, first), last, 6)
    return from_columns(np.ones_like(row), len(ids), *(columns or [(0, 0)]))


def _runs(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximal runs of equal values: their [begin, end) (R, 2), and the value of each (R,)."""
    if not len(values):
        return np.zeros((0, 2), np.int64), values
    begin = np.append(0, np.flatnonzero(values[1:] != values[:-1]) + 1)
    return np.stack([begin, np.append(begin[1:], len(values))], 1), values[begin]


def _picks(runs: np.ndarray, first: np.ndarray, last: np.ndarray, n: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each row the n runs from runs[first] on, those before runs[last]; an empty range where there is none."""
    padded = np.append(runs, [[0, 0]], 0)
    return [tuple(padded[np.where(first + i < last, first + i, -1)].T) for i in range(n)]  # type: ignore[misc]


def seen_snippets(snippets: int, window: int | None, sink: int) -> tuple[np.ndarray, np.ndarray]:
    """Snippet t sees the snippets first[t] .. t, and 0 .. sunk[t]-1."""
    own = np.arange(snippets)
    first = np.zeros_like(own) if window is None else np.maximum(own + 1 - min(window, snippets), 0)
    return first, np.minimum(own + 1, min(sink, snippets))


# -------------------------------------------------------------------- tables and pictures


def tabulate(rows: Sequence[Lines], k_len: int, most: int) -> list[np.ndarray]:
    """The int32 arrays of `layout.LayoutTables`, in its order; `most`: ranges per line to leave room for."""
    q_len = int(rows[0].offsets[-1])
    columns = [transpose(row, k_len) for row in rows]
    groups = 1 + max(len(row.counts) for row in rows)
    most = max(most, *(int(row.counts.max(initial=0)) for row in rows))
    k_ranges = np.full((len(rows), groups, most, 2), k_len)
    for table, row in zip(k_ranges, rows, strict=True):
        table[row.owner, np.arange(len(row.ranges)) - row.starts[row.owner]] = row.ranges
    q_ranges = np.full((len(rows), 1 + max(len(column.ranges) for column in columns), 2), q_len)
    for table, column in zip(q_ranges, columns, strict=True):
        table[: len(column.ranges)] = column.ranges
    cuts = max(len(column.offsets) for column in columns)
    tables = (
        _padded([row.offsets for row in rows], groups + 1),
        k_ranges,
        _padded([column.offsets for column in columns], cuts),
        _padded([column.starts for column in columns], cuts),
        q_ranges,
    )
    return [np.ascontiguousarray(table, np.int32) for table in tables]


def _padded(arrays: Sequence[np.ndarray], n: int) -> np.ndarray:
    """(Bt, n): each row goes on with its last value, which makes lines without rows."""
    table = np.empty((len(arrays), n), np.int64)
    for line, array in zip(table, arrays, strict=True):
        line[: len(array)], line[len(array) :] = array, array[-1]
    return table


def cells(row: Lines, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The picture of one batch row: characters (len(down) - 1, len(across) - 1)."""
    drawn = np.full((len(down) - 1, len(across) - 1), ".")
    sizes = np.diff(across)
    for i, (begin, end) in enumerate(itertools.pairwise(down)):
        first, last = np.searchsorted(row.offsets, [begin, end - 1], "right")
        lines = slice(first - 1, last)
        tall = np.minimum(row.offsets[1:][lines], end) - np.maximum(row.offsets[:-1][lines], begin)
        ranges = slice(row.starts[first - 1], row.starts[last])
        tall = np.repeat(tall, row.counts[lines])
        wide = np.minimum(row.ranges[ranges, 1:], across[1:]) - np.maximum(row.ranges[ranges, :1], across[:-1])
        seen = tall @ np.maximum(wide, 0)
        drawn[i] = np.where(seen == 0, ".", np.where(seen == (end - begin) * sizes, "#", "+"))
    return drawn


# -------------------------------------------------------------------- what came, and what was expected


def read_int(what: str, value: Any, low: int = 0) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{what}: expected an int, got {type(value).__name__}") from None
    if not low <= number <= INT32_MAX:
        raise ValueError(f"{what}: expected {low} to {INT32_MAX}, got {number}")
    return number


def read_integers(what: str, values: Any, expected: str, kinds: str = "iu") -> np.ndarray:
    """Integers as they came: from a list, an array, or a tensor on any device."""
    try:
        array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    except (ValueError, TypeError):  # lists of different lengths; a dtype that NumPy lacks
        raise ValueError(f"{what}: expected {expected}, got {type(values).__name__} of another form") from None
    if array.size and array.dtype.kind not in kinds:
        raise TypeError(f"{what}: expected {expected}, got {array.dtype}")
    return array if array.size else array.astype(np.int64)  # NumPy takes an empty list for floats


def at_most_four(where: str, lines: Lines, first: int = 0) -> Lines:
    """`lines`, or an error that names the row with more ranges than kernels take; row 0 of them is row `first`."""
    over = np.flatnonzero(lines.counts > MAX_RANGES)
    if len(over):
        row = first + lines.offsets[over[0]]
        raise ValueError(f"{where}: expected at most {MAX_RANGES} separate key ranges per row, got more for row {row}")
    return lines


def read_lengths(what: str, values: Any, *, total: bool = True) -> np.ndarray:
    """(T,) int64, none negative; together within int32."""
    array = read_integers(what, values, "integers (T,)")
    if array.ndim != 1:
        raise ValueError(f"{what}: expected integers (T,), got shape {array.shape}")
    for extreme in (array.min(initial=0), array.max(initial=0)):
        read_int(what, extreme)
    array = array.astype(np.int64)
    if total:
        read_int(f"{what}: sum", array.sum())
    return array


def read_slices(what: str, values: Any, length: int | None) -> tuple[np.ndarray, int]:
    """(S, 2) int64 and the length they lie in."""
    array = read_integers(what, values, "integers (S, 2)")
    if not array.size:
        array = np.zeros((0, 2), np.int64)
    if array.ndim != 2 or array.shape[1] != 2:
        raise ValueError(f"{what}: expected integers (S, 2), got shape {array.shape}")
    reach = read_int(f"{what}: largest end", array.max(initial=0))
    length = reach if length is None else read_int(f"{what}: length", length)
    wrong = np.flatnonzero((array[:, 0] < 0) | (array[:, 0] > array[:, 1]) | (array[:, 1] > length))
    if len(wrong):
        i = wrong[0]
        raise ValueError(f"{what}: expected 0 <= begin <= end <= {length}, got {array[i].tolist()} at {i}")
    return array.astype(np.int64), length
