"""The loop as one node of the graph: what it keeps, what a step may capture, and where it stands back."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mirasol_kernels.latent_recurrence import latent_recurrence, reference, replay, scan
from tests.numerics import assert_close_fp64
from tests.ops.test_latent_recurrence import problem


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which way each call goes."""
    seen: list[str] = []
    original, segments = scan.replayed, scan._segments

    def replayed(*args):
        result = original(*args)
        seen.append("replay")
        return result

    monkeypatch.setattr(scan, "replayed", replayed)
    monkeypatch.setattr(scan, "_segments", lambda *args: seen.append("checkpoint") or segments(*args))
    yield seen


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).requires_grad_()


def both(step, state: Tensor, x: Tensor, *leaves: Tensor, every: int = 2) -> list[list[Tensor]]:
    """Results and gradients of the plain loop and of ours."""
    found = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=every)):
        torch.manual_seed(3)
        end, y = run(step, state, x)
        found.append([end, y, *torch.autograd.grad(end.sin().sum() + y.square().sum(), [state, x, *leaves])])
    return found


def test_a_parameter_of_late_steps(nodes: list[str]) -> None:
    """Captured by some steps only: forward looks at every segment's graph."""
    early, late = draw(3), draw(3)

    def step(state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        h = (state["h"] * x + (early if state["t"] < 3 else late)).sin()
        return {"t": state["t"] + 1, "h": h}, h

    state, x = draw(3), draw(3, 6)
    grads = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=2)):
        end, y = run(step, {"t": torch.zeros((), dtype=torch.int64), "h": state}, x)
        grads.append(torch.autograd.grad(end["h"].sum() + y.sum(), [early, late, state, x]))
    for got, expected in zip(grads[1], grads[0], strict=True):
        assert_close_fp64(got, expected)
    assert nodes == ["replay"]


@pytest.mark.parametrize("what", ["no leaf", "hook"])
def test_what_it_cannot_take_goes_by_checkpoint(nodes: list[str], what: str) -> None:
    """With the same random numbers as if nothing had been tried."""
    leaf = draw(3)
    weight = leaf if what == "hook" else leaf.exp()
    if what == "hook":
        leaf.register_hook(lambda grad: grad * 2)
    state, x = draw(3), draw(3, 5)
    plain, mine = both(lambda s, x: ((torch.nn.functional.dropout(s, 0.5) * weight + x).sin(), s * x), state, x, weight)
    for got, expected in zip(mine, plain, strict=True):
        assert_close_fp64(got, expected)
    assert nodes == ["checkpoint"]


def test_stands_back_where_saved_tensors_are_hooked(nodes: list[str]) -> None:
    step, state, inputs = problem(2, 4, 3)
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        latent_recurrence(step, state, inputs)
    assert nodes == ["checkpoint"]


def test_keeps_states_and_nothing_of_the_steps(nodes: list[str]) -> None:
    weight = torch.randn(16, 16, requires_grad=True)
    made: list[weakref.ref] = []

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            state = (state @ weight + x).tanh()
            made.append(weakref.ref(state.untyped_storage()))
        return state, state.sum(1)

    gc.disable()  # what is dropped goes at once
    try:
        end, y = latent_recurrence(step, torch.zeros(4, 16), torch.randn(4, 12, 16), checkpoint_every=4)
        assert len(made) == 36 and sum(ref() is not None for ref in made) <= 3  # two between segments, and the last
        node = weakref.ref(y.grad_fn)
        del end, y
        assert node() is None and not any(ref() is not None for ref in made)
    finally:
        gc.enable()
    assert nodes == ["replay"]


def test_only_what_has_a_gradient_wants_one(nodes: list[str]) -> None:
    weight = draw(3)

    def step(state: tuple[Tensor, Tensor], x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        h, constant = state
        return ((h * x).sin(), constant + 1), (h * weight, constant)

    (h, constant), (y, plain) = latent_recurrence(step, (torch.ones(3).double(), torch.zeros(3)), torch.ones(3, 4))
    assert (h.requires_grad, constant.requires_grad, y.requires_grad, plain.requires_grad) == (
        False,
        False,
        True,
        False,
    )
    (grad,) = torch.autograd.grad(y.sum(), weight)
    assert grad.shape == (3,) and nodes == ["replay"]


def test_steps_without_outputs_or_gradients(nodes: list[str]) -> None:
    end, nothing = latent_recurrence(lambda s, x: (s + x, ()), torch.zeros(2), torch.ones(2, 3))
    assert nothing == () and torch.equal(end, torch.full((2,), 3.0)) and not end.requires_grad
    assert nodes == ["replay"]


def test_backward_twice_and_a_changed_parameter() -> None:
    weight, state, x = draw(3), draw(3), draw(3, 4)
    end, _ = latent_recurrence(lambda s, x: ((s * weight + x).sin(), s), state, x)
    first, second = (torch.autograd.grad(end.sum(), [weight, x], retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        end.sum().backward()


def test_private_names_of_torch() -> None:
    """What replay relies on beyond torch's public names: a torch without them should say so here."""
    before = torch._C._autograd._get_sequence_nr()
    node = torch.ones((), requires_grad=True).exp().grad_fn
    assert node._sequence_nr() >= before and not hasattr(node, "variable")
    assert node.next_functions[0][0].variable.requires_grad
    assert replay.can_replay()
