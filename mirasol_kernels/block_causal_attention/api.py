"""The function users call: what it means, what it accepts, which backend runs."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from mirasol_kernels._autocast import autocast_dtype
from mirasol_kernels._dispatch import unasked
from mirasol_kernels.block_causal_attention import reference
from mirasol_kernels.block_causal_attention.op import OP, fused, fused_eager
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
    **unknown: object,
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
    if unknown:
        raise TypeError(
            f"{OP.name}: {next(iter(unknown))}: no such argument: layout says who sees whom "
            "(causal: SnippetLayout.uniform(tokens, 1)), any number of query heads per key head works as it is, "
            "and there is no dropout, bias or softcap"
        )
    if scale is None and backend is None and usual(q, k, v, layout):
        try:
            out, lse = fused_eager(OP.backends[0], q, k, v, layout.tables(), q.shape[3] ** -0.5)
            return (out, lse) if return_lse else out
        except RuntimeError:  # what the operator refuses, the checks below say better, or another backend does
            pass
    q, k, v = checked(q, k, v)
    check_scale(OP.name, scale)
    if not isinstance(layout, SnippetLayout):
        raise TypeError(f"{OP.name}: layout: expected a SnippetLayout, got {type(layout).__name__}")
    layout.validate(q.shape[2], k.shape[2], q.shape[0], op=OP.name)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    tables = layout.tables(q.device)
    chosen = OP.select((q, k, v, *tables, scale, backend), backend)
    if chosen is None:
        out, lse = reference.block_causal_attention(q, k, v, tables.q_offsets, tables.k_ranges, scale, layout.span)
    else:
        out, lse = fused(chosen, q, k, v, tables, scale)
    return (out, lse) if return_lse else out


def usual(q: Tensor, k: Tensor, v: Tensor, layout: SnippetLayout) -> bool:
    """Whether a call is like most on CPUs: plain tensors of the layout's lengths, and nothing that changes what runs.

    The first backend is then the choice, and its operator checks what is not checked here.  All the checks below and a
    choice that can say why take longer than a small call itself.
    """
    return (
        not torch.compiler.is_compiling()
        and type(q) is type(k) is type(v) is Tensor
        and q.is_cpu
        and k.is_cpu
        and v.is_cpu
        and q.dtype is not torch.float64
        and type(layout) is SnippetLayout
        and layout.batch is None
        and q.numel() > 0
        and v.numel() > 0
        and q.ndim == k.ndim == 4
        and q.shape[2] == layout.q_len
        and k.shape[2] == layout.k_len
        and unasked()
        and OP.backends[0].absent is None
        and not torch.is_autocast_enabled("cpu")
    )


def checked(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v as autocast has them; raises unless attention of them, of any length, is defined."""
    op = OP.name
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
        if x.ndim != 4:
            raise ValueError(f"{op}: {name}: expected 4 dimensions (batch, heads, tokens, head_dim), got {shape(x)}")
    device = q.device
    casts_to = autocast_dtype(device.type)
    if casts_to is not None:
        q, k, v = (cast(x, casts_to) for x in (q, k, v))
    dtype = q.dtype
    if dtype not in DTYPES:
        raise TypeError(f"{op}: q: expected float32, float16, bfloat16 or float64, got {dtype}")
    if not (k.dtype == v.dtype == dtype and k.device == v.device == device):
        for name, x in (("k", k), ("v", v)):
            if x.dtype != dtype:
                raise TypeError(f"{op}: {name}: expected {dtype} like q, got {x.dtype}")
            if x.device != device:
                raise ValueError(f"{op}: {name}: expected device {device} like q, got {x.device}")
    batch, heads, _, dim = q.shape
    k_batch, k_heads, tokens, k_dim = k.shape
    v_batch, v_heads, v_tokens, value_dim = v.shape
    if k_batch != batch or k_dim != dim:
        raise ValueError(f"{op}: k: expected batch {batch} and head_dim {dim} like q, got {shape(k)}")
    if v_batch != k_batch or v_heads != k_heads or v_tokens != tokens:
        raise ValueError(f"{op}: v: expected batch, heads and tokens {tuple(k.shape[:3])} like k, got {shape(v)}")
    if not 1 <= dim <= LARGEST_HEAD:
        raise ValueError(f"{op}: q: expected head_dim 1 .. {LARGEST_HEAD}, got {dim}")
    if not 1 <= value_dim <= LARGEST_HEAD:
        raise ValueError(f"{op}: v: expected head_dim 1 .. {LARGEST_HEAD}, got {value_dim}")
    if heads < 1 or k_heads < 1 or heads % k_heads:
        raise ValueError(f"{op}: q: expected heads a multiple of the {k_heads} of k, got {heads}")
    return q, k, v


def check_scale(op: str, scale: float | None) -> None:
    if scale is not None and not isinstance(scale, int | float):
        raise TypeError(f"{op}: scale: expected a number or None, got {type(scale).__name__}")


def shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast does to an operand of attention; it leaves float64 alone."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x
