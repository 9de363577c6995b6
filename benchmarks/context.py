"""Attention over a sequence that lies on several ranks: bytes a rank receives and keeps, and how even the work is.

python -m benchmarks.context [--snippets 512] [--tokens 391] [--window N] [--ranks 2 8 64] [--heads 16] [--dim 80]

The op runs as rank 0 of so many, forward and backward, on fake tensors in a fake process group: what it sends and
saves is counted, and nothing is computed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.sweep import positive
from mirasol_kernels import ContextShards, Ranks, SnippetLayout, context_parallel_attention, snippet_owners
from mirasol_kernels.context_parallel import part

METHODS: tuple[Literal["ring", "gather"], ...] = ("ring", "gather")


def unevenness(layout: SnippetLayout, shards: ContextShards) -> float:
    """Pairs of a query and a key of the busiest rank, over the mean."""
    everything = np.array([[0, shards.tokens]])
    pairs = [sum(row.seen for row in part(layout, each, everything)._rows) for each in shards.slices]
    return max(pairs) / (sum(pairs) / len(pairs))


def count(
    layout: SnippetLayout, shards: ContextShards, method: Literal["ring", "gather"], heads: int, dim: int
) -> dict[str, int]:
    """Bytes that rank 0 receives in forward and in backward, and keeps in between, of one layer in bfloat16."""
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    dist.init_process_group("fake", rank=0, world_size=len(shards.slices), store=FakeStore())
    try:
        ranks = Ranks()
        with FakeTensorMode(allow_non_fake_inputs=True):
            shape = 1, heads, shards.count(0), dim
            q, k, v = (torch.empty(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
                out = context_parallel_attention(q, k, v, layout, ranks, shards, method=method)
            forward = ranks.received
            out.backward(torch.empty_like(out))
    finally:
        dist.destroy_process_group()
    return {"forward": forward, "backward": ranks.received - forward, "kept": sum(kept.values())}


def rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    layout = SnippetLayout.uniform(options.snippets, options.tokens, window=options.window)
    for size in options.ranks:
        for method in METHODS:
            for zigzag in (True, False):
                owners = snippet_owners(options.snippets, size, zigzag=zigzag)
                shards = ContextShards([options.tokens] * options.snippets, owners, size)
                counted = count(layout, shards, method, options.heads, options.dim)
                yield (
                    {"ranks": size, "method": method, "owners": "zigzag" if zigzag else "runs"}
                    | {f"{name} MB": f"{number / 1e6:.1f}" for name, number in counted.items()}
                    | {"busiest / mean": f"{unevenness(layout, shards):.3f}"}
                )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.context", description=__doc__.splitlines()[0])
    parser.add_argument("--snippets", type=positive, default=512)
    parser.add_argument("--tokens", type=positive, default=391, help="of a snippet (391: preset 3b, Combiner all)")
    parser.add_argument("--window", type=positive)
    parser.add_argument("--ranks", type=positive, nargs="+", default=[2, 8, 64])
    parser.add_argument("--heads", type=positive, default=16)
    parser.add_argument("--dim", type=positive, default=80)
    options = parser.parse_args(arguments)
    for i, row in enumerate(rows(options)):
        if not i:
            print("  ".join(row))
        print("  ".join(str(value).rjust(len(key)) for key, value in row.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
