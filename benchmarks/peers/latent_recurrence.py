"""A recurrence as it is written today, and ours: the loop, eager and compiled, and `torch.utils.checkpoint` in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.cases.latent_recurrence import Step, loop
from benchmarks.peers import Call, Peer, Problem, anything
from benchmarks.peers.token_learner import no_compiler
from mirasol_kernels import use_backend
from mirasol_kernels.latent_recurrence.scan import default_segment

Run = Callable[[Sequence[Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]  # of weights, state, inputs


def call_of(problem: Problem, run: Run) -> Call:
    """The call that a direction means, from a differentiable forward."""

    def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
        *weights, state, x, _, _ = inputs
        return run(weights, state, x)

    def step(*inputs: Tensor) -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_() for v in inputs[:-2]]
        *weights, state, x = leaves
        results = run(weights, state, x)
        grads = torch.autograd.grad(results, leaves, inputs[-2:])
        return *(r.detach() for r in results), *grads

    return forward if problem.direction == "forward" else step


# Ours


def ours(problem: Problem) -> Call:
    def run(weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return problem.case.ours(weights, state, x)

    return call_of(problem, run)


def named(backend: str, problem: Problem) -> Call:
    call = ours(problem)

    def on_backend(*inputs: Tensor) -> tuple[Tensor, ...]:
        with use_backend(backend):
            return call(*inputs)

    return on_backend


def no_kernel(problem: Problem) -> str | None:
    if problem.case.kind == "scan":
        return "the step is PyTorch's, not ours"
    return "forward only" if problem.direction == "backward" else None


# PyTorch


def eager(problem: Problem) -> Call:
    return call_of(problem, lambda weights, state, x: loop(problem.case.step(weights), state, x))


def compiled(problem: Problem) -> Call:
    """The step compiled, the loop around it Python: the loop as one graph compiles for longer with every step.

    The weights are bound outside of what is compiled, once a call, as everybody else does it.
    """
    torch._dynamo.reset()  # else the eighth shape would be one too many to compile

    @partial(torch.compile, dynamic=False)
    def step(bound: Step, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return bound(state, x)

    def run(weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return loop(partial(step, problem.case.step(weights)), state, x)

    call = call_of(problem, run)
    with torch.set_grad_enabled(problem.direction == "backward"):
        call(*problem.inputs)
    return call


def per_step(problem: Problem) -> Call:
    def run(weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return loop(partial(checkpoint, problem.case.step(weights), use_reentrant=False), state, x)

    return call_of(problem, run)


def per_segment(problem: Problem) -> Call:
    """With as many steps in a segment as ours has."""
    every = default_segment(problem.case.steps)

    def segment(step: Step, state: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = []
        for now in inputs:
            state, output = step(state, now)
            outputs.append(output)
        return state, *outputs

    def run(weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        step, steps, outputs = problem.case.step(weights), x.unbind(1), []
        for begin in range(0, len(steps), every):
            state, *made = checkpoint(segment, step, state, *steps[begin : begin + every], use_reentrant=False)
            outputs += made
        return state, torch.stack(outputs, 1)

    return call_of(problem, run)


def only_backward(problem: Problem) -> str | None:
    return "the same as eager" if problem.direction == "forward" else None


FLOAT = (torch.float32,)
PEERS = {
    peer.name: peer
    for peer in (
        Peer("ours", ours, anything, True, dtypes=FLOAT),
        Peer("cuda", partial(named, "cuda"), no_kernel, True, ("cuda",), FLOAT),
        Peer("eager", eager, dtypes=FLOAT),
        Peer("compile", compiled, no_compiler, dtypes=FLOAT),
        Peer("checkpoint_step", per_step, only_backward, dtypes=FLOAT),
        Peer("checkpoint_segment", per_segment, only_backward, dtypes=FLOAT),
    )
}
