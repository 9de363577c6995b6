"""Schema, fake, autograd and backends of the sequential part of a Token Turing Machine: all T steps in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from mirasol_kernels._autocast import autocast_dtype, without_autocast
from mirasol_kernels._dispatch import Backend, Op, wanted_backend
from mirasol_kernels.latent_recurrence.backward import backward
from mirasol_kernels.latent_recurrence.modules import LearnedMlp, TransformerBlock, tensors_in
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters

# memory (B, mem, c).  for_read and for_write: the states of the inputs of all steps, max (B, T, k), sum (B, T, k) and
# weighted sum (B, T, k, c), k = r and k = mem.  weights: of `weights_of`.  tables: what is added to memory for read, to
# memory and to the output for write, and to the tokens before the blocks: (mem, c), (mem, c), (r, c), (r, c).
CALL = "Tensor memory, Tensor[] for_read, Tensor[] for_write, Tensor[] weights, Tensor?[] tables, int heads"
# The last memory, outputs (B, T, r, c), and the memory before each step (B, T, mem, c): with `keep`, else (B, 0, ...).
FWD = f"({CALL}, bool keep) -> (Tensor, Tensor, Tensor)"
# Gradients of memory, of sum and weighted sum for read, of those for write, of the weights, of the tables that are.
BWD = f"(Tensor dmemory, Tensor doutputs, Tensor kept, {CALL}) -> Tensor[]"
TABLES = 4


def _fake_fwd(memory: Tensor, for_read: list[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, read, c = for_read[2].shape
    kept = memory.new_empty(batch, steps if rest[-1] else 0, *memory.shape[1:])
    return memory.new_empty(memory.shape), memory.new_empty(batch, steps, read, c), kept


def _fake_bwd(dmemory: Tensor, doutputs: Tensor, kept: Tensor, memory: Tensor, *rest: Any) -> list[Tensor]:
    for_read, for_write, weights, tables, _ = rest
    given = (memory, *for_read[1:], *for_write[1:], *weights, *(table for table in tables if table is not None))
    return [x.new_empty(x.shape) for x in given]


OP = Op("latent_recurrence", cases=f"{__package__}.cases", fwd=(FWD, _fake_fwd), bwd=(BWD, _fake_bwd))


def weights_of(p: TokenTuringParameters) -> list[Tensor]:
    """Of read (6), of write (6), of each block (16) and of the last norm (2), in the order of `named_tensors`."""
    return [x for part in (p.read, p.write, *p.process.blocks, p.process.norm) for _, x in tensors_in(part)]


def _not_fused(memory: Tensor, sources: tuple[Tensor, ...], p: TokenTuringParameters, *_: Any) -> str | None:
    """What no fused backend takes; such machines run step by step, on the kernels of token_learner and attention."""
    if not isinstance(p.read, LearnedMlp) or not isinstance(p.write, LearnedMlp):
        return "memory mode TL of the standard unit only"
    blocks = _blocks(p)
    if not blocks or len(blocks) < len(p.process.blocks):
        return "transformer as the processor only"
    if memory.dtype != torch.float32 or autocast_dtype(memory.device.type) is not None:
        return "float32 only"
    if torch._C._are_functorch_transforms_active():
        return "no torch.func"
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0:  # a tangent would be lost
        return "no forward-mode differentiation"
    if not memory.numel() or not sources[0].shape[1]:
        return "at least one video, one slot of memory and one step"
    heads = {block.attention.heads for block in blocks}
    if len(heads) > 1 or len(_hidden(p)) > 1 or len(_mlp(p)) > 1:
        return "one number of heads and one width of hidden layers only"
    return None


def _blocks(p: TokenTuringParameters) -> list[TransformerBlock]:
    return [block for block in p.process.blocks if isinstance(block, TransformerBlock)]


def _hidden(p: TokenTuringParameters) -> set[int]:
    return {pool.mlp.hidden.bias.shape[0] for pool in (p.read, p.write) if isinstance(pool, LearnedMlp)}


def _mlp(p: TokenTuringParameters) -> set[int]:
    return {block.mlp.hidden.bias.shape[0] for block in _blocks(p)}


def _native(memory: Tensor, sources: tuple[Tensor, ...], p: TokenTuringParameters, *rest: Any) -> str | None:
    reason = _not_fused(memory, sources, p, *rest)
    if reason is None and any(width % 16 for width in (p.width, *_hidden(p), *_mlp(p))):
        return "widths that are multiples of 16 only"
    return reason


# Compute capability -> the file under benchmarks/results that showed the CUDA kernel right and fast on it.
VERIFIED: dict[tuple[int, int], str] = {}


def _cuda(memory: Tensor, sources: tuple[Tensor, ...], p: TokenTuringParameters, *rest: Any) -> str | None:
    reason = _not_fused(memory, sources, p, *rest)
    if reason is not None:
        return reason
    named = rest[-1] or wanted_backend()
    if named != "cuda" and torch.cuda.get_device_capability(memory.device) not in VERIFIED:
        return "not verified on this GPU: runs only if asked for by name"
    given = memory, *sources, *(x for _, x in p.named_tensors())
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        return "forward only: no gradients"
    blocks = _blocks(p)
    sizes = memory.shape[0], sources[0].shape[1], memory.shape[1], p.read_tokens, p.width, *_hidden(p), *_mlp(p)
    sizes = *sizes, blocks[0].attention.heads, len(blocks)
    # Dynamo traces no operator that returns no tensor; there the launch refuses what does not fit.
    if not torch.compiler.is_compiling() and not _fits(sizes, memory.device.index):
        return "16 layers and what fits the GPU's shared memory only"
    return None


def _fits(sizes: tuple[int, ...], device: int) -> bool:
    return torch.ops.mirasol_cuda_raw.latent_recurrence_fits(sizes, device)


def _cuda_fwd(memory: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """It links no CUDA part of torch, so the stream is an argument."""
    kernel = torch.ops.mirasol_cuda_raw.latent_recurrence_fwd
    return kernel(memory, *args, torch.cuda.current_stream(memory.device).cuda_stream)


def _cuda_bwd(*_: Any) -> list[Tensor]:
    raise NotImplementedError(f"{OP.name}: backend 'cuda' is forward only; backend='reference' has gradients")


OP.backend("native", "cpu", _native)


# Compute capabilities for which tests compile every tile: it fits, and spills in no loop.
COMPILED = (80, 86, 89, 90, 100, 120)


def _triton(memory: Tensor, sources: tuple[Tensor, ...], p: TokenTuringParameters, *rest: Any) -> str | None:
    reason = _not_fused(memory, sources, p, *rest)
    if reason is not None:
        return reason
    if torch.version.hip:
        return "NVIDIA GPUs only"
    major, minor = torch.cuda.get_device_capability(memory.device)
    if major < 8:
        return "compute capability below 8.0"
    if p.width > 2048 or max(_hidden(p)) > 128 or p.width // _blocks(p)[0].attention.heads > 256:
        return "c up to 2048, hidden up to 128 and heads up to 256 wide only"
    if (rest[-1] or wanted_backend()) != "triton" and 10 * major + minor not in COMPILED:
        return "not yet compiled for this GPU in tests: runs only if asked for by name"
    return None


def _triton_fwd(*args: Any) -> tuple[Tensor, ...]:
    from mirasol_kernels.latent_recurrence import triton  # not before a kernel runs

    results = _fake_fwd(*args)
    with torch.cuda.device(args[0].device):
        triton.run_forward(*args, *results)
    return results


def _triton_bwd(dmemory: Tensor, doutputs: Tensor, kept: Tensor, memory: Tensor, *call: Any) -> list[Tensor]:
    with without_autocast(memory.device.type):  # written in PyTorch, and float32 as forward is
        return backward(dmemory, doutputs, kept, *call)


OP.backend("triton", "cuda", _triton, fwd=_triton_fwd, bwd=_triton_bwd)
OP.backend("cuda", "cuda", _cuda, fwd=_cuda_fwd, bwd=_cuda_bwd)


def fused(
    backend: Backend, memory: Tensor, for_read: Any, for_write: Any, p: TokenTuringParameters, tables: Any
) -> tuple[Tensor, Tensor]:
    """The last memory and the outputs; tables as in CALL."""
    weights, heads = weights_of(p), _blocks(p)[0].attention.heads
    tensors = (memory, *for_read, *for_write, *weights, *tables)
    tensors = tuple(None if x is None else x.contiguous() for x in tensors)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return backend.calls["fwd"](*_unflatten(tensors), heads, False)[:2]
    return Steps.apply(*tensors, heads, backend.name)[:2]


def _unflatten(tensors: tuple) -> tuple:
    """(memory, three, three, weights, tables) as the schema has them."""
    return tensors[0], list(tensors[1:4]), list(tensors[4:7]), list(tensors[7:-TABLES]), list(tensors[-TABLES:])


def _calls(backend: str) -> dict[str, Any]:
    return next(b.calls for b in OP.backends if b.name == backend)


class Steps(torch.autograd.Function):
    """Of `_unflatten`'s tensors, heads and a backend's name.  The maxima are reference points: no gradient."""

    @staticmethod
    def forward(*inputs):
        *tensors, heads, backend = inputs
        return _calls(backend)["fwd"](*_unflatten(tuple(tensors)), heads, True)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.heads, ctx.backend = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.save_for_backward(output[2], *tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, dmemory, doutputs, _):
        kept, *tensors = ctx.saved_tensors
        args = _unflatten(tuple(tensors))
        bwd = _calls(ctx.backend)["bwd"]
        dmemory, *grads = bwd(dmemory.contiguous(), doutputs.contiguous(), kept, *args, ctx.heads)
        four, rest = grads[:4], iter(grads[4:])
        rest = [None if x is None else next(rest) for x in tensors[7:]]
        # The last bias of read and write moves the logits of memory, input and output alike: its gradient is 0.  The
        # share of the steps and that of the input (which hoisted.py leaves out) would only be so to rounding.
        for bias in (5, 11):
            rest[bias] = torch.zeros_like(rest[bias])
        return dmemory, None, *four[:2], None, *four[2:], *rest, None, None
