"""SnippetLayout as an object: immutable, cached, small, drawn, strict about what it gets, cheap to compile with."""

from __future__ import annotations

import copy
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mirasol_kernels.layout import SnippetLayout, visible

INT32_MAX = 2**31 - 1


def test_immutable_and_copied_whole() -> None:
    layout = SnippetLayout.teacher_forcing([2, 1, 3], window=2, sink=1)
    with pytest.raises(AttributeError, match="immutable: q_len"):
        layout.q_len = 3
    with pytest.raises(AttributeError, match="immutable: k_len"):
        del layout.k_len
    for twin in (copy.deepcopy(layout), pickle.loads(pickle.dumps(layout.to("meta")))):
        assert twin == layout and hash(twin) == hash(layout) and repr(twin) == repr(layout)
        assert all(torch.equal(a, b) for a, b in zip(twin.tables(), layout.tables(), strict=True))


def test_tables_are_made_once_per_device() -> None:
    layout = SnippetLayout.ragged([1, 2])
    assert layout.tables() is layout.tables("cpu") is layout.tables(torch.device("cpu"))
    assert layout.to("meta") is layout
    assert layout.tables("meta") is layout.tables(torch.device("meta"))
    assert [t.shape for t in layout.tables("meta")] == [t.shape for t in layout.tables()]


def test_a_layout_born_in_inference_mode_trains() -> None:
    with torch.inference_mode():
        layout = SnippetLayout.ragged([1, 2]).to("meta")
    assert not any(t.is_inference() for t in (*layout.tables(), *layout.tables("meta")))


def test_visible_answers_for_any_rows_and_keys() -> None:
    layout = SnippetLayout.batch([SnippetLayout.uniform(3, 2, window=1, sink=1), SnippetLayout.ragged([1, 4])])
    rows, keys = torch.tensor([5, 0, 3]), torch.tensor([0, 4, 4, 1])
    tables = layout.tables()
    assert torch.equal(visible(tables.q_offsets, tables.k_ranges, rows, keys), layout.dense_mask()[:, rows][:, :, keys])


