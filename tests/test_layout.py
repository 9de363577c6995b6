"""SnippetLayout against a dense mask that is built pair by pair from the words of each constructor's definition."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirasol_kernels import _ranges
from mirasol_kernels.layout import SnippetLayout

Mask = list[list[bool]]


# -------------------------------------------------------------------- the definition


def pairs(rows: int, keys: int, sees: Callable[[int, int], bool]) -> Mask:
    return [[sees(i, j) for j in range(keys)] for i in range(rows)]


def owners(lengths: list[int]) -> list[int]:
    """The snippet of each token."""
    return [snippet for snippet, length in enumerate(lengths) for _ in range(length)]


def snippet_sees(t: int, s: int, window: int | None, sink: int) -> bool:
    """The future never, the last `window` snippets with t itself, and the first `sink` ones."""
    return s <= t and (window is None or t - s < window or s < sink)


def runs(row: list[bool]) -> list[list[int]]:
    """The separate [begin, end) where a row is True."""
    edges = [j for j, (a, b) in enumerate(pairwise([False, *row, False])) if a != b]
    return [edges[i : i + 2] for i in range(0, len(edges), 2)]


# -------------------------------------------------------------------- what must hold of any layout


def check(layout: SnippetLayout, masks: list[Mask], k_len: int, batch: int | None = None) -> None:
    """`layout` is `masks`, one or one per batch row, in all its forms."""
    q_len = len(masks[0])
    assert (layout.q_len, layout.k_len, layout.batch) == (q_len, k_len, batch)
    want = torch.tensor(masks, dtype=torch.bool).reshape(len(masks), q_len, k_len)
    assert torch.equal(layout.dense_mask(), want)

    tables = layout.tables()
    for table in tables:
        assert table.dtype == torch.int32 and table.is_contiguous() and table.shape[0] == len(masks)
    assert 1 <= tables.k_ranges.shape[2] <= 4
    for b, mask in enumerate(masks):
        q_offsets, k_ranges, k_offsets, q_index, q_ranges = (table[b].tolist() for table in tables)
        assert q_offsets[0] == 0 and q_offsets[-1] == q_len and q_offsets == sorted(q_offsets)
        assert len(k_ranges) == len(q_offsets) - 1
        for (begin, end), ranges in zip(pairwise(q_offsets), k_ranges, strict=True):
            used = [r for r in ranges if r[0] < r[1]]
            assert ranges == used + [[k_len, k_len]] * (len(ranges) - len(used))
            assert all(runs(row) == used for row in mask[begin:end])
        columns = [list(column) for column in zip(*mask, strict=True)] if q_len else [[]] * k_len
        assert k_offsets[0] == 0 and k_offsets[-1] == k_len and k_offsets == sorted(k_offsets)
        assert len(q_index) == len(k_offsets) and q_index[0] == 0 and q_index[-1] < len(q_ranges)
        for s, (begin, end) in enumerate(pairwise(k_offsets)):
            assert all(runs(column) == q_ranges[q_index[s] : q_index[s + 1]] for column in columns[begin:end])
            assert end == k_len or columns[end - 1] != columns[end], "a segment is as long as it can be"

    for lines in layout._rows:
        back = _ranges.transpose(_ranges.transpose(lines, k_len), q_len)
        assert all(np.array_equal(a, b) for a, b in zip(lines, back, strict=True)), "lines are canonical"
    for begin in range(q_len + 1):
        for end in {begin, min(begin + 1, q_len), (begin + q_len) // 2, q_len}:
            keys = want[:, begin:end].any(1).any(0).nonzero().flatten().tolist()
            assert layout.span(begin, end) == ((keys[0], keys[-1] + 1) if keys else (0, 0))
    assert len(repr(layout).splitlines()) == 1
    if max(q_len, k_len) <= 32:
        drawn = ["".join(".#"[seen] for seen in row) for mask in masks[:4] for row in mask]
        assert [line for line in layout.picture().split("\n") if set(line) <= {".", "#"}] == drawn
    layout.validate(q_len, k_len, 3 if batch is None else batch)


def drawn(**strategies: st.SearchStrategy) -> Callable:
    """A property: at least 50 drawn cases, their number printed."""

    def decorate(prop: Callable[..., None]) -> Callable[[], None]:
        def test() -> None:
            count = 0

            @settings(max_examples=100)
            @given(st.fixed_dictionaries(strategies))
            def run(case: dict[str, Any]) -> None:
                nonlocal count
                prop(**case)
                count += 1

            run()
            print(f"{prop.__name__}: {count} cases")
            assert count >= 50

        test.__doc__ = prop.__doc__
        return test

    return decorate


LENGTHS = st.lists(st.integers(0, 4), max_size=6)
WINDOW = st.none() | st.integers(1, 7)
SINK = st.integers(0, 7)


# -------------------------------------------------------------------- constructors


@drawn(snippets=st.integers(0, 6), tokens=st.integers(0, 4), asked=st.integers(0, 4), window=WINDOW, sink=SINK)
def test_uniform(snippets: int, tokens: int, asked: int, window: int | None, sink: int) -> None:
    q_tokens = None if asked == 4 else min(asked, tokens)
    layout = SnippetLayout.uniform(snippets, tokens, q_tokens=q_tokens, window=window, sink=sink)
    q_owner = owners([tokens if q_tokens is None else q_tokens] * snippets)
    k_owner = owners([tokens] * snippets)
    mask = pairs(len(q_owner), len(k_owner), lambda i, j: snippet_sees(q_owner[i], k_owner[j], window, sink))
    check(layout, [mask], len(k_owner))
    assert layout is SnippetLayout.uniform(snippets, tokens, q_tokens=q_tokens, window=window, sink=sink)
    assert layout == SnippetLayout.ragged(
        [tokens] * snippets, [q_tokens or 0] * snippets, window=window, sink=sink
    ) or (q_tokens is None)


@drawn(lengths=LENGTHS, asked=st.lists(st.integers(0, 4), min_size=6, max_size=6), window=WINDOW, sink=SINK)
def test_ragged(lengths: list[int], asked: list[int], window: int | None, sink: int) -> None:
    q_lengths = asked[: len(lengths)] if asked[-1] else None
    layout = SnippetLayout.ragged(lengths, q_lengths, window=window, sink=sink)
    q_owner, k_owner = owners(lengths if q_lengths is None else q_lengths), owners(lengths)
    mask = pairs(len(q_owner), len(k_owner), lambda i, j: snippet_sees(q_owner[i], k_owner[j], window, sink))
    check(layout, [mask], len(k_owner))


@drawn(lengths=LENGTHS, window=WINDOW, sink=SINK)
def test_teacher_forcing(lengths: list[int], window: int | None, sink: int) -> None:
    owner, n = owners(lengths), sum(lengths)

    def sees(i: int, j: int) -> bool:
        if i < n:
            return j < n and snippet_sees(owner[i], owner[j], window, sink)
        t = owner[i - n]
        if j < n:
            return owner[j] < t and snippet_sees(t, owner[j], window, sink)
        return owner[j - n] == t

    check(SnippetLayout.teacher_forcing(lengths, window=window, sink=sink), [pairs(2 * n, 2 * n, sees)], 2 * n)


def block_mask(ids: list[int], valid: list[bool], queries: range, window: int | None) -> Mask:
    def sees(i: int, j: int) -> bool:
        causal = j <= i and (window is None or i - j < window)
        return valid[j] and (causal or (ids[i] >= 0 and ids[i] == ids[j]))

    return pairs(len(queries), len(ids), lambda i, j: sees(queries[i], j))


@st.composite
def block_case(draw: Any) -> tuple[list[list[int]], list[list[bool]], range]:
    """Images as blocks within text, padded left or right; queries are the last few, all, or a stretch."""
    n = draw(st.integers(0, 14))
    ids, valid = [], []
    for _ in range(draw(st.integers(1, 3))):
        row: list[int] = []
        for block, length in enumerate(draw(st.lists(st.integers(1, 4), max_size=6))):
            row += [block] * length if draw(st.booleans()) else [-1] * length
        row = (row + [-1] * n)[:n]
        left, right = (
            draw(st.tuples(st.integers(0, n), st.integers(0, n)).map(sorted)) if draw(st.booleans()) else (0, n)
        )
        ids.append(row)
        valid.append([left <= j < right for j in range(n)])
    begin, end = sorted(draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    return ids, valid, draw(st.sampled_from([range(n), range(begin, n), range(begin, end)]))


@drawn(case=block_case(), window=st.none() | st.integers(1, 16), flat=st.booleans())
def test_from_block_ids(case: tuple, window: int | None, flat: bool) -> None:
    ids, valid, queries = case
    ids, valid = (ids[:1], valid[:1]) if flat else (ids, valid)
    masks = [block_mask(*row, queries, window) for row in zip(ids, valid, strict=True)]
    n = len(ids[0])
    asked = (queries.start, queries.stop) if queries.stop < n else len(queries)
    layout = SnippetLayout.from_block_ids(
        ids[0] if flat else torch.tensor(ids).reshape(len(ids), n),
        valid=valid[0] if flat else torch.tensor(valid, dtype=torch.bool).reshape(len(ids), n).long(),
        queries=None if len(queries) == n else asked,
        window_tokens=window,
    )
    check(layout, masks, n, None if flat else len(ids))


def check_or_refuse(build: Callable[[], SnippetLayout], mask: Mask, k_len: int, batch: int | None = None) -> None:
    """The mask, or, where a row has more than four separate ranges, an error that names the first such row."""
    over = [i for i, row in enumerate(mask) if len(runs(row)) > 4]
    if over:
        with pytest.raises(ValueError, match=rf"at most 4 separate key ranges per row, got more for row {over[0]}$"):
            build()
    else:
        check(build(), [mask], k_len, batch)


@drawn(
    ids=st.lists(st.integers(-1, 2), max_size=24),
    holes=st.sets(st.integers(0, 23), max_size=6),
    begin=st.integers(0, 12),
    window=st.none() | st.integers(1, 24),
)
def test_from_block_ids_of_any_kind(ids: list[int], holes: set[int], begin: int, window: int | None) -> None:
    """A block in several pieces, and padding in the middle: what the mask says, while four ranges hold it."""
    queries = range(min(begin, len(ids)), len(ids))
    valid = [j not in holes for j in range(len(ids))]
    mask = block_mask(ids, valid, queries, window)
    check_or_refuse(
        lambda: SnippetLayout.from_block_ids(ids, valid=valid, queries=len(queries), window_tokens=window),
        mask,
        len(ids),
    )


@pytest.mark.parametrize("pieces", [5, 6, 12])
def test_a_block_in_many_pieces(pieces: int) -> None:
    """Text between the pieces is seen once it is past, so only early rows have too many ranges."""
    ids = [0, -1] * pieces
    n = len(ids)
    for window in (None, 1, 4, n):
        for begin in range(n):
            mask = block_mask(ids, [True] * n, range(begin, n), window)
            check_or_refuse(
                lambda begin=begin, window=window: SnippetLayout.from_block_ids(  # type: ignore[misc]
                    ids, queries=n - begin, window_tokens=window
                ),
                mask,
                n,
            )


@drawn(
    groups=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5), st.integers(0, 5)), max_size=6),
    k_lengths=st.lists(st.integers(0, 4), min_size=5, max_size=5),
    from_start=st.booleans(),
)
def test_cross(groups: list[tuple[int, int, int]], k_lengths: list[int], from_start: bool) -> None:
    q_lengths = [length for length, _, _ in groups]
    upto = [max(a, b) for _, a, b in groups]
    first = [0 if from_start else min(a, b) for _, a, b in groups]
    layout = SnippetLayout.cross(q_lengths, k_lengths, upto, None if from_start else first)
    q_owner, k_owner = owners(q_lengths), owners(k_lengths)
    mask = pairs(len(q_owner), len(k_owner), lambda i, j: first[q_owner[i]] <= k_owner[j] < upto[q_owner[i]])
    check(layout, [mask], len(k_owner))


SLICE = st.tuples(st.integers(0, 12), st.integers(0, 12)).map(sorted)


@drawn(slices=st.lists(st.tuples(SLICE, SLICE), max_size=12), room=st.integers(0, 2), columns=st.booleans())
def test_from_ranges(slices: list[tuple[list[int], list[int]]], room: int, columns: bool) -> None:
    """Overlapping, touching, unsorted, empty slices; described by rows or by columns."""
    if columns:
        slices = [([q[0], 12], k) for q, k in slices]
    q_ranges, k_ranges = [q for q, _ in slices], [k for _, k in slices]
    q_len, k_len = (max([end for _, end in ranges], default=0) + room for ranges in (q_ranges, k_ranges))
    mask = pairs(q_len, k_len, lambda i, j: any(q[0] <= i < q[1] and k[0] <= j < k[1] for q, k in slices))
    given_lengths = {"q_len": q_len, "k_len": k_len} if room else {}
    check_or_refuse(lambda: SnippetLayout.from_ranges(q_ranges, k_ranges, **given_lengths), mask, k_len)


@st.composite
def any_layout(draw: Any, batch: int | None = None) -> SnippetLayout:
    lengths, window, sink = draw(LENGTHS), draw(WINDOW), draw(SINK)
    kind = draw(st.integers(0, 4))
    if kind == 0:
        return SnippetLayout.ragged(lengths, window=window, sink=sink)
    if kind == 1:
        return SnippetLayout.teacher_forcing(lengths, window=window, sink=sink)
    if kind == 2:
        return SnippetLayout.cross([2, 0, 1], [1, 3, 0], [3, 1, 2], draw(st.sampled_from([None, [1, 1, 0]])))
    if kind == 3 and batch is not None:
        return SnippetLayout.from_block_ids(
            draw(st.lists(st.sampled_from([[0] * 5, [-1, 3, 3, -1, 7]]), min_size=batch, max_size=batch))
        )
    return SnippetLayout.uniform(2, 3)


@drawn(layouts=st.lists(any_layout(batch=2), min_size=1, max_size=4))
def test_packed(layouts: list[SnippetLayout]) -> None:
    batch = 2 if any(layout.batch for layout in layouts) else None
    masks = [
        torch.block_diag(*[layout.dense_mask()[b % len(layout._rows)] for layout in layouts]) for b in range(batch or 1)
    ]
    check(SnippetLayout.packed(layouts), [mask.bool().tolist() for mask in masks], masks[0].shape[1], batch)


@drawn(layouts=st.lists(any_layout(batch=2), min_size=1, max_size=4))
def test_batch(layouts: list[SnippetLayout]) -> None:
    """Every row its own layout, as long as the longest; a layout that has batch rows already brings them all."""
    q_len, k_len = max(layout.q_len for layout in layouts), max(layout.k_len for layout in layouts)
    masks = []
    for layout in layouts:
        for mask in layout.dense_mask():
            masks.append(torch.zeros(q_len, k_len, dtype=torch.bool))
            masks[-1][: layout.q_len, : layout.k_len] = mask
    check(SnippetLayout.batch(layouts), [mask.tolist() for mask in masks], k_len, len(masks))


def test_packed_of_batches_of_packed() -> None:
    one, two = SnippetLayout.uniform(2, 2), SnippetLayout.ragged([3, 1])
    batch = SnippetLayout.batch([SnippetLayout.packed([one, two]), SnippetLayout.packed([two, one])])
    packed = SnippetLayout.packed([one, batch])
    a, b = one.dense_mask()[0], two.dense_mask()[0]
    want = torch.stack([torch.block_diag(a, a, b), torch.block_diag(a, b, a)]).bool()
    assert torch.equal(packed.dense_mask(), want)


def test_one_relation_is_one_layout() -> None:
    """Constructors that say the same give equal layouts, whose groups are as few as can be."""
    uniform = SnippetLayout.uniform(3, 2)
    same = [
        SnippetLayout.ragged(np.array([2, 0, 2, 2])),
        SnippetLayout.ragged(torch.tensor([2, 2, 2]), window=3),
        SnippetLayout.cross([2, 1, 1, 2], [2, 2, 2], [1, 2, 2, 3]),
        SnippetLayout.from_block_ids([0, 0, 1, 1, 2, 2]),
        SnippetLayout.from_ranges([(4, 6), (0, 6), (2, 4), (2, 6)], [(3, 6), (0, 2), (2, 4), (2, 3)]),
        SnippetLayout.packed([uniform]),
    ]
    assert {uniform, *same} == {uniform}
    assert uniform != SnippetLayout.uniform(3, 2, window=1) != SnippetLayout.uniform(2, 3)
    assert uniform != SnippetLayout.batch([uniform]) != "uniform"
    assert uniform.tables().q_offsets.tolist() == [[0, 2, 4, 6, 6]]
