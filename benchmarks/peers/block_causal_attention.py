"""Block-causal attention as it is done today, each way as fast as it goes, and ours.

Not here: a bias of xformers, which has no class for it, and a dense one is `dense_mask`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

import mirasol_kernels
from benchmarks.peers import Call, Peer, Problem, anything
from mirasol_kernels import SnippetLayout, block_causal_attention

# Without cuDNN, which some versions of PyTorch prefer and which has a loop of its own; the last where no other can.
FUSED = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
CUDNN = (SDPBackend.CUDNN_ATTENTION,)
PLANS = 16  # of cuDNN, at most
FEW = 16  # rows: neighbouring groups smaller than this share one call with a mask
Forward = Callable[[Tensor, Tensor, Tensor], Tensor]


def both(problem: Problem, forward: Forward) -> Call:
    """The call that a direction means, from a differentiable forward."""
    if problem.direction == "forward":
        return lambda q, k, v, dout: (forward(q, k, v),)

    def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
        out = forward(q, k, v)
        return (out.detach(), *torch.autograd.grad(out, (q, k, v), dout))

    return step


# Ours


def our_reason(backend: str, problem: Problem) -> str | None:
    q, k, v, _ = problem.inputs
    said = mirasol_kernels.explain(block_causal_attention, q, k, v, problem.case.layout, backend=backend)
    reason = said.get(backend, f"no {backend} kernel of this op")
    return None if reason == "runs" else reason


def ours(backend: str, problem: Problem) -> Call:
    layout = problem.case.layout.to(problem.device)
    return both(problem, lambda q, k, v: block_causal_attention(q, k, v, layout, backend=backend))


# A dense mask


def additive(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as numbers to add: a bool one would be converted to this in every call.

    A row that sees nothing sees everything here, and its result is dropped: a softmax of nothing is NaN.
    """
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(
        ~(seen | ~seen.any(-1, keepdim=True)), -torch.inf
    )


def memory_of(device: str) -> int:
    if device == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return torch.cuda.get_device_properties(device).total_memory


def no_mask(most: float, problem: Problem) -> str | None:
    """most: bytes of the mask per pair of a row and a key, while it is made."""
    layout = problem.case.layout
    size = (layout.batch or 1) * layout.q_len * layout.k_len * most
    return f"its mask takes {size / 1e9:.0f} GB to make" if size > memory_of(problem.device) / 3 else None


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """On a GPU the only fused kernel that takes a mask takes no groups of heads, and plain matmuls would stand in:
    there keys and values are repeated."""
    group = q.shape[1] // k.shape[1]
    if group > 1 and q.device.type == "cuda":
        k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] > k.shape[1])


def dense(problem: Problem) -> Call:
    seen = problem.case.layout.dense_mask(problem.device)  # (B or 1, Nq, Nk)
    mask, asks = additive(seen, problem.dtype)[:, None], seen.any(2)[:, None, :, None]

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return masked(q, k, v, mask)

    if bool(asks.all()):
        return both(problem, forward)
    return both(problem, lambda q, k, v: forward(q, k, v).masked_fill(~asks, 0))


# A loop over snippets


