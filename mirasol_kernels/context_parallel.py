"""Attention over one sequence whose tokens lie on several ranks, for `torch.distributed`.

A rank's queries against another rank's keys are a layout again: `part` cuts it out of the whole one, and no row then
sees more ranges than before.  So attention over ranks is `block_causal_attention` of such parts, merged through lse:

    lse = log sum_s exp(lse_s)        out = sum_s exp(lse_s - lse) out_s        s: the ranks that hold keys

Keys and values go round in a ring (arXiv 2310.01889), so a rank never holds more than its own and one other shard of
them; backward sends them round again, with their gradients.  In a block-causal layout the owner of the last snippets
would do most of the work, so ranks own one piece from the front and one from the back (zigzag).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirasol_kernels import _ranges
from mirasol_kernels._autocast import without_autocast
from mirasol_kernels._dispatch import explaining, use_backend, wanted_backend
from mirasol_kernels.block_causal_attention import block_causal_attention
from mirasol_kernels.block_causal_attention.api import check_scale, checked
from mirasol_kernels.layout import Ints, SnippetLayout

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

Piece = tuple[Tensor, ...]


def snippet_owners(snippets: int, ranks: int, *, zigzag: bool = True) -> np.ndarray:
    """(T,) the rank of each of T snippets: as many for each as for any other, but one.

    zigzag: half of a rank's snippets from the front and half from the back, so that the work of block-causal attention
    is shared as evenly as the snippets; otherwise one run of snippets for each.
    Raises ValueError if there is no snippet for some rank.
    """
    snippets = _ranges.read_int("snippet_owners: snippets", snippets)
    ranks = _ranges.read_int("snippet_owners: ranks", ranks, 1)
    if snippets < ranks:
        raise ValueError(f"snippet_owners: snippets: expected at least one for each of {ranks} ranks, got {snippets}")
    rank = np.arange(ranks)
    each = snippets // ranks + (rank < snippets % ranks)
    if not zigzag:
        return np.repeat(rank, each)
    return np.concatenate([np.repeat(rank, each // 2), np.repeat(rank[::-1], (each - each // 2)[::-1])])


class ContextShards:
    """Which tokens of a sequence lie on which rank: whole snippets, in their order.

    lengths: (T,) tokens of each snippet, zero included.  owners: (T,) the rank of each, for example of
    `snippet_owners`.  ranks: how many there are.  Queries and keys of one attention share owners, and may differ in
    lengths.
    """

    tokens: int  # of the whole sequence
    slices: tuple[np.ndarray, ...]  # per rank (S, 2): [begin, end) of its runs of tokens, sorted, disjoint

    def __init__(self, lengths: Ints, owners: Ints, ranks: int) -> None:
        where = "ContextShards"
        sizes = _ranges.read_lengths(f"{where}: lengths", lengths)
        owner = _ranges.read_lengths(f"{where}: owners", owners, total=False)
        if len(owner) != len(sizes):
            raise ValueError(f"{where}: owners: expected {len(sizes)} like lengths, got {len(owner)}")
        ranks = _ranges.read_int(f"{where}: ranks", ranks, 1)
        if owner.max(initial=0) >= ranks:
            raise ValueError(f"{where}: owners: expected ranks below {ranks}, got {owner.max()}")
        ends = _ranges.offsets_of(sizes)
        runs = np.stack([ends[:-1], ends[1:]], 1)
        self.tokens = int(ends[-1])
        self.slices = tuple(_joined(runs[owner == rank]) for rank in range(ranks))

    def _meaning(self) -> tuple:
        return (self.tokens, *(slices.tobytes() for slices in self.slices))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ContextShards) and self._meaning() == other._meaning()

    def __hash__(self) -> int:
        return hash(self._meaning())

    def count(self, rank: int) -> int:
        """Tokens of a rank."""
        return int((self.slices[rank][:, 1] - self.slices[rank][:, 0]).sum())

    def take(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """The tokens of a rank, of all along `dim`."""
        if x.shape[dim] != self.tokens:
            raise ValueError(f"ContextShards.take: x: expected {self.tokens} tokens on axis {dim}, got {x.shape[dim]}")
        pieces = [x.narrow(dim, begin, end - begin) for begin, end in self.slices[rank].tolist()]
        return torch.cat(pieces, dim) if pieces else x.narrow(dim, 0, 0)

    def arrange(self, shards: Sequence[Tensor], dim: int = 2) -> Tensor:
        """All tokens in order, from those of each rank: the inverse of `take`."""
        runs: list[tuple[int, Tensor]] = []
        for shard, slices in zip(shards, self.slices, strict=True):
            sizes = (slices[:, 1] - slices[:, 0]).tolist()
            runs += zip(slices[:, 0].tolist(), shard.split(sizes, dim) if sizes else (), strict=True)
        ordered = [run for _, run in sorted(runs, key=lambda run: run[0])]
        return torch.cat(ordered, dim) if ordered else shards[0]


def part(layout: SnippetLayout, queries: np.ndarray, keys: np.ndarray) -> SnippetLayout:
    """The layout of some query rows and some keys of another: both (S, 2), sorted and disjoint [begin, end)."""
    rows = [_ranges.part(row, queries, keys) for row in layout._rows]
    k_len = int((keys[:, 1] - keys[:, 0]).sum())
    return SnippetLayout("part of " + layout._kind, rows, k_len, layout.batch)


@functools.lru_cache(maxsize=64)
def _parts(layout: SnippetLayout, q_shards: ContextShards, shards: ContextShards, rank: int) -> list[SnippetLayout]:
    """Of one rank's queries and each rank's keys; the layers of a model ask for the same ones."""
    return [part(layout, q_shards.slices[rank], keys) for keys in shards.slices]


@functools.lru_cache(maxsize=64)
def _rows(layout: SnippetLayout, q_shards: ContextShards, rank: int) -> SnippetLayout:
    """Of one rank's queries and all keys."""
    return part(layout, q_shards.slices[rank], np.array([[0, layout.k_len]]))


