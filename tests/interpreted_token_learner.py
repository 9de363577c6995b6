"""As interpreted.py, of token_learner: its Triton kernels on CPU tensors, behind the public functions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels._check import Case, evaluate
from mirasol_kernels._dispatch import Backend
from mirasol_kernels._triton import Machine
from mirasol_kernels.token_learner import (
    cases,
    op,
    token_learner_state,
    triton,
    triton_backward,
    triton_layer,
    triton_weights,
)
from mirasol_kernels.token_learner.triton_config import Tile
from tests.interpreter import multiply_in_order
from tests.numerics import assert_within_budget
from tests.test_every_backend import assert_same, poisoned

MODULES = (triton, triton_layer, triton_backward, triton_weights)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])


def interpreted(processors: int = 2) -> Backend:
    machine = Machine(90, processors)

    def forward(*args: Any) -> tuple[Tensor, ...]:
        results = op._fake_fwd(*args)
        triton.run_forward(*args, *results, machine=machine)
        return results

    def backward(*args: Any) -> list[Tensor]:
        results = op._fake_bwd(*args)
        triton_backward.run_backward(*args, results, machine=machine)
        return results

    return Backend("interpreted", "cpu", None, lambda *_: None, {"fwd": forward, "bwd": backward})


@pytest.fixture(autouse=True)
def in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_in_order(monkeypatch)
    monkeypatch.setattr(op.OP, "backends", [interpreted()])


def use(monkeypatch: pytest.MonkeyPatch, **names: Any) -> None:
    """`tile_of`, `slots_of`, `fuses`, `WORKSPACE` or `SUMS` as given, wherever they are used."""
    for name, value in names.items():
        for module in MODULES:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, value)


def use_tiles(monkeypatch: pytest.MonkeyPatch, tokens: int, channels: int) -> None:
    use(monkeypatch, tile_of=lambda *_: Tile(tokens, channels, 4, 2))


def as_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on cases call `token_learner_state`."""
    monkeypatch.setattr(cases, "token_learner", lambda *args, **named: tuple(token_learner_state(*args, **named)))


def assert_right(case: Case, lows: list[dict[str, Tensor]] | None = None) -> None:
    exact = evaluate(case, "reference", torch.float64)
    low = evaluate(case, "reference")
    actual = evaluate(case, None)
    assert actual.keys() == low.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == low[name].dtype, name
        # Of no float16 that holds it nothing can be asked: dw1 of logits of 1e4 is 1e5.
        if exact[name].numel() and exact[name].abs().nan_to_num(0, 0).max() > torch.finfo(actual[name].dtype).max:
            continue
        assert_within_budget(actual[name], low[name], exact[name], what=name)


@DTYPES
@pytest.mark.parametrize("kind", ["tokens", "state"])
@pytest.mark.parametrize("name", cases.PROBLEMS)
def test_budget(name: str, kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient, over tiles of which the problem has a few."""
    problem = cases.PROBLEMS[name]
    longest = max(problem.n)
    use_tiles(monkeypatch, 16 if longest <= 48 else 32 if longest <= 128 else 64, 16 if problem.c <= 64 else 64)
    if kind == "state":
        as_state(monkeypatch)
    assert_right(cases.case(name, dtype=dtype))
