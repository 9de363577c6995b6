"""A process of test_context_parallel.py: what two, three and four ranks compute of one sequence, against one process.

python -m tests.distributed_context_parallel
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mirasol_kernels import (
    ContextShards,
    Ranks,
    SnippetLayout,
    block_causal_attention,
    context_parallel_attention,
    snippet_owners,
)
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.processes import world

NAMES = "out", "lse", "dq", "dk", "dv"
BATCH, HEADS, KEY_HEADS, DIM, VALUE_DIM = 2, 4, 2, 8, 5


def layouts(ranks: int) -> Iterator[tuple[SnippetLayout, ContextShards, ContextShards]]:
    """Each with where its keys and its queries lie."""
    lengths = [3, 0, 5, 1, 2, 4, 6, 1, 3]  # 9 snippets: a multiple of 3, of neither 2 nor 4
    for zigzag in (True, False):
        owners = snippet_owners(len(lengths), ranks, zigzag=zigzag)
        keys = ContextShards(lengths, owners, ranks)
        asking = np.minimum(lengths, 2)
        yield SnippetLayout.ragged(lengths), keys, keys
        yield SnippetLayout.ragged(lengths, window=3, sink=1), keys, keys
        yield SnippetLayout.ragged(lengths, asking), keys, ContextShards(asking, owners, ranks)
        both = ContextShards([*lengths, *lengths], [*owners, *owners], ranks)
        yield SnippetLayout.teacher_forcing(lengths, window=4, sink=1), both, both
    mixed = ContextShards(lengths, np.arange(9) * 7 % ranks, ranks)  # no order at all
    yield SnippetLayout.batch([SnippetLayout.ragged([5, 9, 11]), SnippetLayout.ragged([2, 2])]), mixed, mixed
    nothing = SnippetLayout.from_ranges([[2, 9], [14, 20]], [[0, 4], [3, 11]], q_len=25, k_len=25)
    yield nothing, mixed, mixed


def evaluate(attend, q: Tensor, k: Tensor, v: Tensor, dout: Tensor, dlse: Tensor) -> list[Tensor]:
    """out, lse and the gradients of q, k and v."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = attend(*inputs)
    weights = dout.to(out.dtype), torch.where(lse == -torch.inf, 0, dlse.to(lse.dtype))
    return [out.detach(), lse.detach(), *torch.autograd.grad((out, lse), inputs, weights)]


def compare(ranks: Ranks, layout: SnippetLayout, keys: ContextShards, queries: ContextShards) -> None:
    """Both methods, in float64 to rounding, in float32 and bfloat16 within the budget; the results of all ranks."""
    q, dout, dlse = (torch.randn(BATCH, HEADS, layout.q_len, width) for width in (DIM, VALUE_DIM, 1))
    k, v = (torch.randn(BATCH, KEY_HEADS, layout.k_len, width) for width in (DIM, VALUE_DIM))
    # Exact in every dtype, so that all of them are asked the same.
    tensors = [((x * 8).round() / 8).clamp(-4, 4) for x in (q, k, v, dout, dlse)]

    def whole(dtype: torch.dtype) -> list[Tensor]:
        def attend(q, k, v):
            return block_causal_attention(q, k, v, layout, return_lse=True, backend="reference")

        *rest, dlse = (x.to(dtype) for x in tensors)
        return evaluate(attend, *rest, dlse[..., 0])

    def shared(dtype: torch.dtype, method: str) -> list[Tensor]:
        def attend(q, k, v):
            return context_parallel_attention(
                q, k, v, layout, ranks, keys, q_shards=queries, method=method, return_lse=True
            )

        places = queries, keys, keys, queries, queries
        *rest, dlse = (where.take(x.to(dtype), ranks.rank) for where, x in zip(places, tensors, strict=True))
        places = queries, queries, queries, keys, keys
        results = evaluate(attend, *rest, dlse[..., 0])
        return [ranks.gather(x, where) for x, where in zip(results, places, strict=True)]

    exact = whole(torch.float64)
    for method in ("ring", "gather"):
        for name, got, expected in zip(NAMES, shared(torch.float64, method), exact, strict=True):
            assert_close_fp64(got, expected, what=f"{method} {layout} {name}")
        for dtype in (torch.float32, torch.bfloat16):
            for name, got, low, expected in zip(NAMES, shared(dtype, method), whole(dtype), exact, strict=True):
                assert_within_budget(got, low, expected, what=f"{dtype} {method} {layout} {name}")


def bytes_and_memory(ranks: Ranks) -> None:
    """What moves is what the formulas say; what a rank keeps for backward is its own tokens."""
    snippets, tokens, size = 4 * ranks.size, 3, 4
    shards = ContextShards([tokens] * snippets, snippet_owners(snippets, ranks.size), ranks.size)
    layout = SnippetLayout.uniform(snippets, tokens)
    mine = shards.count(ranks.rank)
    assert mine * ranks.size == shards.tokens
    inputs = [torch.randn(1, 1, mine, DIM, requires_grad=True) for _ in range(3)]
    shard = 2 * mine * DIM * size  # of keys and values
    for method, forward, backward in (
        ("ring", (ranks.size - 1) * shard, (ranks.size - 1) * shard + ranks.size * shard),
        ("gather", (ranks.size - 1) * shard, (ranks.size - 1) * shard),
    ):
        kept: dict[int, int] = {}

        def keep(x: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        before = ranks.received
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            out = context_parallel_attention(*inputs, layout, ranks, shards, method=method)
        assert ranks.received - before == forward, method
        out.sum().backward()
        assert ranks.received - before == forward + backward, method
        if method == "ring":
            assert sum(kept.values()) == mine * size * (4 * DIM + 1)  # q, k, v, out and lse


def main() -> None:
    with world() as rank:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for size in (2, 3, 4):
            group = None if size == 2 else mesh if size == 4 else dist.new_group(range(size))
            if size == 2:  # a dimension of a mesh: two pairs of ranks, each with a sequence of its own
                group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "sequence"))["sequence"]
            if rank >= 3 and size == 3:
                continue
            ranks = Ranks(group)
            assert ranks.size == size
            torch.manual_seed(size)
            for layout, keys, queries in layouts(size):
                compare(ranks, layout, keys, queries)
            bytes_and_memory(ranks)
        dist.barrier()
    print("all equal")


if __name__ == "__main__":
    main()
