"""SnippetLayout from what others describe: a mask function of FlexAttention, full slices of FFA."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels import _from_mask
from mirasol_kernels.layout import SnippetLayout as L
from tests.test_layout import any_layout, check_or_refuse, drawn, pairs

# -------------------------------------------------------------------- mask functions


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def chunks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q // 4 >= k // 4


def window_and_sink(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return chunks(b, h, q, k) & ((q // 4 - k // 4 < 2) | (k < 4))


def clean_and_noisy(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """12 tokens in snippets of 4, clean, and the same again, noisy."""
    noisy_q, noisy_k, t, s = q >= 12, k >= 12, (q % 12) // 4, (k % 12) // 4
    return torch.where(noisy_q, torch.where(noisy_k, t == s, s < t), ~noisy_k & (s <= t))


MODS: dict[str, tuple[Callable, int, int, L]] = {
    "causal": (causal, 7, 7, L.uniform(7, 1)),
    "more keys than queries": (causal, 3, 7, L.ragged([1, 1, 1, 4], [1, 1, 1, 0])),
    "chunks": (chunks, 16, 16, L.uniform(4, 4)),
    "window and sink": (window_and_sink, 20, 20, L.uniform(5, 4, window=2, sink=1)),
    "teacher forcing": (clean_and_noisy, 24, 24, L.teacher_forcing([4, 4, 4])),
    "nothing": (lambda b, h, q, k: q < 0, 3, 4, L.ragged([0, 4], [3, 0])),
    "everything": (lambda b, h, q, k: k >= 0, 3, 4, L.ragged([4], [3])),
    "of no index": (lambda b, h, q, k: torch.tensor(True), 3, 4, L.ragged([4], [3])),
    "no queries": (causal, 0, 4, L.ragged([4], [0])),
    "no keys": (causal, 4, 0, L.ragged([0], [4])),
}


@pytest.mark.parametrize("name", MODS)
def test_mask_functions_that_people_write(name: str) -> None:
    fn, q_len, k_len, expected = MODS[name]
    layout = L.from_mask_mod(fn, q_len, k_len)
    assert layout == expected and repr(layout).startswith("SnippetLayout(mask: ")


def test_a_mask_function_that_reads_tensors() -> None:
    """Documents and blocks, one row of a batch or several; what is alike for all rows serves any batch."""
    ids = torch.tensor([[-1, 0, 0, 1, -1], [0, 0, -1, 2, 2]])

    def blocks(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (k <= q) | ((ids[b, q] == ids[b][k]) & (ids[b, q] >= 0))  # one index after the other works too

    assert L.from_mask_mod(blocks, 5, 5, batch=2) == L.from_block_ids(ids)
    assert L.from_mask_mod(blocks, 5, 5) == L.from_block_ids(ids[0])
    ids[1] = ids[0]
    assert L.from_mask_mod(blocks, 5, 5, batch=2) == L.from_block_ids(ids[0])


@drawn(layout=any_layout(batch=2))
def test_any_layout_from_its_own_mask(layout: L) -> None:
    mask = layout.dense_mask()
    twin = L.from_mask_mod(lambda b, h, q, k: mask[b, q, k], layout.q_len, layout.k_len, batch=len(mask))
    assert torch.equal(twin.dense_mask().expand_as(mask), mask)


@drawn(
    rows=st.lists(st.lists(st.booleans(), min_size=13, max_size=13), min_size=1, max_size=6),
)
def test_any_mask(rows: list[list[bool]]) -> None:
    mask = torch.tensor(rows)
    check_or_refuse(lambda: L.from_mask_mod(lambda b, h, q, k: mask[q, k], len(rows), 13), rows, 13)


@pytest.mark.parametrize("step", [1, 3, 4096])
def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """However the rows are divided; and never more of them at once than the budget has."""
    monkeypatch.setattr(_from_mask, "PAIRS", 24 * step)
    assert L.from_mask_mod(clean_and_noisy, 24, 24) == L.teacher_forcing([4, 4, 4])
    seen = []

    def evaluate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        seen.append(len(q))
        return (k <= q[:, None])[None, None]

    _from_mask.lines_of("test", evaluate, 24, 24)
    assert sum(seen) == 24 and max(seen) == min(step, 24)
    with pytest.raises(ValueError, match=r"at most 4 separate key ranges per row, got more for row 20$"):
        L.from_mask_mod(lambda b, h, q, k: (q < 20) | (k % 2 == 0), 24, 24)
    with pytest.raises(ValueError, match=r"from_mask_mod: batch row 1: expected at most 4 .* for row 3$"):
        L.from_mask_mod(lambda b, h, q, k: (q + b < 4) | (k % 2 == 0), 4, 24, batch=2)


def test_a_long_sequence() -> None:
    layout = L.from_mask_mod(lambda b, h, q, k: (q // 256 >= k // 256) & (q - k < 2048), 8192, 8192)
    assert len(layout.tables().q_ranges[0]) <= 8192 + 2
    rows = torch.tensor([0, 255, 256, 5000, 8191])
    seen = layout.tables().k_ranges[0, torch.searchsorted(layout.tables().q_offsets[0, 1:], rows, right=True), 0]
    assert seen.tolist() == [[0, 256], [0, 256], [0, 512], [2953, 5120], [6144, 8192]]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: L.from_mask_mod(causal, -1, 2), ValueError, "q_len: expected 0 to .*, got -1"),
        (lambda: L.from_mask_mod(causal, 2, 2.0), TypeError, "k_len: expected an int, got float"),
        (lambda: L.from_mask_mod(causal, 2, 2, batch=0), ValueError, "batch: expected 1 to .*, got 0"),
        (lambda: L.from_mask_mod("causal", 2, 2), TypeError, "fn: expected a function of .*, got str"),
        (lambda: L.from_mask_mod(lambda b, h, q, k: q - k, 2, 2), TypeError, r"fn: .* bool, got torch\.int32"),
        (lambda: L.from_mask_mod(lambda b, h, q, k: k <= q + h, 2, 2), ValueError, "fn: .* the same for every head"),
    ],
)
def test_mask_functions_refused(call: Callable, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"SnippetLayout.from_mask_mod: {message}"):
        call()


# -------------------------------------------------------------------- slices

SNIPPET = 21_600  # of MAGI-1: 6 latent frames of 3,600 tokens; up to five of them


def slices(*seen: tuple[int, int, int]) -> tuple[list[list[int]], list[list[int]]]:
    """Snippet t sees snippets first .. last, for each (t, first, last)."""
    q_ranges = [[t * SNIPPET, (t + 1) * SNIPPET] for t, _, _ in seen]
    return q_ranges, [[first * SNIPPET, (last + 1) * SNIPPET] for _, first, last in seen]


def test_slices_of_magi() -> None:
    """As FFA takes them: one full slice per snippet; or several that overlap, out of order; it is one relation."""
    layout = L.uniform(5, SNIPPET)
    assert L.from_ranges(*slices(*[(t, 0, t) for t in range(5)])) == layout
    overlapping = [(4, 2, 4), (1, 0, 1), (3, 1, 3), (0, 0, 0), (2, 0, 2), (4, 0, 3), (3, 0, 2), (2, 1, 1)]
    assert L.from_ranges(*(torch.tensor(r) for r in slices(*overlapping))) == layout
    q_ranges, k_ranges = slices(*[(t, t, t) for t in range(5)])  # a snippet's keys are seen from there on
    columns = [[begin, 5 * SNIPPET] for begin, _ in q_ranges]
    assert L.from_ranges(columns, k_ranges) == layout
    windowed = [(t, max(0, t - 1), t) for t in (3, 1, 4, 0, 2)]
    assert L.from_ranges(*slices(*windowed)) == L.uniform(5, SNIPPET, window=2)
    assert L.from_ranges(*slices(*windowed, *[(t, 0, 0) for t in range(5)])) == L.uniform(5, SNIPPET, window=2, sink=1)


def test_slices_of_magi_while_it_generates() -> None:
    """Four snippets at different noise levels ask at once, each for what is before it and itself."""
    q_ranges, _ = slices(*[(t, 0, 0) for t in range(4)])
    k_ranges = np.array([[0, (t + 2) * SNIPPET] for t in range(4)])
    layout = L.from_ranges(q_ranges[::-1], k_ranges[::-1])
    assert (layout.q_len, layout.k_len) == (4 * SNIPPET, 5 * SNIPPET)
    assert layout == L.ragged([2 * SNIPPET, SNIPPET, SNIPPET, SNIPPET], [SNIPPET] * 4)


def test_a_row_with_five_ranges_is_named() -> None:
    q_ranges, k_ranges = slices(*[(t, 0, t) for t in range(5)])
    holes = [[3 * SNIPPET + 7, 3 * SNIPPET + 9]] * 4  # two rows that see four single keys beyond
    beyond = [[4 * SNIPPET + i, 4 * SNIPPET + i + 1] for i in (1, 3, 5, 7)]
    with pytest.raises(ValueError, match=f"from_ranges: .* at most 4 .* got more for row {3 * SNIPPET + 7}$"):
        L.from_ranges(q_ranges + holes, k_ranges + beyond)
    assert L.from_ranges(q_ranges + holes[:3], k_ranges + beyond[:3]).tables().k_ranges.shape[2] == 4


def test_slices_small_enough_to_draw() -> None:
    """The same shapes a thousandth the size, pair by pair."""
    seen = [(2, 0, 1), (0, 0, 0), (1, 0, 1), (2, 1, 2)]
    q_ranges, k_ranges = ([[a // SNIPPET * 3, b // SNIPPET * 3] for a, b in r] for r in slices(*seen))
    mask = pairs(9, 9, lambda i, j: any(i // 3 == t and a <= j // 3 <= b for t, a, b in seen))
    check_or_refuse(lambda: L.from_ranges(q_ranges, k_ranges), mask, 9)