def test_large_layouts_stay_small() -> None:
    """Ten thousand snippets of a thousand tokens: memory like the number of snippets, nowhere N x N, nor N."""
    tracemalloc.start()
    layout = SnippetLayout.uniform(10_000, 1_000, window=20, sink=2)
    assert layout.span(5_000_000, 5_000_001) == (0, 5_001_000)
    assert len(layout.picture().splitlines()) <= 34 and "20" in repr(layout)
    assert hash(layout) == hash(SnippetLayout.ragged([1_000] * 10_000, window=20, sink=2))
    # The same relation column by column: no slice is cut once per row.
    start = np.arange(0, 10_000_000, 1_000)
    columns = SnippetLayout.from_ranges(
        np.stack([start, np.full(10_000, 10_000_000)], 1), np.stack([start, start + 1_000], 1)
    )
    assert columns == SnippetLayout.uniform(10_000, 1_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 64 * 2**20, f"{peak / 2**20:.0f} MiB"


def test_pictures() -> None:
    layout = SnippetLayout.teacher_forcing([2, 1])
    assert layout.picture() == (
        "SnippetLayout(teacher forcing 2 snippets: 6 queries x 6 keys, 38.9% seen)\n"
        "##....\n##....\n###...\n...##.\n...##.\n##...#".replace("38.9", f"{100 * 14 / 36:.3g}")
    )
    assert repr(SnippetLayout.uniform(4, 8, q_tokens=2, window=2, sink=1)) == (
        "SnippetLayout(uniform 4 x 8, the last 2 ask, window 2, sink 1: 8 queries x 32 keys, 56.2% seen)"
    )
    tiles = SnippetLayout.uniform(50, 4).picture(width=10).splitlines()
    assert tiles[1] == "one cell is 40 x 20: # all seen, + some, . none"
    assert tiles[2:] == ["++........", "##++......", "####++....", "######++..", "########++"]
    many = SnippetLayout.batch([SnippetLayout.uniform(1, 1)] * 6)
    assert many.picture().splitlines()[1:] == [
        "batch row 0",
        "#",
        "batch row 1",
        "#",
        "batch row 2",
        "#",
        "batch row 3",
        "#",
        "and 2 batch rows more",
    ]
    assert SnippetLayout.uniform(0, 3).picture().splitlines() == [repr(SnippetLayout.uniform(0, 3))]


# -------------------------------------------------------------------- errors

L = SnippetLayout
ERRORS = {
    "uniform snippets": (lambda: L.uniform(-1, 2), ValueError, r"uniform: snippets: expected 0 to 2147483647, got -1"),
    "uniform kind": (lambda: L.uniform(2.0, 2), TypeError, r"uniform: snippets: expected an int, got float"),
    "uniform overflow": (
        lambda: L.uniform(2**16, 2**15),
        ValueError,
        r"snippets \* tokens: expected .*, got 2147483648",
    ),
    "uniform q_tokens": (
        lambda: L.uniform(2, 3, q_tokens=4),
        ValueError,
        r"q_tokens: expected at most tokens = 3, got 4",
    ),
    "window": (lambda: L.uniform(2, 3, window=0), ValueError, r"uniform: window: expected 1 to .*, got 0"),
    "sink": (lambda: L.ragged([1], sink=-1), ValueError, r"ragged: sink: expected 0 to .*, got -1"),
    "ragged negative": (lambda: L.ragged([1, -2]), ValueError, r"ragged: k_lengths: expected .*, got -2"),
    "ragged floats": (lambda: L.ragged([1.5]), TypeError, r"k_lengths: expected integers \(T,\), got float64"),
    "ragged nested": (
        lambda: L.ragged([[1], [2]]),
        ValueError,
        r"k_lengths: expected integers \(T,\), got shape \(2, 1\)",
    ),
    "ragged crooked": (lambda: L.ragged([[1], [2, 3]]), ValueError, r"k_lengths: expected integers \(T,\), got list"),
    "ragged queries": (lambda: L.ragged([1, 2], [1]), ValueError, r"q_lengths: expected 2 like k_lengths, got 1"),
    "ragged overflow": (lambda: L.ragged([INT32_MAX, 1]), ValueError, r"k_lengths: sum: .*, got 2147483648"),
    "ragged one overflow": (lambda: L.ragged([2**63]), ValueError, r"k_lengths: expected .*, got 9223372036854775808"),
    "teacher overflow": (lambda: L.teacher_forcing([2**30]), ValueError, r"tokens of \[clean \| noisy\]: .*2147483648"),
    "ids shape": (lambda: L.from_block_ids([[[0]]]), ValueError, r"ids: expected integers .* got shape \(1, 1, 1\)"),
    "ids no rows": (lambda: L.from_block_ids(np.zeros((0, 3), int)), ValueError, r"ids: .* got shape \(0, 3\)"),
    "ids floats": (lambda: L.from_block_ids(torch.zeros(3)), TypeError, r"ids: expected integers .*, got float32"),
    "valid shape": (
        lambda: L.from_block_ids([0, 1], valid=[True]),
        ValueError,
        r"valid: expected .*\(2,\) like ids, got",
    ),
    "valid values": (lambda: L.from_block_ids([0, 1], valid=[1, 2]), ValueError, r"valid: expected bool or 0/1"),
    "valid floats": (lambda: L.from_block_ids([0], valid=[0.5]), TypeError, r"valid: expected bool or 0/1.*float64"),
    "queries": (lambda: L.from_block_ids([0, 1], queries=3), ValueError, r"queries: .* the 2 tokens of ids, got 3"),
    "queries pair": (lambda: L.from_block_ids([0], queries=(1, 0)), ValueError, r"queries: .* got \(1, 0\)"),
    "queries kind": (lambda: L.from_block_ids([0], queries=0.5), TypeError, r"queries: expected an int, got float"),
    "queries triple": (lambda: L.from_block_ids([0], queries=(0, 1, 1)), TypeError, r"expected an int, got tuple"),
    "window_tokens": (lambda: L.from_block_ids([0], window_tokens=0), ValueError, r"window_tokens: expected 1 to"),
    "cross upto": (
        lambda: L.cross([1, 1], [2], [1, 2]),
        ValueError,
        r"upto: .* <= 1, .* got 0 and 2 for query group 1",
    ),
    "cross first": (lambda: L.cross([1], [2], [0], [1]), ValueError, r"first <= upto .* got 1 and 0 for query group 0"),
    "cross counts": (lambda: L.cross([1, 1], [2], [1]), ValueError, r"upto: expected 2 like q_lengths, got 1"),
    "cross first counts": (
        lambda: L.cross([1], [2], [1], [0, 0]),
        ValueError,
        r"first: expected 1 like q_lengths, got 2",
    ),
    "slices count": (
        lambda: L.from_ranges([(0, 1)], []),
        ValueError,
        r"k_ranges: expected 1 slices like q_ranges, got 0",
    ),
    "slices shape": (
        lambda: L.from_ranges([0, 1], [0, 1]),
        ValueError,
        r"q_ranges: expected integers \(S, 2\), got shape",
    ),
    "slices order": (lambda: L.from_ranges([(2, 1)], [(0, 1)]), ValueError, r"q_ranges: .* got \[2, 1\] at 0"),
    "slices end": (lambda: L.from_ranges([(0, 1)], [(0, 9)], k_len=8), ValueError, r"end <= 8, got \[0, 9\] at 0"),
    "slices overflow": (
        lambda: L.from_ranges([(0, 2**31)], [(0, 1)]),
        ValueError,
        r"q_ranges: largest end: .*2147483648",
    ),
    "five ranges": (
        lambda: L.from_ranges([(0, 9)] + [(3, 4)] * 4, [(2 * i, 2 * i + 1) for i in range(5)]),
        ValueError,
        r"from_ranges: expected at most 4 separate key ranges per row, got more for row 3",
    ),
    "packed none": (lambda: L.packed([]), ValueError, r"packed: layouts: expected at least one, got none"),
    "packed kind": (lambda: L.packed([3]), TypeError, r"packed: layouts: expected SnippetLayouts, got int"),
    "packed batches": (
        lambda: L.packed([L.batch([L.uniform(1, 1)] * n) for n in (2, 3)]),
        ValueError,
        r"packed: layouts: expected one batch size, got \[2, 3\]",
    ),
    "packed overflow": (lambda: L.packed([L.uniform(1, 2**30)] * 2), ValueError, r"packed: queries: .*2147483648"),
    "batch none": (lambda: L.batch([]), ValueError, r"batch: layouts: expected at least one, got none"),
    "batch kind": (lambda: L.batch(["a"]), TypeError, r"batch: layouts: expected SnippetLayouts, got str"),
    "q_len": (lambda: L.uniform(2, 3).validate(7, 6, 1, op="op"), ValueError, r"^op: q: expected 6 tokens .*, got 7$"),
    "k_len": (lambda: L.uniform(2, 3).validate(6, 5, 1, op="op"), ValueError, r"^op: k: expected 6 tokens .*, got 5$"),
    "batch": (lambda: L.batch([L.uniform(2, 3)]).validate(6, 6, 2), ValueError, r"expected a batch of 1 .*, got 2$"),
    "span": (lambda: L.uniform(2, 3).span(4, 7), ValueError, r"span: expected rows within 0 .. 6, got 4 .. 7"),
    "width": (lambda: L.uniform(2, 3).picture(width=0), ValueError, r"width: expected at least 1, got 0"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, kind, text = ERRORS[name]
    with pytest.raises(kind, match=text):
        call()


# -------------------------------------------------------------------- torch.compile


def use(x: torch.Tensor, layout: SnippetLayout) -> torch.Tensor:
    layout.validate(x.shape[1], x.shape[1], x.shape[0], op="use")
    begin, end = layout.span(0, 1)
    tables = layout.tables(x.device)
    rows = torch.arange(x.shape[1], device=x.device)
    seen = visible(tables.q_offsets, tables.k_ranges, rows, rows)  # (B or 1, N, N)
    return seen.to(x.dtype) @ x * (end - begin) + sum(table.sum() for table in tables)


COMPILED = {
    "uniform": lambda t: L.uniform(t, 5),
    "other tokens too": lambda t: L.uniform(t, 3 + t),
    "window and sink": lambda t: L.uniform(t, 5, window=3, sink=1),
    "ragged": lambda t: L.ragged(range(1, t + 1)),
    "teacher forcing": lambda t: L.teacher_forcing(range(1, t + 1), window=2, sink=1),
    "block ids": lambda t: L.from_block_ids([-1] * t + [3] * t),
    "batch": lambda t: L.batch([L.uniform(t, 2), L.uniform(t + 1, 2)]),
}


STATES = [(kind, "cpu") for kind in COMPILED] + [
    (kind, state)
    for kind in ("uniform", "window and sink", "batch")
    for state in ("cached on another device", "not yet on another device")
]


@pytest.mark.parametrize(("kind", "state"), STATES)
def test_twenty_layouts_compile_at_most_twice(kind: str, state: str) -> None:
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(use, backend=backend, fullgraph=True)
    device = "cpu" if state == "cpu" else "meta"
    for t in range(1, 21):
        layout = copy.deepcopy(COMPILED[kind](t))
        if state.startswith("cached"):
            layout.to(device)
        compiled(torch.ones(layout.batch or 2, layout.q_len, 3, device=device), layout)
    assert backend.frame_count <= 2


def test_compiled_and_eager_see_the_same() -> None:
    def masked(x: torch.Tensor, layout: SnippetLayout) -> torch.Tensor:
        return layout.dense_mask(x.device).to(x.dtype) @ x

    compiled = torch.compile(masked, backend="aot_eager", fullgraph=True)
    for layout in (L.uniform(3, 2), L.teacher_forcing([2, 3]), L.batch([L.uniform(2, 2), L.ragged([3, 1])])):
        x = torch.randn(2, layout.q_len, 3)
        assert torch.equal(compiled(x, layout), masked(x, layout))
    with pytest.raises(ValueError, match="q: expected 6 tokens"):
        torch.compile(use, backend="aot_eager")(torch.ones(1, 5, 3), L.uniform(3, 2))
