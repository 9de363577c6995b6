"""Schemas, fakes, autograd and backends: what is the same whichever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mirasol_kernels._autocast import autocast_dtype
from mirasol_kernels._dispatch import Backend, Op, wanted_backend
from mirasol_kernels.token_learner.state import accumulation_dtype

# Of a forward: what `api` has checked.  valid (B, S) are integers; erf says which GELU.
CALL = (
    "Tensor[] sources, Tensor?[] positions, Tensor norm_weight, Tensor norm_bias, Tensor w1, Tensor b1, Tensor w2, "
    "Tensor b2, Tensor? valid, bool erf, float eps, bool divide"
)
# max (B, k), sum (B, k), pooled (B, k, c): the finished tokens with `divide`, else the state's weighted sum.  All of it
# float32: backward subtracts dpooled . pooled from x . dpooled, and a rounding of pooled would be all that is left.
FWD = f"({CALL}) -> (Tensor, Tensor, Tensor)"
# With `divide`, dpooled is the gradient of the finished tokens `pooled`, and dsum is none; without, both are those of
# the state and `pooled` is none.  Results: gradients of the sources, of the positions that are, of the six weights.
BWD = f"(Tensor dpooled, Tensor? dsum, Tensor max, Tensor sum, Tensor? pooled, {CALL}) -> Tensor[]"


def _fake_fwd(sources: list[Tensor], positions: Any, *weights_and_rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    first, tokens = sources[0], weights_and_rest[4].shape[0]
    exact = accumulation_dtype(first.dtype)
    maximum = first.new_empty(first.shape[0], tokens, dtype=exact)
    return maximum, torch.empty_like(maximum), maximum.new_empty(*maximum.shape, first.shape[2])


def _fake_bwd(
    dpooled: Tensor, dsum: Any, maximum: Tensor, total: Tensor, pooled: Any, sources: Any, positions: Any, *rest: Any
) -> list[Tensor]:
    tables = [table for table in positions if table is not None]
    return [x.new_empty(x.shape) for x in (*sources, *tables, *rest[:6])]


OP = Op("token_learner", cases=f"{__package__}.cases", fwd=(FWD, _fake_fwd), bwd=(BWD, _fake_bwd))


def _native(sources: tuple[Tensor, ...], norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, *rest: Any) -> str | None:
    if sources[0].dtype == torch.float64:
        return "no float64"
    return None if w1.numel() and rest[1].numel() else "at least one channel, hidden unit and learned token"


OP.backend("native", "cpu", _native)


# Compute capabilities for which every tile of its table is known to compile, fit and spill in no loop over channels.
COMPILED = (80, 86, 89, 90, 100, 120)


def _triton(
    sources: Any, norm_weight: Tensor, norm_bias: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, *rest: Any
) -> str | None:
    if w1.dtype == torch.float64:
        return "no float64"
    if torch.version.hip:
        return "NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(w1.device)
    if major < 8:
        return "compute capability below 8.0"
    (h, c), k = w1.shape, w2.shape[0]
    if not (0 < c <= 2048 and 0 < h <= 256 and 0 < k <= 512):
        return "c up to 2048, h up to 256 and k up to 512 only"
    if h > 128 and (major not in (9, 10) or w1.dtype == torch.float32):  # would spill in loops: triton_config.py
        return "h up to 128 only in float32 and where neither wgmma nor tcgen05 multiplies"
    named = rest[-1] or wanted_backend()
    if named != "triton" and 10 * major + minor not in COMPILED:
        return "not yet compiled for this GPU in tests: runs only if asked for by name"
    return None


def _triton_fwd(*args: Any) -> tuple[Tensor, ...]:
    from mirasol_kernels.token_learner import triton  # not before a kernel runs

    results = _fake_fwd(*args)
    with torch.cuda.device(results[0].device):
        triton.run_forward(*args, *results)
    return results


def _triton_bwd(*args: Any) -> list[Tensor]:
    from mirasol_kernels.token_learner import triton_backward

    results = _fake_bwd(*args)
    with torch.cuda.device(args[0].device):
        triton_backward.run_backward(*args, results)
    return results


OP.backend("triton", "cuda", _triton, fwd=_triton_fwd, bwd=_triton_bwd)


def calls(backend: str) -> dict[str, Any]:
    return next(b.calls for b in OP.backends if b.name == backend)


def fused(backend: Backend, args: tuple, divide: bool) -> tuple[Tensor, ...]:
    """max, sum and pooled of what `api` has checked, on `backend`; differentiable once in sum (without `divide`) and
    pooled.  As in block_causal_attention, only what is differentiated pays for torch's wrapping of a call."""
    sources, *weights, positions, valid, gelu, eps = args
    if torch.compiler.is_compiling():  # Dynamo takes no tensor twice
        sources = tuple(x.view_as(x) if any(x is y for y in sources[:i]) else x for i, x in enumerate(sources))
    dtype = autocast_dtype(sources[0].device.type)
    if dtype is not None:
        sources, weights = tuple(x.to(dtype) for x in sources), [x.to(dtype) for x in weights]
        positions = tuple(None if x is None else x.to(dtype) for x in positions)
    # What kernels take: elements of a token side by side, everything small contiguous, tables (n, c), counts int64.
    sources = tuple(x if x.stride(2) == 1 else x.contiguous() for x in sources)
    positions = tuple(None if x is None else x.reshape(x.shape[-2:]).contiguous() for x in positions)
    weights = [x if x.is_contiguous() else x.contiguous() for x in weights]
    valid = None if valid is None else valid.to(torch.int64).contiguous()
    tensors, rest = (*sources, *positions, *weights), (valid, gelu == "erf", float(eps), divide)
    function: type[Fused] = Fused
    if not torch.compiler.is_compiling():
        # Private, but what torch's own autograd.Function asks: torch.func and dual numbers show in no other way.
        if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
            function = Transformed
        elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
            function = Eager
        else:
            return backend.calls["fwd"](list(sources), list(positions), *weights, *rest)
    return function.apply(*tensors, *rest, backend.name)


