"""As interpreted.py, of latent_recurrence: the Triton kernels of the fused steps on CPU tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mirasol_kernels._check import evaluate, unavoidable
from mirasol_kernels._dispatch import Backend
from mirasol_kernels._triton import Machine
from mirasol_kernels.latent_recurrence import backward, cases, op, triton
from tests.interpreter import multiply_in_order
from tests.numerics import assert_within_budget
from tests.test_every_backend import assert_same, poisoned


def interpreted(*args: Any, processors: int = 2) -> tuple[Tensor, ...]:
    results = op._fake_fwd(*args)
    triton.run_forward(*args, *results, machine=Machine(90, processors))
    return results


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_in_order(monkeypatch)
    calls = {"fwd": interpreted, "bwd": op._triton_bwd}
    monkeypatch.setattr(op.OP, "backends", [Backend("interpreted", "cpu", None, op._not_fused, calls)])


@pytest.mark.parametrize("name", ["tl", "tl_valid", "one_step", "memory_smaller_than_read", "wide_layers", "wide_read"])
def test_budget(name: str) -> None:
    """Outputs and every gradient, behind the public function."""
    case = cases.case(name)
    actual, exact = evaluate(case, None), evaluate(case, "reference", torch.float64)
    low = unavoidable(case, exact)
    for key, x in exact.items():
        assert_within_budget(actual[key], low[key], x, what=key)


def arguments(
    batch: int,
    steps: int,
    slots: int,
    read: int,
    c: int,
    hidden: int,
    mlp: int,
    heads: int,
    layers: int = 1,
    tables: tuple[bool, ...] = (True,) * 4,
) -> list[Any]:
    """Of a call, in float64; the first step has no input at all."""

    def make(*sizes: int, scale: float = 1.0, mean: float = 0.0) -> Tensor:
        return mean + scale * torch.randn(*sizes, dtype=torch.float64)

    def norm() -> list[Tensor]:
        return [make(c, scale=0.2, mean=1), make(c, scale=0.2)]

    def layer(inputs: int, outputs: int) -> list[Tensor]:
        return [make(outputs, inputs, scale=inputs**-0.5), make(outputs, scale=0.2)]

    def state(k: int) -> list[Tensor]:
        maximum, total, weighted = make(batch, steps, k), 1 + make(batch, steps, k).abs(), make(batch, steps, k, c)
        maximum[:, 0], total[:, 0], weighted[:, 0] = -torch.inf, 0, 0
        return [maximum, total, weighted]

    weights = [x for k in (read, slots) for x in (*norm(), *layer(c, hidden), *layer(hidden, k))]
    for _ in range(layers):
        weights += [*norm(), *(x for _ in range(4) for x in layer(c, c)), *norm(), *layer(c, mlp), *layer(mlp, c)]
    placed = [make(n, c) if there else None for n, there in zip((slots, slots, read, read), tables, strict=True)]
    return [make(batch, slots, c), state(read), state(slots), weights + norm(), placed, heads]


def changed(args: Any, change: Any) -> Any:
    """The same with every tensor changed."""
    if isinstance(args, list):
        return [changed(x, change) for x in args]
    return change(args) if isinstance(args, Tensor) else args


def by_hand(memory: Tensor, for_read: list[Tensor], for_write: list[Tensor], *unit: Any) -> tuple[Tensor, ...]:
    """The last memory, the outputs and the memory before each step, in PyTorch."""
    run, kept, outputs = backward.Unit(*unit), [], []
    for t in range(for_read[0].shape[1]):
        kept.append(memory)
        memory, output, _ = run.step(memory, [x[:, t] for x in for_read], [x[:, t] for x in for_write])
        outputs.append(output)
    return memory, torch.stack(outputs, 1), torch.stack(kept, 1)


# (batch, steps, memory slots, tokens read, c, hidden, mlp, heads, layers, tables)
SHAPES = {
    "odd": (2, 3, 6, 5, 21, 10, 19, 3, 2),
    "tiles_and_one": (2, 1, 17, 3, 65, 17, 33, 1),
    "many_slots": (1, 1, 70, 4, 16, 16, 16, 2),
    "more_read_than_a_tile": (2, 1, 3, 33, 16, 16, 16, 2),
    "some_tables": (3, 2, 5, 6, 24, 16, 16, 4, 1, (False, True, False, True)),
    "no_tables": (1, 2, 1, 1, 8, 1, 1, 1, 1, (False,) * 4),
}


@pytest.mark.parametrize("processors", [0, 1000])
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, processors: int) -> None:
    """Any size, in both tiles of the linear layers; kept or not, the bits are the same."""
    exact_args = arguments(*SHAPES[name])
    args = changed(exact_args, Tensor.float)
    exact, low = by_hand(*changed(args, Tensor.double)), by_hand(*args)
    actual = interpreted(*args, True, processors=processors)
    for what, x, y, z in zip(("memory", "outputs", "kept"), actual, low, exact, strict=True):
        assert_within_budget(x, y, z, what=what)
    last, outputs, kept = interpreted(*args, False, processors=processors)
    assert torch.equal(last, actual[0]) and torch.equal(outputs, actual[1]) and kept.shape[1] == 0


def test_large_mean_and_logits() -> None:
    """Memory with a mean of a hundred times its spread, logits of thousands: one token takes all."""
    exact_args = arguments(2, 2, 9, 4, 40, 16, 16, 4)
    exact_args[0] += 100
    exact_args[3][4] *= 1e4
    args = changed(exact_args, Tensor.float)
    exact, low = by_hand(*changed(args, Tensor.double)), by_hand(*args)
    for what, x, y, z in zip(("memory", "outputs", "kept"), interpreted(*args, True), low, exact, strict=True):
        assert_within_budget(x, y, z, what=what)


def test_reads_only_its_inputs() -> None:
    """NaN around the inputs changes no bit, nor does a second run."""
    args = changed(arguments(*SHAPES["odd"]), Tensor.float)
    once, around = interpreted(*args, True), interpreted(*changed(args, poisoned), True)
    assert_same({str(i): x for i, x in enumerate(around)}, {str(i): x for i, x in enumerate(once)})


@pytest.mark.parametrize("read", [3, 8, 17])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_videos_do_not_leak(poison: float, read: int) -> None:
    """A video that is NaN or infinite changes no bit of the others of its batch."""
    args = changed(arguments(3, 2, 6, read, 24, 16, 16, 4), Tensor.float)
    clean = interpreted(*args, True)
    args[0][1] = poison
    for x, y in zip(interpreted(*args, True), clean, strict=True):
        assert torch.equal(x[::2], y[::2]) and not x[1].isfinite().all()


@pytest.mark.parametrize("layers", [1, 2])
def test_launches(layers: int) -> None:
    """4 + 4 for each block of the processor, a step."""
    args = changed(arguments(2, 3, 6, 5, 21, 10, 19, 3, layers), Tensor.float)
    done = triton.forward_launches(*args, True, *op._fake_fwd(*args, True), machine=Machine(90, 2))
    assert len(done) == 3 * (4 + 4 * layers)
