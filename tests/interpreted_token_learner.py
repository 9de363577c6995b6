"""As interpreted.py, of token_learner: its Triton kernels on CPU tensors, behind the public functions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels._check import Case, evaluate, peak
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


def interpreted(processors: int = 2, capability: int = 90) -> Backend:
    machine = Machine(capability, processors)

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


def assert_right(case: Case, orders: int = 0) -> None:
    """With `orders` the reference's own error is, number by number, its largest of so many more orders of summation.
    Every number of a state hangs on the rounding of one logit, its maximum, so a single run of the reference may be
    lucky; and it is float32, but no better than the factors of 16 bits that it comes from, whose ulps it is given."""
    exact, dtype = evaluate(case, "reference", torch.float64), case.tensors["w1"].dtype
    calls = (case.call, *case.orders, *(cases.reordered(case, seed) for seed in range(orders)))
    lows = [evaluate(case._replace(call=call), "reference") for call in calls]
    actual = evaluate(case, None)
    assert actual.keys() == lows[0].keys() == exact.keys()
    for name, expected in exact.items():
        assert actual[name].dtype == lows[0][name].dtype, name
        each = torch.stack([low[name] for low in lows])
        worst = (each.double() - expected).nan_to_num().abs().argmax(0, keepdim=True)
        low = each.gather(0, worst)[0]
        # Nothing can be asked of a float16 that does not hold the result: dw1 of logits of 1e4 is 1e5.
        if peak(expected.nan_to_num(0, 0, 0)) <= torch.finfo(actual[name].dtype).max:
            assert_within_budget(actual[name].to(dtype), low.to(dtype), expected, what=name)


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
    assert_right(cases.case(name, dtype=dtype), orders=7 * (kind == "state"))


@pytest.mark.parametrize("kind", ["tokens", "state"])
@pytest.mark.parametrize("name", ["valid", "odd", "tile_and_one", "empty_source"])
def test_regimes(name: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden units stored, batch row by batch row; several blocks of learned tokens and slabs; however many splits."""
    use_tiles(monkeypatch, 16, 16)
    use(monkeypatch, fuses=lambda *_: False, slots_of=lambda *_: 16, WORKSPACE=1, SUMS=1)
    if kind == "state":
        as_state(monkeypatch)
    problem = cases.PROBLEMS[name]
    monkeypatch.setitem(cases.PROBLEMS, name, replace(problem, k=37))
    for processors in (1, 40):
        monkeypatch.setattr(op.OP, "backends", [interpreted(processors)])
        assert_right(cases.case(name), orders=3)


def test_chunks_share_their_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batch rows and sources: memory does not grow with them."""
    use(monkeypatch, fuses=lambda *_: False, WORKSPACE=1)
    weights = [torch.randn(size) for size in ((24,), (24,), (16, 24), (16,), (5, 16), (5,))]
    call = [torch.randn(3, 20, 24), torch.randn(3, 9, 24)], [None, None], *weights, None, False, 1e-6, True
    maximum, total, pooled = results = op._fake_fwd(*call)
    machine, args = Machine(90, 2), (pooled, None, maximum, total, pooled, *call)
    done = triton.forward_launches(*call, *results, machine=machine)
    done += triton_backward.backward_launches(*args, op._fake_bwd(*args), machine=machine)
    for kernel, name in (("pool", "hidden"), ("gradient", "z"), ("gradient", "dz"), ("gradient", "moments")):
        buffers = [launch.arguments[name] for launch in done if launch.kernel.__name__ == kernel]
        assert len(buffers) == 6 and len({x.data_ptr() for x in buffers}) == 1, name
        assert buffers[0].untyped_storage().nbytes() == buffers[0].nbytes, name


@pytest.mark.parametrize("name", ["valid", "wide", "write"])
def test_tiles_of_the_table(name: str) -> None:
    assert_right(cases.case(name))


def test_tiles_of_mma_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 16 bits `gradient` has half the tokens of `layer`."""
    monkeypatch.setattr(op.OP, "backends", [interpreted(capability=80)])
    assert_right(cases.case("wide", dtype=torch.float16))


@pytest.mark.parametrize("fused", [True, False])
def test_what_does_not_count_does_not_leak(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinity in tokens past `valid`, and in positions that no token has, change no bit; nor does a second
    run."""
    use_tiles(monkeypatch, 16, 16)
    use(monkeypatch, fuses=lambda *_: fused)
    case = cases.case("valid")
    valid = cases.PROBLEMS["valid"].valid
    clean = evaluate(case, None)
    for poison in (torch.nan, torch.inf, 0.0):
        tensors = {name: x.clone() for name, x in case.tensors.items()}
        if poison:
            for i, counts in enumerate(zip(*valid, strict=True)):
                tensors[f"position{i}"][max(counts) :] = poison
                for b, count in enumerate(counts):
                    tensors[f"source{i}"][b, count:] = poison
        assert_same(evaluate(case._replace(tensors=tensors), None), clean)


@pytest.mark.parametrize("name", ["odd", "sliced", "row_without_tokens"])
def test_reads_only_its_inputs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16, 16)
    case = cases.case(name)
    around = {name: poisoned(x) for name, x in case.tensors.items()}
    assert_same(evaluate(case._replace(tensors=around), None), evaluate(case, None))


def test_large_mean() -> None:
    """Tokens with a mean of a hundred times their spread, and some whose first channels are far from the rest."""
    case = cases.case("sources")
    tensors = dict(case.tensors)
    tensors["source0"] = tensors["source0"] + 100
    tensors["source1"] = tensors["source1"] + 100 * (torch.arange(32) < 16)
    assert_right(case._replace(tensors=tensors))


@st.composite
def problems(draw: Any) -> cases.Problem:
    """Any small call."""
    batch, n = draw(st.integers(1, 3)), tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=3)))
    valid = [tuple(draw(st.integers(-1, length + 2)) for length in n) for _ in range(batch)]
    c, h, k = (draw(st.integers(1, high)) for high in (40, 20, 36))
    return cases.Problem(
        n,
        batch,
        c,
        h,
        k,
        placed=draw(st.booleans()),
        valid=tuple(valid) if draw(st.booleans()) else None,
        gelu=draw(st.sampled_from(["tanh", "erf"])),
        sliced=draw(st.booleans()),
    )


@pytest.mark.parametrize("kind", ["tokens", "state"])
def test_drawn(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_tiles(monkeypatch, 16, 16)
    if kind == "state":
        as_state(monkeypatch)

    @settings(max_examples=8)
    @given(problem=problems(), seed=st.integers(0, 2**31 - 1), fused=st.booleans(), slots=st.sampled_from([16, 32]))
    def run(problem: cases.Problem, seed: int, fused: bool, slots: int) -> None:
        use(monkeypatch, fuses=lambda k, c: fused and k <= slots, slots_of=lambda *_: slots)
        cases.PROBLEMS[str(seed)] = problem
        try:
            assert_right(cases.case(str(seed)), orders=3)
        finally:
            del cases.PROBLEMS[str(seed)]

    run()
