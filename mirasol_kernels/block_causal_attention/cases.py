"""Named sample inputs that tests, benchmarks and `python -m mirasol_kernels --check` share."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol_kernels._check import Case
from mirasol_kernels.block_causal_attention.api import block_causal_attention
from mirasol_kernels.layout import SnippetLayout

Make = Callable[..., Tensor]


def contiguous(make: Make, b: int, h: int, n: int, d: int) -> Tensor:
    return make(b, h, n, d)


def transposed(make: Make, b: int, h: int, n: int, d: int) -> Tensor:
    """The view of (B, N, H, D) that a projection of tokens gives."""
    return make(b, n, h, d).transpose(1, 2)


def packed(make: Make, b: int, h: int, n: int, d: int) -> Tensor:
    """One of q, k and v of a joint projection (B, N, 3, H, D)."""
    return make(b, n, 3, h, d)[:, :, 1].transpose(1, 2)


def sliced(make: Make, b: int, h: int, n: int, d: int) -> Tensor:
    """Part of a longer sequence with wider heads: odd strides and an offset."""
    return make(b, h, n + 3, d + 5)[:, :, 2 : n + 2, 3 : d + 3]


def scattered(make: Make, b: int, h: int, n: int, d: int) -> Tensor:
    """The last dimension has a stride."""
    return make(b, h, d, n).transpose(2, 3)


@dataclass(frozen=True)
class Problem:
    """Sizes of one call.  Query heads are heads * group; logits: the size of the largest q.k, where it matters."""

    layout: Callable[[], SnippetLayout]
    batch: int = 1
    heads: int = 1
    group: int = 1
    dim: int = 16
    value_dim: int | None = None
    view: Callable[..., Tensor] = contiguous
    scale: float | None = None
    logits: float | None = None

    @property
    def factor(self) -> float:
        """The scale that is meant."""
        return self.dim**-0.5 if self.scale is None else self.scale


uniform, ragged, cross, forcing = (
    functools.partial(functools.partial, constructor)
    for constructor in (
        SnippetLayout.uniform,
        SnippetLayout.ragged,
        SnippetLayout.cross,
        SnippetLayout.teacher_forcing,
    )
)


def holes() -> SnippetLayout:
    """Rows 3..6 and 9 see nothing, and nobody sees keys 0, 5 and 6."""
    return SnippetLayout.from_ranges([(0, 3), (0, 3), (7, 9)], [(1, 5), (7, 9), (3, 5)], q_len=10, k_len=9)


def four_ranges() -> SnippetLayout:
    keys = [(0, 2), (5, 9), (20, 21), (70, 90)]
    return SnippetLayout.from_ranges([(0, 40)] * 4 + [(40, 77)], [*keys, (0, 90)])


def videos() -> SnippetLayout:
    """One video per batch row, of different lengths."""
    return SnippetLayout.batch(
        [SnippetLayout.uniform(4, 9), SnippetLayout.ragged([5, 20], window=1), SnippetLayout.ragged([0])]
    )


def prefixes() -> SnippetLayout:
    """Two sequences of text with blocks of image tokens, the second padded on the left."""
    ids = [[-1, 0, 0, 0, -1, -1, 1, 1, -1], [-1, -1, -1, 0, 0, -1, -1, 1, 1]]
    return SnippetLayout.from_block_ids(ids, valid=[[1] * 9, [0] * 2 + [1] * 7])


def packed_videos() -> SnippetLayout:
    return SnippetLayout.packed([SnippetLayout.uniform(3, 11), SnippetLayout.uniform(2, 5, window=1)])


PROBLEMS: dict[str, Problem] = {
    "small": Problem(uniform(3, 4), batch=2, heads=2),
    "odd": Problem(uniform(5, 7), heads=3, dim=33, value_dim=17),
    "gqa": Problem(uniform(4, 10), batch=2, heads=2, group=3, view=transposed),
    "window_sink": Problem(uniform(12, 6, window=3, sink=2), heads=2, dim=24),
    "last_queries": Problem(uniform(6, 13, q_tokens=4), batch=2, heads=2, group=2, dim=64),
    "ragged": Problem(ragged([5, 0, 63, 1, 64, 2]), heads=2, dim=80),
    "ragged_queries": Problem(ragged([8, 3, 0, 21], [2, 0, 5, 1], window=2, sink=1), batch=2, dim=96, view=packed),
    "teacher_forcing": Problem(forcing([4, 9, 1, 16]), heads=2, dim=32, view=transposed),
    "teacher_forcing_window_sink": Problem(forcing([6] * 7, window=2, sink=1), batch=2, heads=1, group=2),
    "cross": Problem(cross([3, 10, 2], [7, 5, 11], [1, 3, 2], [0, 1, 2]), batch=2, heads=2),
    "empty_rows": Problem(holes, batch=2, heads=2, group=2, view=sliced),
    "four_ranges": Problem(four_ranges, heads=2),
    "block_ids": Problem(prefixes, batch=2, heads=2),
    "batch": Problem(videos, batch=3, heads=2, group=2, view=transposed),
    "packed": Problem(packed_videos, batch=2, heads=2),
    "dim_1": Problem(uniform(3, 5), heads=2, dim=1),
    "dim_80_of_values_64": Problem(uniform(2, 33), heads=2, dim=80, value_dim=64, view=packed),
    "dim_128": Problem(uniform(2, 65), heads=1, group=2, dim=128),
    "dim_256": Problem(uniform(3, 31), dim=256),
    "tile_less_one": Problem(uniform(2, 63), dim=64),
    "tile": Problem(uniform(2, 64), dim=64),
    "tile_and_one": Problem(uniform(2, 65), dim=64),
    "long": Problem(uniform(20, 52, window=4, sink=1), heads=2, dim=64, view=transposed),
    "one_row": Problem(cross([1], [1100, 1100], [2]), heads=2, dim=64, view=transposed),
    "few_rows": Problem(cross([2, 1], [70, 60], [1, 2]), batch=2, heads=2, group=2, dim=33, value_dim=40),
    "sliced": Problem(uniform(3, 20), batch=2, heads=2, group=2, dim=40, view=sliced),
    "scattered": Problem(uniform(3, 6), batch=2, heads=2, view=scattered),
    "scale": Problem(uniform(4, 6), heads=2, scale=-0.3),
    "large_logits": Problem(uniform(4, 16), heads=2, dim=64, logits=1e4),
    "large_logits_of_one_row": Problem(cross([1], [300], [1]), batch=2, heads=2, dim=64, logits=1e4),
    "large_logits_of_few_rows": Problem(cross([8], [300], [1]), batch=2, heads=2, dim=64, logits=1e4),
    "large_logits_of_one_row_dim_80": Problem(cross([1], [300], [1]), batch=2, heads=2, dim=80, logits=1e4),
    "large_logits_of_few_rows_dim_128": Problem(cross([8], [300], [1]), batch=2, heads=2, dim=128, logits=1e4),
    "one_token": Problem(uniform(1, 1), heads=1),
    "no_batch": Problem(uniform(2, 3), batch=0, heads=2),
    "no_queries": Problem(cross([0], [5], [1]), heads=2),
    "no_keys": Problem(cross([4], [0], [1]), batch=2, heads=2),
}


def cases(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Every named case on `device`: the same numbers everywhere, drawn in float64 and rounded to dtype."""
    for name, problem in PROBLEMS.items():
        yield build(name, problem, device, dtype)


def build(name: str, problem: Problem, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """`problem` with numbers that `name` seeds."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def make(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64).to(device, dtype)

    layout, (b, h, d) = problem.layout(), (problem.batch, problem.heads, problem.dim)
    q = problem.view(make, b, h * problem.group, layout.q_len, d)
    k = problem.view(make, b, h, layout.k_len, d)
    v = problem.view(make, b, h, layout.k_len, problem.value_dim or d)
    if problem.logits:
        q = q * (problem.logits / problem.factor / (q @ k.mT).abs().max())

    def call(q: Tensor, k: Tensor, v: Tensor, *, backend: str | None = None) -> tuple[Tensor, ...]:
        return block_causal_attention(q, k, v, layout, scale=problem.scale, return_lse=True, backend=backend)

    return Case(name, call, {"q": q, "k": k, "v": v})