def unflatten(args: tuple) -> tuple:
    """(*sources, *positions, six weights, valid, erf, eps, divide) as the schema has them: the first two as lists."""
    sources = (len(args) - 10) // 2
    return list(args[:sources]), list(args[sources : 2 * sources]), *args[2 * sources :]


class Fused(torch.autograd.Function):
    """Of `unflatten`'s arguments and a backend's name."""

    @staticmethod
    def forward(*inputs):
        *args, backend = inputs
        return calls(backend)["fwd"](*unflatten(tuple(args)))

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.erf, ctx.eps, ctx.divide, ctx.backend = inputs
        maximum, total, pooled = output
        ctx.mark_non_differentiable(maximum, *[total] * ctx.divide)
        ctx.save_for_backward(maximum, total, pooled if ctx.divide else None, *tensors)

    @staticmethod
    def backward(ctx, _, dsum, dpooled):
        maximum, total, pooled, *tensors = ctx.saved_tensors
        dsum = None if ctx.divide else dsum.contiguous()
        args = dpooled.contiguous(), dsum, maximum, total, pooled, *tensors, ctx.erf, ctx.eps, ctx.divide, ctx.backend
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph: what AOTAutograd refuses
            grads = Gradients.apply(*args)
        else:
            grads = Gradients.forward(*args)
        given = iter(grads)
        each = [None if x is None else next(given) for x in tensors[:-1]]
        return *each, None, None, None, None, None

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Fused, info.batch_size, in_dims, args)


class Eager(Fused):
    """The same for eager calls: a forward that takes ctx spares torch the inspection of signatures, 60 us a call."""

    @staticmethod
    def forward(ctx, *inputs):
        output = Fused.forward(*inputs)
        Fused.setup_context(ctx, inputs, output)
        return output

    setup_context = torch.autograd.Function.setup_context  # torch's sign of a forward that takes ctx


class Transformed(Fused):
    """The same for torch.func and forward mode: torch.compile takes no function that has a jvp."""

    @staticmethod
    def jvp(ctx, *_):
        raise once(ctx.backend, "forward-mode differentiation")


class Gradients(torch.autograd.Function):
    """All gradients as functions of what they come from, so that a second derivative is an error and never a zero."""

    @staticmethod
    def forward(*inputs):
        *args, backend = inputs
        return tuple(calls(backend)["bwd"](*args[:5], *unflatten(tuple(args[5:]))))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.backend = inputs[-1]

    @staticmethod
    def backward(ctx, *_):
        raise once(ctx.backend, "a second derivative")

    jvp = backward

    @staticmethod
    def vmap(info, in_dims, *args):
        return one_by_one(Gradients, info.batch_size, in_dims, args)


def one_by_one(function: Any, size: int, in_dims: tuple, args: tuple) -> tuple:
    """Mapped weights and tables have no batch that the mapped dimension could join: a call for each of its indices."""
    each = [
        function.apply(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    return tuple(torch.stack(x) for x in zip(*each, strict=True)), (0,) * len(each[0])


def once(backend: str, wanted: str) -> NotImplementedError:
    return NotImplementedError(
        f"{OP.name}: backend {backend!r} has first derivatives in reverse mode only, not {wanted}; "
        "backend='reference' has them all"
    )