class Ranks:
    """The processes that share a sequence, and how many bytes this one has received from the others.

    group: a `ProcessGroup`, a `DeviceMesh` of one dimension, or None for every process.
    received: bytes so far.  Of a collective it is what arrives under the ring algorithms, which move the least: n - 1
    shards, as large as the largest.
    """

    def __init__(self, group: ProcessGroup | DeviceMesh | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("Ranks: group: expected torch.distributed.init_process_group to have been called")
        if group is not None and not isinstance(group, dist.ProcessGroup):
            if group.ndim != 1:
                raise ValueError(f"Ranks: group: expected a mesh of one dimension, got {group.ndim}")
            group = group.get_group()
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.received = 0

    def gather(self, x: Tensor, shards: ContextShards, dim: int = 2) -> Tensor:
        """The tokens of every rank in order, from this rank's along `dim`, on every rank.

        Differentiable: the gradient of x is the sum of what all ranks have for it, so that every rank must take part in
        backward too.  Raises ValueError if x has not this rank's number of tokens.
        """
        self._check("gather", shards)
        if x.shape[dim] != shards.count(self.rank):
            expected = f"{shards.count(self.rank)} tokens of rank {self.rank} on axis {dim}"
            raise ValueError(f"Ranks.gather: x: expected {expected}, got {x.shape[dim]}")
        return _Gather.apply(x, self, shards, dim)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x over all ranks, as a value: the gradient of x is that of the sum times the number of ranks.

        So a loss that is a sum over ranks, each of which differentiates its own term, has its exact gradient after the
        mean over ranks that DistributedDataParallel and `fully_shard` take.
        """
        return _Total.apply(x, self)

    def _check(self, call: str, shards: ContextShards) -> None:
        if len(shards.slices) != self.size:
            raise ValueError(f"Ranks.{call}: shards: expected {self.size} ranks, got {len(shards.slices)}")

    def all_shards(self, x: Tensor, counts: Sequence[int], dim: int) -> list[Tensor]:
        """x of every rank, whose lengths along `dim` are `counts`."""
        longest = max(counts)
        mine = x.movedim(dim, 0)
        padded = mine.new_zeros(longest, *mine.shape[1:])
        padded[: len(mine)] = mine
        out = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(out, padded, group=self.group)
        self._count(padded, self.size - 1)
        return [shard[:n].movedim(0, dim) for shard, n in zip(out, counts, strict=True)]

    def sum_shards(self, shards: Sequence[Tensor], counts: Sequence[int], dim: int) -> Tensor:
        """This rank's of the given shards, summed over the ranks."""
        longest = max(counts)
        first = shards[0].movedim(dim, 0)
        padded = first.new_zeros(self.size, longest, *first.shape[1:])
        for row, shard, n in zip(padded, shards, counts, strict=True):
            row[:n] = shard.movedim(dim, 0)
        out = torch.empty_like(padded[0])
        dist.reduce_scatter(out, list(padded), group=self.group)
        self._count(out, self.size - 1)
        return out[: counts[self.rank]].movedim(0, dim)

    def pass_on(self, mine: Piece, theirs: Piece) -> list[Any]:
        """Begin to send `mine` to the next rank and to receive `theirs`, to be waited for, from the one before."""
        after, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        if self.group is not None:
            after, before = (dist.get_global_rank(self.group, rank) for rank in (after, before))
        sends = [dist.P2POp(dist.isend, x, after, self.group) for x in mine if x.numel()]
        takes = [dist.P2POp(dist.irecv, x, before, self.group) for x in theirs if x.numel()]
        for x in theirs:
            self._count(x)
        return dist.batch_isend_irecv(sends + takes) if sends or takes else []

    def _count(self, x: Tensor, times: int = 1) -> None:
        self.received += times * x.numel() * x.element_size()


@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    ranks: Ranks,
    shards: ContextShards,
    *,
    q_shards: ContextShards | None = ...,
    method: Literal["ring", "gather"] = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    ranks: Ranks,
    shards: ContextShards,
    *,
    q_shards: ContextShards | None = ...,
    method: Literal["ring", "gather"] = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    ranks: Ranks,
    shards: ContextShards,
    *,
    q_shards: ContextShards | None = None,
    method: Literal["ring", "gather"] = "ring",
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`block_causal_attention` of a sequence that lies on several ranks: each gives its tokens and gets their result.

    q (B, Hq, this rank's queries, D), k (B, Hkv, this rank's keys, D), v (B, Hkv, this rank's keys, Dv); dtypes, scale,
    lse, backend and errors as in `block_causal_attention`.
    layout: of the whole sequence, the same on every rank.
    shards: where the keys lie; q_shards: where the queries lie, by default with the keys.
    method: "ring" holds two shards of keys and values at a time, and computes each part's forward again in backward;
        "gather" holds them all on every rank, also until backward.

    Gradients of q, k and v, through lse too; once differentiable.  Every rank must call it, and its backward, in the
    same order.  Raises ValueError or TypeError naming the argument, before anything is sent.
    """
    op = "context_parallel_attention"
    q_shards = shards if q_shards is None else q_shards
    for name, given, kind in (
        ("layout", layout, SnippetLayout),
        ("ranks", ranks, Ranks),
        ("shards", shards, ContextShards),
        ("q_shards", q_shards, ContextShards),
    ):
        if not isinstance(given, kind):
            raise TypeError(f"{op}: {name}: expected {kind.__name__}, got {type(given).__name__}")
    if method not in ("ring", "gather"):
        raise ValueError(f"{op}: method: expected 'ring' or 'gather', got {method!r}")
    q, k, v = checked(q, k, v)
    check_scale(op, scale)
    for name, x, held in (("q", q, q_shards), ("k", k, shards)):
        if len(held.slices) != ranks.size:
            raise ValueError(f"{op}: {name}: expected shards for {ranks.size} ranks, got {len(held.slices)}")
        if x.shape[2] != held.count(ranks.rank):
            expected = f"{held.count(ranks.rank)} tokens of rank {ranks.rank}"
            raise ValueError(f"{op}: {name}: expected {expected}, got {x.shape[2]}")
    layout.validate(q_shards.tokens, shards.tokens, q.shape[0], op=op)
    if explaining():  # of this rank's own keys, before any are sent
        mine = _parts(layout, q_shards, shards, ranks.rank)[ranks.rank]
        block_causal_attention(q, k, v, mine, scale=scale, backend=backend)
    if method == "gather":
        keys, values = ranks.gather(k, shards), ranks.gather(v, shards)
        rows = _rows(layout, q_shards, ranks.rank)
        out, lse = block_causal_attention(q, keys, values, rows, scale=scale, return_lse=True, backend=backend)
    else:
        parts = _parts(layout, q_shards, shards, ranks.rank)
        out, lse = _Ring.apply(q, k, v, ranks, parts, scale, backend or wanted_backend())
    return (out, lse) if return_lse else out


class _Ring(torch.autograd.Function):
    """Of this rank's q, k and v; parts[r]: the layout of its queries and rank r's keys."""

    @staticmethod
    def forward(ctx, q, k, v, ranks, parts, scale, backend):
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full(q.shape[:3], -torch.inf, dtype=wide)
        out = q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
        for owner, (keys, values) in _going_round(ranks, parts, k, v):
            if not _seen(parts[owner]):
                continue
            more, more_lse = block_causal_attention(
                q, keys, values, parts[owner], scale=scale, return_lse=True, backend=backend
            )
            both = torch.logaddexp(lse, more_lse)
            out = _share(lse, both) * out + _share(more_lse, both) * more
            lse = both
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = ranks, parts, scale, backend
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, out, lse = ctx.saved_tensors
        ranks, parts, scale, backend = ctx.rest
        wide = lse.dtype
        # out = sum_s w_s out_s and d w_s = w_s d(lse_s - lse): what reaches lse_s is w_s (dout . (out_s - out) + dlse)
        delta = (dout.to(wide) * out.to(wide)).sum(3) - dlse  # (B, Hq, Nq)
        dq = torch.zeros_like(q, dtype=wide)
        gradients: Piece = tuple(torch.zeros_like(x, dtype=wide, memory_format=torch.contiguous_format) for x in (k, v))
        waiting: list[Any] = []
        arriving = gradients
        for owner, (keys, values) in _going_round(ranks, parts, k, v):
            _wait(waiting)  # the gradients that belong to these keys, as far as the ranks before this one go
            gradients = arriving
            if _seen(parts[owner]):
                # Its wish as it was in forward: backward may run in another thread, or outside of the caller's `with`,
                # or within another one; and q, keys and values are already what autocast then made of them.
                with without_autocast(q.device.type):
                    with torch.enable_grad(), use_backend(backend):
                        inputs = [x.detach().requires_grad_() for x in (q, keys, values)]
                        results = block_causal_attention(*inputs, parts[owner], scale=scale, return_lse=True)
                    more, more_lse = (x.detach() for x in results)
                    share = _share(more_lse, lse)  # (B, Hq, Nq, 1)
                    to_lse = share[..., 0] * ((dout.to(wide) * more.to(wide)).sum(3) - delta)
                    mine, *theirs = torch.autograd.grad(results, inputs, [(share * dout).to(q.dtype), to_lse])
                dq += mine
                for total, more in zip(gradients, theirs, strict=True):
                    total += more
            if ranks.size > 1:  # they go one step further than the keys: home
                sizes = [parts[(owner - 1) % ranks.size].k_len]
                arriving = tuple(x.new_empty(*x.shape[:2], *sizes, x.shape[3]) for x in gradients)
                waiting = ranks.pass_on(gradients, arriving)
        _wait(waiting)
        dk, dv = arriving
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def _going_round(ranks: Ranks, parts: list[SnippetLayout], k: Tensor, v: Tensor) -> Any:
    """(owner, its keys and values) for every rank, beginning here; the next ones travel while these are used."""
    piece: Piece = (k.contiguous(), v.contiguous())
    for turn in range(ranks.size):
        owner = (ranks.rank - turn) % ranks.size
        coming, waiting = piece, []
        if turn < ranks.size - 1:
            tokens = parts[(owner - 1) % ranks.size].k_len
            coming = tuple(x.new_empty(*x.shape[:2], tokens, x.shape[3]) for x in piece)
            waiting = ranks.pass_on(piece, coming)
        yield owner, piece
        _wait(waiting)
        piece = coming


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()


def _seen(layout: SnippetLayout) -> bool:
    return any(len(row.ranges) for row in layout._rows)


def _share(some: Tensor, all_of_it: Tensor) -> Tensor:
    """exp(some - all) of two lse (B, H, N), 0 where nothing is seen: (B, H, N, 1)"""
    return (some - all_of_it.masked_fill(all_of_it == -torch.inf, 0)).exp()[..., None]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks, shards, dim):
        ctx.rest = ranks, shards, dim
        counts = [shards.count(rank) for rank in range(ranks.size)]
        return shards.arrange(ranks.all_shards(x, counts, dim), dim)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ranks, shards, dim = ctx.rest
        counts = [shards.count(rank) for rank in range(ranks.size)]
        pieces = [shards.take(grad, rank, dim) for rank in range(ranks.size)]
        return ranks.sum_shards(pieces, counts, dim), None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, ranks):
        ctx.size = ranks.size
        x = x.clone()
        dist.all_reduce(x, group=ranks.group)
        ranks._count(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.size, None


def _joined(runs: np.ndarray) -> np.ndarray:
    """Sorted [begin, end) (S, 2), of which those that touch become one and empty ones go."""
    runs = runs[runs[:, 0] < runs[:, 1]]
    apart = runs[1:, 0] > runs[:-1, 1]
    first, last = np.append(True, apart), np.append(apart, True)
    return np.stack([runs[first[: len(runs)], 0], runs[last[: len(runs)], 1]], 1)
