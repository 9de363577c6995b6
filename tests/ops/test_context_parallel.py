"""Attention over a sequence that lies on several ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from benchmarks import context
from mirasol_kernels import (
    ContextShards,
    Ranks,
    SnippetLayout,
    block_causal_attention,
    context_parallel_attention,
    explain,
    snippet_owners,
    use_backend,
)
from mirasol_kernels.block_causal_attention import api
from mirasol_kernels.block_causal_attention.op import OP
from mirasol_kernels.context_parallel import part
from tests.processes import run

LAYOUTS = [
    SnippetLayout.uniform(7, 3, window=3, sink=1),
    SnippetLayout.ragged([3, 0, 4, 1, 5]),
    SnippetLayout.ragged([3, 0, 4, 1, 5], [1, 0, 2, 0, 2]),
    SnippetLayout.teacher_forcing([2, 3, 1, 4], window=2, sink=1),
    SnippetLayout.from_block_ids([0, 0, -1, 1, 1, 1, -1, 2, 2], window_tokens=3),
    SnippetLayout.from_ranges([[0, 9], [2, 5]], [[1, 3], [7, 20]]),
    SnippetLayout.packed([SnippetLayout.uniform(2, 2), SnippetLayout.uniform(3, 1)]),
    SnippetLayout.batch([SnippetLayout.ragged([3, 2]), SnippetLayout.ragged([1, 7])]),
]


@pytest.fixture
def alone() -> Iterator[Ranks]:
    """A world of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield Ranks()
    dist.destroy_process_group()


