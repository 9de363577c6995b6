"""The backward of the fused steps by hand, behind the public function, against autograd through the plain steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mirasol_kernels._check import evaluate, unavoidable
from mirasol_kernels._dispatch import Backend, Op
from mirasol_kernels.latent_recurrence import backward, cases, op
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.test_registration import Calls

# With two layers, tables, steps without input, one step, more tokens read than slots.
NAMES = ("tl", "tl_positions", "tl_valid", "one_step", "memory_smaller_than_read", "wide_layers", "wide_read")


def forward(memory: Tensor, for_read: list[Tensor], for_write: list[Tensor], *call: Any) -> tuple[Tensor, ...]:
    *of_unit, keep = call
    unit, kept, outputs = backward.Unit(*of_unit), [], []
    for t in range(for_read[0].shape[1]):
        kept.append(memory)
        memory, output, _ = unit.step(memory, [x[:, t] for x in for_read], [x[:, t] for x in for_write])
        outputs.append(output)
    nothing = memory.new_empty(len(memory), 0, *memory.shape[1:])
    return memory, torch.stack(outputs, 1), torch.stack(kept, 1) if keep else nothing


# Through torch's dispatcher, as the backend runs it.
registered = Op("latent_recurrence_by_hand", fwd=(op.FWD, op._fake_fwd), bwd=(op.BWD, op._fake_bwd))
Op.all.remove(registered)
registered.backend("native", "cpu", op._not_fused, fwd=forward, bwd=op._triton_bwd)


@pytest.fixture(autouse=True)
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        op.OP, "backends", [Backend("native", "cpu", None, lambda *_: None, registered.backends[0].calls)]
    )


@pytest.mark.parametrize("name", NAMES)
def test_float64(name: str) -> None:
    case = cases.case(name, dtype=torch.float64)
    actual, expected = evaluate(case, None), evaluate(case, "reference")
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        assert_close_fp64(actual[key], x, what=key)


@pytest.mark.parametrize("name", NAMES)
def test_budget(name: str) -> None:
    case = cases.case(name)
    actual, exact = evaluate(case, None), evaluate(case, "reference", torch.float64)
    low = unavoidable(case, exact)
    for key, x in exact.items():
        assert_within_budget(actual[key], low[key], x, what=key)


def test_state_without_tokens() -> None:
    """Steps with no input at all: maxima of -inf, sums of 0."""
    case = cases.problem_case("nothing_seen", cases.Problem((0,), steps=2), dtype=torch.float64)
    actual, expected = evaluate(case, None), evaluate(case, "reference")
    for key, x in expected.items():
        assert_close_fp64(actual[key], x, what=key)


def test_opcheck() -> None:
    with Calls() as calls:
        evaluate(cases.case("tl_positions"), None)
    ours = [(func, args) for func, args in calls.seen if "by_hand" in func.name()]
    assert len(ours) == 2
    for func, args in ours:
        torch.library.opcheck(func, tuple(args))