class Piece(NamedTuple):
    """Some rows and all keys that they see. mask: only where not every row sees every key."""

    rows: slice
    keys: list[slice]
    mask: Tensor | None = None

    def of_keys(self, x: Tensor) -> Tensor:
        """Without a copy where the keys are one range, which all but windows with sinks are."""
        parts = [x[:, :, keys] for keys in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def pieces(layout: SnippetLayout, dtype: torch.dtype, device: str) -> list[list[Piece]]:
    """Per row of the batch, or once for all: what a loop over snippets calls attention on.

    A run of tiny groups, as text is, where every token is a snippet, becomes one call with its block of the mask.
    """
    tables = layout.tables()
    found = []
    for offsets, groups in zip(tables.q_offsets.tolist(), tables.k_ranges.tolist(), strict=True):
        mine: list[Piece] = []
        for begin, end, ranges in zip(offsets, offsets[1:], groups, strict=False):
            if begin < end:
                mine.append(Piece(slice(begin, end), [slice(i, j) for i, j in ranges if i < j]))
        found.append(mine)
    return [
        [joined(run, seen, dtype, device) if len(run) > 1 else run[0] for run in runs(mine)]
        for mine, seen in zip(found, _masks(layout, found), strict=True)
    ]


def runs(mine: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbouring tiny pieces together, everything else alone."""
    found: list[list[Piece]] = []
    for piece in mine:
        tiny = piece.rows.stop - piece.rows.start < FEW and bool(piece.keys)
        before = found[-1][-1] if found else None
        if tiny and before and before.keys and before.rows.stop - before.rows.start < FEW:
            found[-1].append(piece)
        else:
            found.append([piece])
    return found


def _masks(layout: SnippetLayout, found: Sequence[Sequence[Piece]]) -> Sequence[Tensor | None]:
    needed = any(len(run) > 1 for mine in found for run in runs(mine))
    return list(layout.dense_mask()) if needed else [None] * len(found)


def joined(run: Sequence[Piece], seen: Tensor | None, dtype: torch.dtype, device: str) -> Piece:
    assert seen is not None
    rows = slice(run[0].rows.start, run[-1].rows.stop)
    every = [keys for piece in run for keys in piece.keys]
    keys = slice(min(k.start for k in every), max(k.stop for k in every))
    return Piece(rows, [keys], additive(seen[rows, keys], dtype).to(device))


def per_batch_row(x: Tensor, b: int, tables: int) -> Tensor:
    return x if tables == 1 else x[b : b + 1]


Attend = Callable[[Tensor, Tensor, Tensor, "Tensor | None"], Tensor]


def of_torch(problem: Problem) -> Attend:
    group, learning = problem.case.group, problem.direction == "backward"

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            return masked(q, k, v, mask)
        if group == 1 or learning:
            return sdpa(q, k, v, enable_gqa=group > 1)
        folded = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, Hkv, g*n, D): keys are read once for all their heads
        return sdpa(folded, k, v).unflatten(2, (group, -1)).flatten(1, 2)

    return attend


def of_cudnn(problem: Problem) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return sdpa(q, k, v, attn_mask=mask, enable_gqa=problem.case.group > 1)

    return attend


def many_plans(problem: Problem) -> str | None:
    """cuDNN makes a plan for every shape at its first call, some 0.4 s each as reported."""
    shapes = {
        (piece.rows.stop - piece.rows.start, sum(keys.stop - keys.start for keys in piece.keys))
        for mine in pieces(problem.case.layout, problem.dtype, "cpu")
        for piece in mine
    }
    return f"cuDNN would plan {len(shapes)} shapes, each by itself" if len(shapes) > PLANS else None


def of_flash_attn(problem: Problem) -> Attend:
    from flash_attn import flash_attn_func

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is None
        return flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return attend


def of_xformers(problem: Problem) -> Attend:
    from xformers.ops import memory_efficient_attention

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, D)
        if problem.case.group > 1:
            k, v = (x.repeat_interleave(problem.case.group, 2) for x in (k, v))
        assert mask is None
        return memory_efficient_attention(q, k, v).transpose(1, 2)

    return attend


def not_installed(package: str, problem: Problem) -> str | None:
    """And, since neither takes a mask of any alignment, that a run of tiny snippets needs one."""
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if any(piece.mask is not None for mine in pieces(problem.case.layout, problem.dtype, "cpu") for piece in mine):
        return "no masks, which runs of tiny snippets need"
    return None


def loop(problem: Problem, of: Callable[[Problem], Attend] = of_torch, kernels: Sequence[SDPBackend] = FUSED) -> Call:
    """kernels: of PyTorch's attention, those that may be chosen on a GPU."""
    found, attend = pieces(problem.case.layout, problem.dtype, problem.device), of(problem)

    def one(q: Tensor, k: Tensor, v: Tensor, mine: Sequence[Piece]) -> Tensor:
        outs = [
            attend(q[:, :, piece.rows], piece.of_keys(k), piece.of_keys(v), piece.mask)
            if piece.keys
            else torch.zeros_like(q[:, :, piece.rows])
            for piece in mine
        ]
        return outs[0] if len(outs) == 1 else torch.cat(outs, 2)

    def forward(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        with sdpa_kernel(list(kernels)) if problem.device != "cpu" else contextlib.nullcontext():
            for b, mine in enumerate(found):
                q_, k_, v_ = (per_batch_row(x, b, len(found)) for x in (q, k, v))
                outs.append(one(q_, k_, v_, mine))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    return both(problem, forward)


# ATen's flash kernel per snippet: as the loop, but gradients of keys are added in place, not kept per snippet

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def no_flash(problem: Problem) -> str | None:
    return "backward only: forward it is per_snippet" if problem.direction == "forward" else None


def flash_loop(problem: Problem) -> Call:
    found = pieces(problem.case.layout, problem.dtype, problem.device)

    def step(q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
        out, dq, dk, dv = torch.empty_like(q), torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for b, mine in enumerate(found):
            q_, k_, v_, dout_, out_, dq_, dk_, dv_ = (
                per_batch_row(x, b, len(found)) for x in (q, k, v, dout, out, dq, dk, dv)
            )
            for piece in mine:
                rows = piece.rows
                if not piece.keys:
                    out_[:, :, rows], dq_[:, :, rows] = 0, 0
                    continue
                some = q_[:, :, rows], piece.of_keys(k_), piece.of_keys(v_)
                o, lse = flash(*some, attn_mask=piece.mask)
                gq, gk, gv = flash_backward(dout_[:, :, rows], *some, o, lse, 0.0, False, attn_mask=piece.mask)
                out_[:, :, rows], dq_[:, :, rows] = o, gq
                sizes = [keys.stop - keys.start for keys in piece.keys]
                for total, gradient in ((dk_, gk), (dv_, gv)):
                    for keys, part in zip(piece.keys, gradient.split(sizes, 2), strict=True):
                        total[:, :, keys] += part
        return out, dq, dk, dv

    return step


# In float32 with the casts counted: on a CPU without instructions for half precision this is the way to beat


def widened(prepare: Callable[[Problem], Call], problem: Problem) -> Call:
    wide = prepare(problem._replace(dtype=torch.float32))

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        results = wide(*(x.float() for x in inputs))
        return tuple(x.to(problem.dtype) for x in results)

    return call


# FlexAttention


def no_flex(problem: Problem) -> str | None:
    if problem.device == "cpu" and problem.direction == "backward":
        return "has no backward on a CPU"
    if problem.device == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler"
    return no_mask(12 if problem.device == "cpu" else 1, problem)


def flex(problem: Problem) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    layout, grouped = problem.case.layout, problem.case.group > 1
    tables = layout.tables()
    each = [offsets.diff() for offsets in tables.q_offsets]
    per_row = torch.stack([t.repeat_interleave(n, 0) for t, n in zip(tables.k_ranges, each, strict=True)])
    # Flat and contiguous, or Inductor's C++ refuses them.  (Bt * Nq,) each
    columns = [column.to(problem.device, copy=True).flatten() for column in per_row.flatten(2).unbind(2)]
    rows, prefix = layout.q_len, per_row.shape[2] == 1 and not bool(per_row[..., 0].any())

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        at = row if len(per_row) == 1 else b * rows + row
        if prefix:
            return key < columns[1][at]
        inside = (columns[0][at] <= key) & (key < columns[1][at])
        for begin, end in zip(columns[2::2], columns[3::2], strict=True):
            inside = inside | ((begin[at] <= key) & (key < end[at]))
        return inside

    sizes = layout.batch, None, layout.q_len, layout.k_len
    mask = create_block_mask(seen, *sizes, device=problem.device, _compile=problem.device != "cpu")
    torch._dynamo.reset()  # else the eighth shape would be one too many to compile
    compiled = torch.compile(flex_attention, dynamic=False)
    call = both(problem, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped))
    with torch.set_grad_enabled(problem.direction == "backward"):
        call(*problem.inputs)
    return call


HALF = (torch.bfloat16, torch.float16)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("native", partial(ours, "native"), partial(our_reason, "native"), True, ("cpu",)),
        Peer("triton", partial(ours, "triton"), partial(our_reason, "triton"), True, ("cuda",)),
        Peer("cuda", partial(ours, "cuda"), partial(our_reason, "cuda"), True, ("cuda",)),
        Peer("reference", partial(ours, "reference")),
        Peer("dense_mask", dense, partial(no_mask, 6)),
        Peer("per_snippet", loop),
        Peer(
            "cudnn_per_snippet", partial(loop, of=of_cudnn, kernels=CUDNN), many_plans, devices=("cuda",), dtypes=HALF
        ),
        Peer(
            "flash_attn", partial(loop, of=of_flash_attn), partial(not_installed, "flash_attn"), False, ("cuda",), HALF
        ),
        Peer("xformers", partial(loop, of=of_xformers), partial(not_installed, "xformers"), devices=("cuda",)),
        Peer("flash_per_snippet", flash_loop, no_flash, devices=("cpu",)),
        Peer("flex", flex, no_flex),
        Peer("float32_dense_mask", partial(widened, dense), partial(no_mask, 6), False, ("cpu",), HALF),
        Peer("float32_per_snippet", partial(widened, loop), anything, False, ("cpu",), HALF),
        Peer("float32_flash", partial(widened, flash_loop), no_flash, False, ("cpu",), HALF),
    )
}