def some(rng: np.random.Generator, length: int) -> np.ndarray:
    """Sorted, disjoint slices of `length` places; some touch."""
    edges = rng.integers(0, min(4, (length + 1) // 2) + 1)
    return np.sort(rng.choice(length + 1, 2 * edges, replace=False)).reshape(-1, 2)


@pytest.mark.parametrize("layout", LAYOUTS, ids=repr)
def test_a_part_is_those_rows_and_columns_of_the_mask(layout: SnippetLayout) -> None:
    rng = np.random.default_rng(0)
    for _ in range(40):
        queries, keys = some(rng, layout.q_len), some(rng, layout.k_len)
        rows, columns = (
            np.concatenate([np.arange(0), *(np.arange(a, b) for a, b in each)]) for each in (queries, keys)
        )
        assert torch.equal(part(layout, queries, keys).dense_mask(), layout.dense_mask()[:, rows][:, :, columns])


@pytest.mark.parametrize("zigzag", [True, False])
def test_owners(zigzag: bool) -> None:
    for ranks in range(1, 9):
        for snippets in range(ranks, 40):
            owners = snippet_owners(snippets, ranks, zigzag=zigzag)
            counts = np.bincount(owners, minlength=ranks)
            assert len(owners) == snippets and counts.max() - counts.min() <= 1
            runs = 1 + np.count_nonzero(np.diff(owners))
            assert runs <= (2 * ranks if zigzag else ranks)
    assert snippet_owners(8, 2).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]
    assert snippet_owners(5, 3).tolist() == [0, 1, 2, 1, 0]


def test_zigzag_shares_the_work_evenly() -> None:
    """Pairs of a query and a key that a rank computes, over the mean: 2 snippets of 128 make 1.6 % of a rank's work."""
    layout, ranks = SnippetLayout.uniform(128, 4), 8
    for zigzag, most in ((True, 1.0 + 2 / 128), (False, 2.0)):
        shards = ContextShards([4] * 128, snippet_owners(128, ranks, zigzag=zigzag), ranks)
        pairs = [part(layout, each, np.array([[0, 512]]))._rows[0].seen for each in shards.slices]
        assert 1 <= max(pairs) / np.mean(pairs) < most
        assert zigzag or max(pairs) / np.mean(pairs) > 1.8


def test_taken_apart_and_put_together() -> None:
    lengths = [3, 0, 5, 1, 2, 4, 6, 1, 3]
    for owners in (snippet_owners(9, 4), np.arange(9) * 7 % 4, np.zeros(9, int)):
        shards = ContextShards(lengths, owners, 4)
        x = torch.randn(2, 25, 3)
        pieces = [shards.take(x, rank, 1) for rank in range(4)]
        assert [piece.shape[1] for piece in pieces] == [shards.count(rank) for rank in range(4)]
        assert torch.equal(shards.arrange(pieces, 1), x)


@pytest.mark.slow
def test_two_three_and_four_ranks(tmp_path: Path) -> None:
    """Results and gradients are those of one process, for every kind of layout; see the module."""
    assert all("all equal" in said for said in run("tests.distributed_context_parallel", 4, tmp_path))


@pytest.mark.parametrize("method", ["ring", "gather"])
def test_one_rank(alone: Ranks, method: str) -> None:
    layout = SnippetLayout.uniform(3, 4)
    shards = ContextShards([4] * 3, snippet_owners(3, 1), 1)
    inputs = [torch.randn(2, 2, 12, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = context_parallel_attention(*inputs, layout, alone, shards, method=method)
    expected = block_causal_attention(*inputs, layout)
    torch.testing.assert_close(out, expected)
    weights = torch.randn_like(out)
    for got, want in zip(*(torch.autograd.grad(y, inputs, weights) for y in (out, expected)), strict=True):
        torch.testing.assert_close(got, want)
    assert alone.received == 0


@pytest.mark.parametrize("forward, backward", [("reference", None), (None, "reference")])
def test_backward_runs_on_the_backend_of_forward(alone: Ranks, monkeypatch, forward, backward) -> None:
    """Also outside of the caller's `use_backend`, or within another one."""
    chosen, select = [], OP.select
    monkeypatch.setattr(OP, "select", lambda *args: (chosen.append(select(*args)), chosen[-1])[1])
    monkeypatch.setattr(api, "usual", lambda *_: False)  # it does not ask
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with use_backend(forward):
        out = context_parallel_attention(q, q, q, SnippetLayout.uniform(1, 4), alone, ContextShards([4], [0], 1))
    with use_backend(backward):
        out.sum().backward()
    assert len(chosen) == 2 and chosen[0] is chosen[1]
    assert chosen[0] is None or forward is None


@pytest.mark.parametrize("backend", [None, "reference"])
def test_backward_does_not_know_autocast(alone: Ranks, backend: str | None) -> None:
    """What surrounds backward is nothing to it: its casts are those of forward."""
    q = torch.randn(1, 2, 8, 8, requires_grad=True)
    layout, shards, grads = SnippetLayout.uniform(2, 4), ContextShards([4, 4], [0, 0], 1), []
    for forward in (False, True):
        for backward in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=forward):
                out = context_parallel_attention(q, q, q, layout, alone, shards, backend=backend)
            with torch.autocast("cpu", torch.bfloat16, enabled=backward):
                grads.append(torch.autograd.grad(out.float().sin().sum(), q)[0])
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[2], grads[3])
    assert not torch.equal(grads[0], grads[2])


def test_explain_sends_nothing(alone: Ranks) -> None:
    """Of two ranks only one is here: what it would send, nobody would take."""
    alone.size = 2
    q, shards = torch.randn(1, 1, 4, 8), ContextShards([4, 4], [0, 1], 2)
    for method in ("ring", "gather"):
        said = explain(context_parallel_attention, q, q, q, SnippetLayout.uniform(2, 4), alone, shards, method=method)
        assert said == explain(block_causal_attention, q, q, q, SnippetLayout.uniform(1, 4))


def test_a_second_derivative_is_an_error(alone: Ranks) -> None:
    shards = ContextShards([4], [0], 1)
    q = torch.randn(1, 1, 4, 8, dtype=torch.float64, requires_grad=True)
    out = context_parallel_attention(q, q, q, SnippetLayout.uniform(1, 4), alone, shards)
    (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_total_has_the_gradient_that_a_mean_makes_right(alone: Ranks) -> None:
    x = torch.ones(2, requires_grad=True)
    assert torch.equal(alone.total(x), x) and alone.total(x) is not x
    assert torch.equal(torch.autograd.grad(alone.total(x).sum(), x)[0], torch.ones(2))


def test_errors(alone: Ranks) -> None:
    layout, shards = SnippetLayout.uniform(3, 4), ContextShards([4] * 3, [0] * 3, 1)
    q = torch.randn(1, 2, 12, 8)

    def attend(q=q, k=q, v=q, layout=layout, shards=shards, **options):
        return context_parallel_attention(q, k, v, layout, alone, shards, **options)

    two = ContextShards([4] * 3, [0, 1, 0], 2)
    for message, call in (
        ("q: expected 12 tokens of rank 0, got 8", lambda: attend(q[:, :, :8])),
        ("k: expected 12 tokens of rank 0, got 8", lambda: attend(k=q[:, :, :8], v=q[:, :, :8])),
        ("v: expected batch, heads and tokens", lambda: attend(v=q[:, :, :8])),
        ("q: expected shards for 1 ranks, got 2", lambda: attend(shards=two)),
        ("k: expected 16 tokens as in the layout", lambda: attend(layout=SnippetLayout.cross([12], [16], [1]))),
        ("method: expected 'ring' or 'gather', got 'tree'", lambda: attend(method="tree")),
        ("gather: x: expected 12 tokens of rank 0 on axis 2, got 8", lambda: alone.gather(q[:, :, :8], shards)),
        ("gather: shards: expected 1 ranks, got 2", lambda: alone.gather(q, two)),
        ("take: x: expected 12 tokens on axis 1, got 2", lambda: shards.take(q, 0, 1)),
        ("owners: expected 3 like lengths, got 2", lambda: ContextShards([1, 2, 3], [0, 0], 1)),
        ("owners: expected ranks below 2, got 2", lambda: ContextShards([1, 2], [0, 2], 2)),
        ("snippets: expected at least one for each of 3 ranks, got 2", lambda: snippet_owners(2, 3)),
        ("ranks: expected 1 to", lambda: snippet_owners(2, 0)),
        ("mesh of one dimension, got 2", lambda: Ranks(init_device_mesh("cpu", (1, 1)))),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for name, wrong, kind in (
        ("layout", None, "SnippetLayout"),
        ("shards", layout, "ContextShards"),
        ("q_shards", [4] * 3, "ContextShards"),
    ):
        with pytest.raises(TypeError, match=f"attention: {name}: expected {kind}, got {type(wrong).__name__}"):
            attend(**{name: wrong})
    with pytest.raises(TypeError, match="attention: ranks: expected Ranks, got NoneType"):
        context_parallel_attention(q, q, q, layout, None, shards)
    with pytest.raises(TypeError, match="scale: expected a number"):
        attend(scale="1")
    with pytest.raises(TypeError, match="k: expected torch"):
        attend(k=q.double())


def test_without_processes() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Ranks()


def test_what_is_printed(capsys: pytest.CaptureFixture) -> None:
    """Bytes that the benchmark counts: of each rank's shard of keys and values in bfloat16, gradients in float32."""
    assert context.main(["--snippets", "16", "--tokens", "500", "--ranks", "4", "--heads", "1", "--dim", "125"]) == 0
    _, *rows = (line.split() for line in capsys.readouterr().out.splitlines())
    shard = 4 * 500 * 125 * 2 / 1e6  # of queries, keys or values, in MB
    ring, gather = (
        [f"{x:.1f}" for x in each] for each in ((6 * shard, 6 * shard + 16 * shard), (6 * shard, 6 * shard))
    )
    assert [row[:3] for row in rows] == [[*"4", m, o] for m in ("ring", "gather") for o in ("zigzag", "runs")]
    assert [row[3:5] for row in rows] == [ring, ring, gather, gather]
    assert [row[-1] for row in rows[::2]] == ["1.000"] * 2 and float(rows[1][-1]) > 1.5
