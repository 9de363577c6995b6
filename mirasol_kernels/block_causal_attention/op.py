"""Schemas, fakes, autograd and backends: what is the same whichever kernel runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mirasol_kernels._dispatch import Backend, Op, wanted_backend
from mirasol_kernels.layout import LayoutTables

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


def calls(backend: str) -> dict[str, Any]:
    for b in OP.backends:
        if b.name == backend:
            return b.calls
    raise KeyError(backend)


def fused(backend: Backend, q: Tensor, k: Tensor, v: Tensor, tables: LayoutTables, scale: float) -> tuple[Tensor, ...]:
    """out and lse on `backend`, differentiable once."""
    if not q.stride(3) == k.stride(3) == v.stride(3) == 1:
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice
        k, v = k.view_as(k) if k is q else k, v.view_as(v) if v is k or v is q else v
        return Fused.apply(q, k, v, *tables, scale, backend.name)[:2]
    return fused_eager(backend, q, k, v, tables, scale)


def fused_eager(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, tables: LayoutTables, scale: float
) -> tuple[Tensor, ...]:
    """The same outside torch.compile.  torch's wrapping of a call costs more than a small call itself: only what is
    differentiated pays for it, and only under torch.func for what torch.func needs."""
    # Private, but what torch's own autograd.Function asks: torch.func and dual numbers show in no other way.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return Transformed.apply(q, k, v, *tables, scale, backend.name)[:2]
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # What Function.apply does beside these two takes 4 us: unwrapping is for tensors that left torch.func.
        q, k, v = map(torch._C._functorch.unwrap_if_dead, (q, k, v))
        return super(torch.autograd.Function, Eager).apply(q, k, v, tables, scale, backend)
    return backend.calls["fwd"](q, k, v, tables.q_offsets, tables.k_ranges, scale)[:2]


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
    def backward(ctx, dout, dlse, _):
        grads = gradients(ctx.backend, dout, dlse, *ctx.saved_tensors, ctx.scale)
        return *grads, None, None, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        """The mapped dimension joins the batch."""
        return _over_batch(Fused, info.batch_size, in_dims, args, tables=3)


class Eager(torch.autograd.Function):
    """The same for eager calls, of out and lse alone: a forward that takes ctx spares torch the inspection of
    signatures, 60 us a call, and every tensor that torch need not see spares it one."""

    @staticmethod
    def forward(ctx, q, k, v, tables, scale, backend):
        out, lse, lse_low = backend.calls["fwd"](q, k, v, tables.q_offsets, tables.k_ranges, scale)
        ctx.save_for_backward(q, k, v, out, lse, lse_low)
        ctx.rest = backend.name, tables, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        backend, tables, scale = ctx.rest
        return *gradients(backend, dout, dlse, *ctx.saved_tensors, *tables, scale), None, None, None


class Transformed(Fused):
    """The same for torch.func and forward mode: torch.compile takes no function that has a jvp."""

    @staticmethod
    def jvp(ctx, *_):
        raise once(ctx.backend, "forward-mode differentiation")


def gradients(backend: str, dout: Tensor, dlse: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """dq, dk and dv; args: the rest of the schema's arguments."""
    # A gradient may have any strides: that of a sum is one number, expanded.
    dout, dlse = unit_stride(dout), dlse.contiguous()
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: what AOTAutograd refuses
        return Gradients.apply(dout, dlse, *args, backend)
    return calls(backend)["bwd"](dout, dlse, *args)


class Gradients(torch.autograd.Function):
    """dq, dk and dv as functions of all they come from, so that a second derivative is an error and never a zero.

    once_differentiable cannot say so to torch.func, nor to who allows unused inputs: they would get the zero.
    """

    @staticmethod
    def forward(*args):
        *args, backend = args
        return calls(backend)["bwd"](*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]

    @staticmethod
    def backward(ctx, *_):
        raise once(ctx.backend, "a second derivative")

    jvp = backward

    @staticmethod
    def vmap(info, in_dims, *args):
        return _over_batch(Gradients, info.batch_size, in_dims, args, tables=8)


def once(backend: str, wanted: str) -> NotImplementedError:
    return NotImplementedError(
        f"{OP.name}: backend {backend!r} has first derivatives in reverse mode only, not {wanted}; "
        "backend='reference' has them all"
    )


def _over_batch(function: Any, size: int, in_dims: tuple, args: tuple, tables: int) -> tuple:
    """`function` of args, the first `tables` of which are tensors with a batch that the mapped dimension joins."""

    def joined(x: Tensor, dim: int | None) -> Tensor:
        x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
        x = x.flatten(0, 1)
        return unit_stride(x) if x.ndim == 4 else x.contiguous()

    batched = [joined(x, dim) for x, dim in zip(args[:tables], in_dims, strict=False)]
    repeated = [t if len(t) == 1 else t.repeat(size, *[1] * (t.ndim - 1)) for t in args[tables:-2]]
    results = function.apply(*batched, *repeated, *args[-2:])
    return tuple(x.unflatten(0, (size, -1)) for x in results), (0,) * len(results)
