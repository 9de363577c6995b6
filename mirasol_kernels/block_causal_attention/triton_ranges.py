"""How a tile walks the ranges of `LayoutTables`, for rows that see keys and for keys that are seen by rows alike.

A tile owns consecutive lines (query rows in forward and dq, keys in dk/dv).  Each line has a few ranges; the tile takes
the first range of all its lines, then the second, and so on.  Lines whose ranges touch or overlap their neighbour's
form a **piece**: since the ranges of consecutive lines are connected, their union is one interval without a hole, and
the tile steps through it once.  A typical tile has one piece per range:

    line  0   ########            begin and end of every line         t0 = 2, t1 = 2 .. : steps that every line sees
    line  1   ########            (registers, one number per line)    whole need no mask; t0 .. t1-1 run unmasked,
    line  2     ##########                                            the others, at the two edges, are masked
              |__|__|__|__|       steps of BLOCK, t = 0 .. 3

So nothing is ever loaded that no line of the piece sees, which is why NaN in places nobody sees cannot leak, and every
(line, range) pair belongs to exactly one piece, whatever the order of the ranges.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lines_of(position, offsets, lines, steps):
    """The line (group of rows, segment of keys) that holds each position; steps: log2(lines), rounded up."""
    low = tl.zeros_like(position)
    high = low + lines
    for _ in range(steps):
        middle = (low + high) >> 1
        left = tl.load(offsets + middle) <= position
        low = tl.where(left, middle, low)
        high = tl.where(left, high, middle)
    return low


@triton.jit
def nth_range(ranges, first, count, n):
    """[begin, end) of entry first + n; empty from `count` on."""
    some = tl.zeros_like(first) + n < count
    begin = tl.load(ranges + 2 * (first + n), mask=some, other=0)
    end = tl.load(ranges + 2 * (first + n) + 1, mask=some, other=0)
    return begin, end


@triton.jit
def joined(index, begin, end, before_begin, before_end):
    """Whether the range of a line touches or overlaps that of the line before it, within the tile."""
    both = (begin < end) & (before_begin < before_end) & (index > 0)
    return both & (begin <= before_end) & (before_begin <= end)


@triton.jit
def pieces_of(begin, end, join):
    return tl.sum(((begin < end) & ~join).to(tl.int32), 0)


@triton.jit
def next_piece(index, begin, end, join, done, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The piece that starts at the first line from `done` on that has a range.

    Returns the next `done`; begin and end, empty for lines outside the piece; where its interval starts and stops; and
    t0, t1: of its steps of BLOCK from the start, t0 .. t1-1 are seen whole by every line of the tile.
    """
    first = tl.min(tl.where((begin < end) & (index >= done), index, LINES), 0)
    after = tl.min(tl.where((index > first) & ~join, index, LINES), 0)
    mine = (index >= first) & (index < after)
    start = tl.min(tl.where(mine, begin, 2147483647), 0)
    begin, end = tl.where(mine, begin, 0), tl.where(mine, end, 0)
    stop = tl.max(end, 0)
    t0 = tl.cdiv(tl.max(begin, 0) - start, BLOCK)
    # Where a line is outside the piece the least end is 0, and nothing is seen by every line.
    t1 = tl.maximum(tl.min(end, 0) - start, 0) // BLOCK
    return after, begin, end, start, stop, t0, tl.maximum(t0, t1)


@triton.jit
def edge(i, t0, t1):
    """The i-th of the steps that are not t0 .. t1-1."""
    return tl.where(i < t0, i, i + (t1 - t0))
