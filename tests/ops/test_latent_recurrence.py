"""latent_recurrence against the plain loop: same numbers, same gradients, less kept."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from mirasol_kernels.latent_recurrence import latent_recurrence, reference
from mirasol_kernels.latent_recurrence.scan import default_segment
from tests.numerics import assert_close_fp64


class Carry(NamedTuple):
    cell: Tensor
    counts: dict[str, Tensor]


class Cell:
    """A step that uses everything it may: nested state and inputs, captured parameters, several outputs."""

    def __init__(self, c: int) -> None:
        self.a, self.b = (torch.randn(c, c, dtype=torch.float64).div(c**0.5).requires_grad_() for _ in range(2))

    def __call__(self, state: Carry, x: tuple[Tensor, dict[str, Tensor]]) -> tuple[Carry, dict[str, Tensor]]:
        tokens, extra = x
        cell = torch.tanh(state.cell @ self.a + tokens @ self.b + extra["bias"])
        counts = {"sum": state.counts["sum"] + cell.square().sum(-1)}
        return Carry(cell, counts), {"y": cell * tokens, "norm": counts["sum"].sqrt()}


def problem(batch: int, length: int, c: int) -> tuple[Cell, Carry, tuple[Tensor, dict[str, Tensor]]]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).requires_grad_()

    state = Carry(draw(batch, c), {"sum": torch.ones(batch, dtype=torch.float64).requires_grad_()})
    return Cell(c), state, (draw(batch, length, c), {"bias": draw(batch, length, c)})


def run_and_differentiate(run: Any, step: Cell, state: Carry, inputs: Any) -> list[Tensor]:
    """Final state, outputs, and the gradient of every input, initial state and captured parameter."""
    results = pytree.tree_leaves(run(step, state, inputs))
    leaves = [*pytree.tree_leaves((state, inputs)), step.a, step.b]
    torch.manual_seed(1)
    grads = torch.autograd.grad(results, leaves, [torch.randn_like(y) for y in results], materialize_grads=True)
    return [*results, *grads]


@settings(max_examples=60)
@given(
    st.integers(1, 3), st.integers(1, 9), st.integers(1, 4), st.sampled_from([None, 1, 2, 3, 100]), st.integers(0, 999)
)
def test_equals_the_plain_loop_bitwise(batch: int, length: int, c: int, every: int | None, seed: int) -> None:
    torch.manual_seed(seed)
    step, state, inputs = problem(batch, length, c)
    plain = run_and_differentiate(reference.latent_recurrence, step, state, inputs)
    mine = run_and_differentiate(lambda *args: latent_recurrence(*args, checkpoint_every=every), step, state, inputs)
    half = len(plain) - len(pytree.tree_leaves((state, inputs))) - 2
    for got, expected in zip(mine[:half], plain[:half], strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(mine[half:], plain[half:], strict=True):
        assert_close_fp64(got, expected)  # a parameter's gradients are added up per segment


@pytest.mark.parametrize("length", [0, 1, 3])
def test_gradcheck(length: int) -> None:
    step, state, inputs = problem(2, length, 2)

    def run(cell: Tensor, total: Tensor, x: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        step.a, step.b = a, b
        end, outputs = latent_recurrence(step, Carry(cell, {"sum": total}), (x, {"bias": bias}), checkpoint_every=2)
        return end.cell, end.counts["sum"], outputs["y"], outputs["norm"]

    leaves = (state.cell, state.counts["sum"], inputs[0], inputs[1]["bias"], step.a, step.b)
    assert torch.autograd.gradcheck(run, leaves)


def test_no_steps_return_the_state_and_empty_outputs() -> None:
    step, state, inputs = problem(2, 0, 3)
    before = torch.get_rng_state()
    end, outputs = latent_recurrence(step, state, inputs)
    assert end is state
    assert {name: tuple(y.shape) for name, y in outputs.items()} == {"y": (2, 0, 3), "norm": (2, 0)}
    assert outputs["y"].dtype == torch.float64
    assert torch.equal(torch.get_rng_state(), before)

    def noisy(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return state, x + torch.rand(())

    latent_recurrence(noisy, torch.zeros(2), torch.zeros(2, 0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2])
def test_time_on_any_axis(dim: int) -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64)
    step = lambda s, x: (s + x, s * x)  # noqa: E731
    end, y = latent_recurrence(step, x.select(dim, 0), x, dim=dim)
    expected_end, expected = reference.latent_recurrence(step, x.select(dim, 0), x, dim)
    assert torch.equal(end, expected_end) and torch.equal(y, expected)
    assert_close_fp64(end, x.select(dim, 0) + x.sum(dim))
    assert y.shape == x.shape


@settings(max_examples=30)
@given(st.integers(0, 5), st.integers(0, 5), st.sampled_from([None, 1, 2]))
def test_streaming_is_bitwise_the_whole(first: int, second: int, every: int | None) -> None:
    step, state, inputs = problem(2, first + second, 3)
    end, outputs = latent_recurrence(step, state, inputs, checkpoint_every=every)
    parts = [pytree.tree_map(lambda x, i=i: x.split([first, second], 1)[i], inputs) for i in (0, 1)]
    middle, early = latent_recurrence(step, state, parts[0], checkpoint_every=every)
    last, late = latent_recurrence(step, middle, parts[1], checkpoint_every=every)
    assert all(map(torch.equal, pytree.tree_leaves(last), pytree.tree_leaves(end)))
    joined = pytree.tree_map(lambda a, b: torch.cat([a, b], 1), early, late)
    assert all(map(torch.equal, pytree.tree_leaves(joined), pytree.tree_leaves(outputs)))


def test_parameters_passed_in_the_state_or_bound() -> None:
    """A parameter that is handed on as part of the state gets the gradient of one that is captured."""
    step, state, inputs = problem(2, 5, 3)
    end, _ = reference.latent_recurrence(step, state, inputs)
    expected = torch.autograd.grad(end.cell.sin().sum(), [step.a, step.b])

    def carried(carry: tuple[Carry, Tensor, Tensor], x: Any) -> tuple[Any, Any]:
        state, a, b = carry
        here = Cell.__new__(Cell)
        here.a, here.b = a, b
        state, outputs = here(state, x)
        return (state, a, b), outputs

    (last, a, _), _ = latent_recurrence(carried, (state, step.a, step.b), inputs, checkpoint_every=2)
    assert torch.equal(a, step.a)
    for got, want in zip(torch.autograd.grad(last.cell.sin().sum(), [step.a, step.b]), expected, strict=True):
        assert_close_fp64(got, want)


def test_gradient_of_a_captured_tensor_that_is_no_leaf() -> None:
    step, state, inputs = problem(2, 5, 3)
    leaf = step.a
    grads = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=2)):
        step.a = leaf.exp().tanh()
        grads.append(torch.autograd.grad(run(step, state, inputs)[0].cell.sin().sum(), leaf)[0])
    assert_close_fp64(grads[1], grads[0])


def test_integers_and_constants_in_the_state() -> None:
    def step(state: dict[str, Tensor], x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        state = {"t": state["t"] + 1, "h": (state["h"] * x).sin()}
        return state, state["t"] * state["h"]

    h, x = (torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in ((3,), (3, 5)))
    seen = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=2)):
        end, y = run(step, {"t": torch.zeros((), dtype=torch.int64), "h": h}, x)
        assert end["t"].dtype == torch.int64 and end["t"] == 5
        seen.append([end["h"], y, *torch.autograd.grad(y.sum() + end["h"].sum(), [h, x])])
    assert all(map(torch.equal, *seen))


def test_streaming_has_the_gradient_of_the_whole() -> None:
    step, state, inputs = problem(2, 5, 3)

    def parts(step: Cell, state: Carry, inputs: Any) -> tuple[Carry, Any]:
        early, late = ([x.split([2, 3], 1)[i] for x in pytree.tree_leaves(inputs)] for i in (0, 1))
        middle, first = latent_recurrence(step, state, (early[0], {"bias": early[1]}))
        last, second = latent_recurrence(step, middle, (late[0], {"bias": late[1]}))
        return last, pytree.tree_map(lambda a, b: torch.cat([a, b], 1), first, second)

    whole = run_and_differentiate(latent_recurrence, step, state, inputs)
    for got, expected in zip(run_and_differentiate(parts, step, state, inputs), whole, strict=True):
        assert_close_fp64(got, expected)


def test_runs_are_bitwise_alike() -> None:
    step, state, inputs = problem(3, 9, 4)
    runs = [run_and_differentiate(latent_recurrence, step, state, inputs) for _ in range(2)]
    assert all(map(torch.equal, *runs))


def test_float16_states_near_its_end() -> None:
    """States of 1e4: whatever the step can do in float16 the recurrence does, and not an overflow more."""
    weight = torch.full((4, 4), 0.25, dtype=torch.float16, requires_grad=True)

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = (state @ weight + x) * 0.5 + 5e3
        return state, state + x

    state = torch.full((2, 4), 1e4, dtype=torch.float16).requires_grad_()
    x = (100 * torch.randn(2, 7, 4)).half().requires_grad_()
    seen = []
    for run in (reference.latent_recurrence, lambda *args: latent_recurrence(*args, checkpoint_every=2)):
        end, y = run(step, state, x)
        assert end.min() > 9e3 and y.isfinite().all()
        seen.append([end, y, *torch.autograd.grad((end.float().sum() + y.float().sum()) / 64, [state, x])])
    assert all(g.isfinite().all() for g in seen[0]) and all(map(torch.equal, *seen))


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps, each storage once."""

    def __init__(self) -> None:
        self.storages: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            self.storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        super().__init__(pack, lambda x: x)

    def __enter__(self) -> Kept:
        super().__enter__()
        return self


