"""Schemas, fakes, autograd and backends: what is the same whichever kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mirasol_kernels._dispatch import Op, wanted_backend

# Results: out, lse, and what the rounding of lse to float32 left out, which backward wants: at scores of 1e4 half an
# ulp is 5e-4, far more than exp(score - lse) may lose.  Its unit is a matter between forward and backward of a backend.
FWD = "(Tensor q, Tensor k, Tensor v, Tensor q_offsets, Tensor k_ranges, float scale) -> (Tensor, Tensor, Tensor)"
BWD = (
    "(Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor lse_low, "
    "Tensor q_offsets, Tensor k_ranges, Tensor k_offsets, Tensor q_index, Tensor q_ranges, float scale) "
    "-> (Tensor, Tensor, Tensor)"
)


def _fake_fwd(
    q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_ranges: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = q.shape
    lse = q.new_empty(batch, heads, rows, dtype=torch.promote_types(q.dtype, torch.float32))
    if q.stride(1) < q.stride(2):  # a view of (B, N, H, D): the result is one too
        return q.new_empty(batch, rows, heads, v.shape[3]).transpose(1, 2), lse, torch.empty_like(lse)
    return q.new_empty(batch, heads, rows, v.shape[3]), lse, torch.empty_like(lse)


def _fake_bwd(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _gradient_of(q), _gradient_of(k), _gradient_of(v)


def _gradient_of(x: Tensor) -> Tensor:
    """Of x's strides, unless they put another dimension innermost."""
    gradient = torch.empty_like(x)
    return gradient if x.shape[3] == 1 or gradient.stride(3) == 1 else x.new_empty(x.shape)


OP = Op("block_causal_attention", cases=f"{__package__}.cases", fwd=(FWD, _fake_fwd), bwd=(BWD, _fake_bwd))


# Compute capability -> the file under benchmarks/results that showed the CUDA kernels right and fast on it.
VERIFIED: dict[tuple[int, int], str] = {}


def _native(q: Tensor, *_: Any) -> str | None:
    return "no float64" if q.dtype == torch.float64 else None


def _cuda(q: Tensor, *rest: Any) -> str | None:
    if q.dtype != torch.float32:
        return "float32 only"
    named = rest[-1] or wanted_backend()
    if named != "cuda" and torch.cuda.get_device_capability(q.device) not in VERIFIED:
        return "not verified on this GPU: runs only if asked for by name"
    return None


def _triton(q: Tensor, *_: Any) -> str | None:
    if q.dtype == torch.float64:
        return "no float64"
    if torch.version.hip:
        return "NVIDIA GPUs only"
    return None if torch.cuda.get_device_capability(q.device) >= (8, 0) else "compute capability below 8.0"


def _triton_fwd(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
    from mirasol_kernels.block_causal_attention import triton  # not before a kernel runs

    results = _fake_fwd(q, *args)
    with torch.cuda.device(q.device):
        triton.run_forward(q, *args, *results)
    return results


def _triton_bwd(*args: Any) -> tuple[Tensor, ...]:
    from mirasol_kernels.block_causal_attention import triton_backward

    results = _fake_bwd(*args)
    with torch.cuda.device(args[0].device):
        triton_backward.run_backward(*args, *results)
    return results


def _on_current_stream(part: str) -> Callable:
    """The compiled CUDA kernel of `part`.  It links no CUDA part of torch, so the stream is an argument."""

    def launch(q: Tensor, *args: Any) -> tuple[Tensor, ...]:
        kernel = getattr(torch.ops.mirasol_cuda_raw, f"block_causal_attention_{part}")
        return kernel(q, *args, torch.cuda.current_stream(q.device).cuda_stream)

    return launch


OP.backend("native", "cpu", _native)
OP.backend("triton", "cuda", _triton, fwd=_triton_fwd, bwd=_triton_bwd)
OP.backend("cuda", "cuda", _cuda, fwd=_on_current_stream("fwd"), bwd=_on_current_stream("bwd"))


def unit_stride(x: Tensor) -> Tensor:
    """x (B, H, N, D), copied only if its last dimension is not contiguous."""
    return x if x.stride(3) == 1 else x.clone(memory_format=torch.contiguous_format)


class Fused(torch.autograd.Function):
    """Of q, k and v with unit stride in the last dimension, the tables of `LayoutTables`, scale, a backend's name."""

    @staticmethod
    def forward(q, k, v, q_offsets, k_ranges, k_offsets, q_index, q_ranges, scale, backend):
        return calls(backend)["fwd"](q, k, v, q_offsets, k_ranges, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.scale, ctx.backend = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(*tensors[:3], *output, *tensors[3:])

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse, _):
        # A gradient may have any strides: that of a sum is one number, expanded.
        grads = calls(ctx.backend)["bwd"](unit_stride(dout), dlse.contiguous(), *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        """The mapped dimension joins the batch."""
        size, (*tables, scale, backend) = info.batch_size, args[3:]
        qkv = [
            x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(args[:3], in_dims, strict=False)
        ]
        tables = [t if len(t) == 1 else t.repeat(size, *[1] * (t.ndim - 1)) for t in tables]
        results = Fused.apply(*[unit_stride(x.flatten(0, 1)) for x in qkv], *tables, scale, backend)
        return tuple(x.unflatten(0, (size, -1)) for x in results), (0, 0, 0)


def calls(backend: str) -> dict[str, Any]:
    return next(b.calls for b in OP.backends if b.name == backend)
