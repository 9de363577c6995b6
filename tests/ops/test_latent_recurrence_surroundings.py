"""latent_recurrence in what may surround a step: random numbers, autocast, a wish for a backend, the compiler, and
other processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mirasol_kernels._dispatch import use_backend, wanted_backend
from mirasol_kernels.latent_recurrence import latent_recurrence, reference
from tests import processes
from tests.distributed_recurrence import PROCESSES
from tests.numerics import assert_close_fp64
from tests.ops.test_latent_recurrence import Carry, Cell, problem, run_and_differentiate


def test_random_numbers_are_replayed() -> None:
    """Dropout in recomputation is the dropout of forward: a linear step has an exactly known gradient."""
    x = torch.ones(4, 6, 50, dtype=torch.float64).requires_grad_()

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return state + torch.nn.functional.dropout(x.exp(), 0.5), state

    end, _ = latent_recurrence(step, torch.zeros(4, 50, dtype=torch.float64), x, checkpoint_every=2)
    torch.rand(7)  # the generator moves on between forward and backward
    (grad,) = torch.autograd.grad(end.sum(), x)
    assert torch.equal(grad.sum(1), end)  # d exp(x) = exp(x) where dropout kept it
    assert 0 < (grad == 0).double().mean() < 1


@pytest.mark.parametrize("every", [None, 1, 2, 3])
def test_dropout_is_the_plain_loops(every: int | None) -> None:
    """From one seed the same mask in forward, and in backward: bitwise in all that is no sum over segments."""
    step, state, inputs = problem(2, 7, 16)

    def noisy(state: Carry, x: Any) -> tuple[Carry, dict[str, Tensor]]:
        state, outputs = step(state, x)
        return Carry(torch.nn.functional.dropout(state.cell, 0.3), state.counts), outputs

    seen = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=every)):
        torch.manual_seed(5)
        results = pytree.tree_leaves(run(noisy, state, inputs))
        after = torch.get_rng_state()
        torch.rand(3)
        before = torch.get_rng_state()
        grads = torch.autograd.grad(sum(y.sin().sum() for y in results), [inputs[0], state.cell, step.a])
        assert torch.equal(torch.get_rng_state(), before)  # recomputation leaves the generator where it was
        seen.append([*results, after, *grads])
    (*plain, expected), (*mine, weight) = seen
    assert all(map(torch.equal, mine, plain))
    assert_close_fp64(weight, expected)


def test_meta_tensors() -> None:
    """They have neither random numbers nor autocast to be had again."""
    x = torch.empty(4, 6, 5, device="meta", requires_grad=True)
    end, y = latent_recurrence(
        lambda state, x: (state + x.exp(), state), torch.empty(4, 5, device="meta"), x, checkpoint_every=2
    )
    (grad,) = torch.autograd.grad(end.sum(), x)
    assert end.is_meta and y.shape == grad.shape == x.shape


def test_autocast_equals_the_plain_loop() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    state, x = torch.zeros(2, 8), torch.randn(2, 5, 8, requires_grad=True)

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (state + x) @ weight
        return y.float().sin(), y

    seen = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=2)):
        with torch.autocast("cpu", torch.bfloat16):
            end, y = run(step, state, x)
        seen.append([end, y, *torch.autograd.grad(end.sum() + y.float().sum(), x)])  # outside of autocast
    assert seen[1][1].dtype == torch.bfloat16 and all(map(torch.equal, *seen))


def test_autocast_is_kept_in_recomputation() -> None:
    weight = torch.randn(8, 8, requires_grad=True)
    seen = []

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (state + x) @ weight
        seen.append(y.dtype)
        return y.float().sin(), y

    with torch.autocast("cpu", torch.bfloat16):
        end, _ = latent_recurrence(step, torch.zeros(2, 8), torch.randn(2, 3, 8), checkpoint_every=1)
    forward = len(seen)
    end.sum().backward()
    assert len(seen) > forward and set(seen) == {torch.bfloat16}


def test_backend_wish_is_kept_in_recomputation() -> None:
    seen = []

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(wanted_backend())
        return (state * x).sin(), state

    with use_backend("reference"):
        end, _ = latent_recurrence(step, torch.ones(2, requires_grad=True), torch.ones(2, 3))
    end.sum().backward()
    assert len(seen) > 3 and set(seen) == {"reference"}


def test_compiled_step() -> None:
    step, state, inputs = problem(2, 3, 4)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    run = lambda f: latent_recurrence(f, state, inputs)[0].cell  # noqa: E731
    expected = torch.autograd.grad(run(step).sum(), [step.a, inputs[0]])
    for got, want in zip(torch.autograd.grad(run(compiled).sum(), [step.a, inputs[0]]), expected, strict=True):
        assert_close_fp64(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("every", [1, 2])
def test_step_compiled_to_machine_code(every: int) -> None:
    """Forward, and the gradients of inputs, initial state and parameters, with one graph for all steps."""
    step, state, inputs = problem(2, 5, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(lambda state, x: step(state, x), fullgraph=True)
    plain = run_and_differentiate(reference.latent_recurrence, step, state, inputs)

    def run(_: Cell, state: Carry, inputs: Any) -> tuple[Carry, Any]:
        return latent_recurrence(compiled, state, inputs, checkpoint_every=every)

    for got, expected in zip(run_and_differentiate(run, step, state, inputs), plain, strict=True):
        assert_close_fp64(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp", "fsdp_step"])
def test_distributed(kind: str, tmp_path: Path) -> None:
    """Two processes with half the batch each have the gradients of one: DistributedDataParallel, `fully_shard`."""
    processes.run("tests.distributed_recurrence", PROCESSES, tmp_path, kind)
