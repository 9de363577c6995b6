"""TokenLearner as it is written today, eager and compiled, and ours.

No fused kernel of it, of a Perceiver's read or of attention pooling with an MLP was found to compare with; attention
itself cannot do it, because the logits come out of an MLP and not out of a product.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

import mirasol_kernels
from benchmarks.peers import Call, Peer, Problem, anything
from mirasol_kernels import token_learner

Pool = Callable[..., Tensor]  # as token_learner's first arguments, positions after them


def call_of(problem: Problem, pool: Pool) -> Call:
    """The call that a direction means, from a differentiable forward."""
    split, count = problem.case.split, 6

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        return (pool(*split((*inputs[:count], *inputs[count + 1 :]))),)

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [x.detach().requires_grad_() for x in (*inputs[:count], *inputs[count + 1 :])]
        out = pool(*split(leaves))
        return (out.detach(), *torch.autograd.grad(out, leaves, inputs[count]))

    return forward if problem.direction == "forward" else step


# Ours


def with_backend(backend: str) -> Pool:
    def pool(sources: list[Tensor], *rest: Tensor) -> Tensor:
        return token_learner(sources, *rest[:6], positions=list(rest[6:]) or None, backend=backend)

    return pool


def our_reason(backend: str, problem: Problem) -> str | None:
    inputs = problem.inputs
    sources, *rest = problem.case.split((*inputs[:6], *inputs[7:]))
    said = mirasol_kernels.explain(token_learner, sources, *rest[:6], positions=rest[6:] or None, backend=backend)
    reason = said.get(backend, f"no {backend} kernel of this op")
    return None if reason == "runs" else reason


def ours(backend: str, problem: Problem) -> Call:
    return call_of(problem, with_backend(backend))


# PyTorch


def plain(sources: list[Tensor], gamma: Tensor, beta: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *tables):
    """The shortest way to write it, which is also how others do."""
    if tables:
        sources = [x + table for x, table in zip(sources, tables, strict=True)]
    x = sources[0] if len(sources) == 1 else torch.cat(list(sources), 1)
    hidden = F.gelu(F.linear(F.layer_norm(x, gamma.shape, gamma, beta, 1e-6), w1, b1), approximate="tanh")
    return F.linear(hidden, w2, b2).softmax(1).mT @ x


def eager(problem: Problem) -> Call:
    return call_of(problem, plain)


def no_compiler(problem: Problem) -> str | None:
    if problem.device == "cpu" and not shutil.which(os.environ.get("CXX", "c++")):
        return "no C++ compiler"
    return None


def compiled(problem: Problem) -> Call:
    torch._dynamo.reset()  # else the eighth shape would be one too many to compile
    call = call_of(problem, torch.compile(plain, dynamic=False))
    with torch.set_grad_enabled(problem.direction == "backward"):
        call(*problem.inputs)
    return call


def widened(prepare: Callable[[Problem], Call], problem: Problem) -> Call:
    """In float32 with the casts counted: on a CPU without instructions for half precision this is the way to beat."""
    wide = prepare(problem._replace(dtype=torch.float32, inputs=tuple(x.float() for x in problem.inputs)))

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(problem.dtype) for x in wide(*(x.float() for x in inputs)))

    return call


HALF = (torch.bfloat16, torch.float16)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("native", partial(ours, "native"), partial(our_reason, "native"), True, ("cpu",)),
        Peer("triton", partial(ours, "triton"), partial(our_reason, "triton"), True, ("cuda",)),
        Peer("reference", partial(ours, "reference")),
        Peer("eager", eager),
        Peer("compile", compiled, no_compiler),
        Peer("float32_eager", partial(widened, eager), anything, False, ("cpu",), HALF),
        Peer("float32_compile", partial(widened, compiled), no_compiler, False, ("cpu",), HALF),
    )
}
