"""The function users call: what it means, what it accepts, which backend runs."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mirasol_kernels.block_causal_attention import reference
from mirasol_kernels.block_causal_attention.op import OP, Fused, unit_stride
from mirasol_kernels.layout import SnippetLayout

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LARGEST_HEAD = 256


@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...
@overload
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def block_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SnippetLayout,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which every query row sees the few ranges of keys that `layout` gives it.

        out_i = sum_j p_ij v_j,  p_ij = exp(scale q_i.k_j - lse_i),  lse_i = log sum_j exp(scale q_i.k_j),  j seen by i

    q: (B, Hq, Nq, D), k: (B, Hkv, Nk, D), v: (B, Hkv, Nk, Dv), all of one dtype (float32, float16, bfloat16; float64
    on the reference) and on one device.  Hq is a multiple of Hkv: query head h reads key head h // (Hq // Hkv).  D and
    Dv up to 256.  A transposed view of (B, N, H, D) costs no copy; only a last dimension with a stride does.
    layout: Nq = layout.q_len, Nk = layout.k_len, and B = layout.batch where it has one.
    scale: factor of q.k, 1/sqrt(D) by default.
    return_lse: also return lse, the natural logarithm of the softmax's denominator.
    backend: one of native, triton, cuda, reference; by default the first that serves the call.

    Returns out (B, Hq, Nq, Dv) in q's dtype, and lse (B, Hq, Nq) in float32 (float64 for float64) if asked for.  A row
    that sees nothing gives 0, lse -inf and no gradient.  Differentiable in q, k and v, through lse too; the result and
    the gradients are bitwise reproducible.  Fused backends keep q, k, v, out and lse (in two floats) for backward
    and can be differentiated once, the reference as often as needed.  Under autocast q, k and v are cast as PyTorch's
    own attention does.  There is no dropout, bias or softcap.

    Raises ValueError or TypeError naming the argument, before anything is computed; NotImplementedError with the reason
    if `backend` cannot serve the call.
    """
    check(q, k, v)
    check_scale(OP.name, scale)
    if not isinstance(layout, SnippetLayout):
        raise TypeError(f"{OP.name}: layout: expected a SnippetLayout, got {type(layout).__name__}")
    layout.validate(q.shape[2], k.shape[2], q.shape[0], op=OP.name)
    q, k, v = cast(q), cast(k), cast(v)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tables = layout.tables(q.device)
    chosen = OP.select((q, k, v, *tables, scale, backend), backend)
    if chosen is None:
        out, lse = reference.block_causal_attention(q, k, v, tables.q_offsets, tables.k_ranges, scale, layout.span)
    else:
        out, lse, _ = Fused.apply(unit_stride(q), unit_stride(k), unit_stride(v), *tables, scale, chosen.name)
    return (out, lse) if return_lse else out


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless attention of q, k and v, of any length, is defined."""
    op = OP.name
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{op}: {name}: expected 4 dimensions (batch, heads, tokens, head_dim), got {shape(x)}")
    if q.dtype not in DTYPES:
        raise TypeError(f"{op}: q: expected float32, float16, bfloat16 or float64, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{op}: {name}: expected {q.dtype} like q, got {x.dtype}")
        if x.device != q.device:
            raise ValueError(f"{op}: {name}: expected device {q.device} like q, got {x.device}")
    if k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"{op}: k: expected batch {q.shape[0]} and head_dim {q.shape[3]} like q, got {shape(k)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v: expected batch, heads and tokens {tuple(k.shape[:3])} like k, got {shape(v)}")
    if not 1 <= q.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"{op}: q: expected head_dim 1 .. {LARGEST_HEAD}, got {q.shape[3]}")
    if not 1 <= v.shape[3] <= LARGEST_HEAD:
        raise ValueError(f"{op}: v: expected head_dim 1 .. {LARGEST_HEAD}, got {v.shape[3]}")
    if q.shape[1] < 1 or k.shape[1] < 1 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{op}: q: expected heads a multiple of the {k.shape[1]} of k, got {q.shape[1]}")


def check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale: expected a number or None, got {type(scale).__name__}")


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def cast(x: Tensor) -> Tensor:
    """What autocast does to the operands of attention; float64 is left alone, as it does."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return x.to(torch.get_autocast_dtype(device))
    return x