def test_only_states_are_kept_and_steps_run_twice_at_most() -> None:
    weight = torch.randn(64, 64, requires_grad=True)
    calls, length, every = 0, 12, 4

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        for _ in range(5):
            state = (state @ weight + x).tanh()
        return state, state

    state, x = torch.zeros(32, 64), torch.randn(32, length, 64)
    with Kept() as plain:
        reference.latent_recurrence(step, state, x)
    with Kept() as kept:
        end, _ = latent_recurrence(step, state, x, checkpoint_every=every)
    assert sum(plain.storages.values()) > 5 * length * state.nbytes  # what the plain loop keeps
    assert sum(kept.storages.values()) <= length // every * state.nbytes
    calls = 0
    end.sum().backward()
    assert calls == length


def test_views_keep_nothing_alive() -> None:
    """An output is often a view of the state, an input's gradient a view of something wider: neither may hold it."""
    sizes: list[int] = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.repeat(1, 50)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            wide = grad.clone()
            alive.append(weakref.ref(wide.untyped_storage()))
            sizes.append(sum(ref() is not None for ref in alive))
            return wide[:, : grad.shape[1] // 50]

    alive: list[weakref.ref] = []
    states: list[weakref.ref] = []

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = state.detach() + Watched.apply(x)
        states.append(weakref.ref(state.untyped_storage()))
        return state, state[:, :1]

    x = torch.randn(2, 4, 12, requires_grad=True)
    end, y = latent_recurrence(step, torch.zeros(2, 200), x, dim=2, checkpoint_every=3)
    assert sum(ref() is not None for ref in states) <= 12 // 3  # those at the heads of segments, and the last
    (end.sum() + y.sum()).backward()
    assert len(alive) == 12 and max(sizes) <= 3


def test_nothing_is_recomputed_without_autograd() -> None:
    with torch.no_grad():
        end, y = latent_recurrence(lambda s, x: (s + x, s), torch.zeros(2), torch.ones(2, 3))
    assert torch.equal(end, torch.full((2,), 3.0)) and torch.equal(y, torch.tensor([[0.0, 1, 2]] * 2))


def test_default_segment_grows_as_the_root() -> None:
    assert [default_segment(t) for t in (1, 10, 39, 40, 90, 512, 4000)] == [1, 1, 2, 2, 3, 8, 20]


def test_double_backward() -> None:
    step, state, inputs = problem(1, 3, 2)

    def run(x: Tensor) -> Tensor:
        return latent_recurrence(step, state, (x, inputs[1]))[1]["y"]

    assert torch.autograd.gradgradcheck(run, (inputs[0],))


def good(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return state + x, state


STATE, INPUTS = torch.zeros(2), torch.ones(2, 3)
ERRORS = {
    r"step: expected a function \(state, x\) -> \(state, y\), got int": (TypeError, (3, STATE, INPUTS), {}),
    "inputs: expected at least one tensor, got none": (ValueError, (good, STATE, ()), {}),
    "inputs: expected a pytree of tensors, got a float in it": (TypeError, (good, STATE, (INPUTS, 1.0)), {}),
    "state: expected a pytree of tensors, got a NoneType in it": (TypeError, (good, None, INPUTS), {}),
    r"dim: expected an axis of every input, got 2 for one of \(2, 3\)": (ValueError, (good, STATE, INPUTS), {"dim": 2}),
    r"inputs: expected one length on axis 1, got \[3, 4\]": (
        ValueError,
        (good, STATE, (INPUTS, torch.ones(2, 4))),
        {},
    ),
    "checkpoint_every: expected at least 1 or None, got 0": (
        ValueError,
        (good, STATE, INPUTS),
        {"checkpoint_every": 0},
    ),
    "checkpoint_every: expected an int, got float": (TypeError, (good, STATE, INPUTS), {"checkpoint_every": 2.0}),
    "dim: expected an int, got float": (TypeError, (good, STATE, INPUTS), {"dim": 1.0}),
    r"dim: expected an axis of the outputs, got 1 for a y_t of shape \(\)": (
        ValueError,
        (lambda s, x: (s, x.sum()), STATE, INPUTS),
        {},
    ),
    r"dim: expected an axis of the outputs, got -2 for a y_t of shape \(\)": (
        ValueError,
        (lambda s, x: (s, x.sum()), STATE, INPUTS[:0]),
        {"dim": -2},
    ),
    r"step: expected it to return \(state, output\), got Tensor": (TypeError, (lambda s, x: s + x, STATE, INPUTS), {}),
    "step: expected pytrees of tensors, got a float": (TypeError, (lambda s, x: (s, 1.0), STATE, INPUTS), {}),
    r"state: expected step to return the state it was given, \(2,\) torch.float32, got \(2,\) torch.float64": (
        ValueError,
        (lambda s, x: (s.double(), x), STATE, INPUTS),
        {},
    ),
    r"state: expected step to return the state it was given, \(2,\) torch.float32, got 2 tensors": (
        ValueError,
        (lambda s, x: ((s, s), x), STATE, INPUTS),
        {},
    ),
    r"state: expected step to return the state it was given, \(2,\) torch.float32, got \(1,\) torch.float32": (
        ValueError,
        (lambda s, x: (s[:1], x), STATE, INPUTS),
        {},
    ),
}


@pytest.mark.parametrize("text", ERRORS)
def test_errors(text: str) -> None:
    error, args, kwargs = ERRORS[text]
    with pytest.raises(error, match=f"^latent_recurrence: {text}"):
        latent_recurrence(*args, **kwargs)


def test_error_of_outputs_that_change() -> None:
    lengths = iter([2, 3])

    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return state, torch.zeros(next(lengths))

    text = r"outputs: expected step to return the outputs of the first step, \(2,\) torch.float32, got \(3,\)"
    with torch.no_grad(), pytest.raises(ValueError, match=f"^latent_recurrence: {text}"):
        latent_recurrence(step, STATE, INPUTS[:, :2])
