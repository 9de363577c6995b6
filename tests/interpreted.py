"""The Triton kernels on CPU tensors, in Triton's interpreter: test_gpu_code.py runs this file with TRITON_INTERPRET=1.

Not in bfloat16: the interpreter of Triton 3.6 to 3.9 multiplies its bit patterns.  A launch takes seconds, so shapes
are small, and tiles are small too, which gives them edges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels import SnippetLayout
from mirasol_kernels._check import Case, evaluate, unavoidable
from mirasol_kernels._triton import Config
from mirasol_kernels.block_causal_attention import cases, op, reference, triton, triton_backward
from mirasol_kernels.block_causal_attention.triton_config import Machine
from tests.interpreter import multiply_in_order
from tests.numerics import assert_within_budget
from tests.ops.test_block_causal_attention_drawn import LAYOUTS, assert_rounded, densely, problems, terms

MACHINE = Machine(90, 2)


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply_in_order(monkeypatch)


class Interpreted(torch.autograd.Function):
    """What `op.Fused` does, on CPU tensors."""

    @staticmethod
    def forward(ctx, q, k, v, tables, scale):
        q, k, v = op.unit_stride(q), op.unit_stride(k), op.unit_stride(v)
        results = op._fake_fwd(q, k, v, *tables[:2], scale)
        triton.run_forward(q, k, v, *tables[:2], scale, *results, machine=MACHINE)
        ctx.save_for_backward(q, k, v, *results)
        ctx.tables, ctx.scale = tables, scale
        return results[:2]

    @staticmethod
    def backward(ctx, dout, dlse):
        args = op.unit_stride(dout), dlse.contiguous(), *ctx.saved_tensors, *ctx.tables, ctx.scale
        grads = op._fake_bwd(*args)
        triton_backward.run_backward(*args, *grads, machine=MACHINE)
        return *grads, None, None


def interpreted(problem: cases.Problem, case: Case) -> Case:
    tables = problem.layout().tables()

    def call(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> tuple[Tensor, ...]:
        return Interpreted.apply(q, k, v, tables, problem.factor)

    return case._replace(call=call)


def use_tiles(monkeypatch: pytest.MonkeyPatch, rows: int, keys: int) -> None:
    for module in (triton, triton_backward):
        monkeypatch.setattr(module, "config_of", lambda *_: Config(rows, keys, 4, 2))


def in_blocks(call: Callable[..., Any], **arguments: Any) -> Any:
    """The reference a few rows at a time, so that its sums over rows go tile by tile, as ours do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "BUDGET", 1 << 14)
        return call(**arguments)


def assert_right(problem: cases.Problem, case: Case) -> None:
    actual, exact = evaluate(interpreted(problem, case), None), evaluate(case, "reference", torch.float64)
    low = unavoidable(case._replace(orders=(partial(in_blocks, case.call),)), exact)
    assert actual.keys() == low.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == low[name].dtype, name
        assert_within_budget(actual[name], low[name], exact[name], what=name)


@pytest.mark.parametrize("name", cases.PROBLEMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
def test_budget(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and every gradient, over tiles of which the problem has a few."""
    problem = cases.PROBLEMS[name]
    layout = problem.layout()
    longest = max(layout.q_len, layout.k_len)
    size = 16 if longest <= 48 else 32 if longest <= 96 else 64
    use_tiles(monkeypatch, size, size if dtype == torch.float32 else max(16, size // 2))
    assert_right(problem, cases.build(name, problem, dtype=dtype))


@pytest.mark.parametrize("name", ["ragged", "tile_and_one", "dim_80_of_values_64", "four_ranges"])
def test_tiles_of_the_table(name: str) -> None:
    assert_right(cases.PROBLEMS[name], cases.build(name, cases.PROBLEMS[name]))


DECODE = {
    "one query": cases.Problem(lambda: SnippetLayout.cross([1], [140], [1]), heads=2),
    "query heads share a tile": cases.Problem(lambda: SnippetLayout.cross([3], [290], [1]), heads=1, group=5, dim=24),
    "streams at different positions": cases.Problem(
        lambda: SnippetLayout.batch([SnippetLayout.cross([2], [n], [1]) for n in (64, 0, 130)]), batch=3, group=2
    ),
    "window and sink": cases.Problem(
        lambda: SnippetLayout.from_ranges([(0, 4)] * 3, [(0, 9), (40, 77), (200, 290)], q_len=6, k_len=290),
        value_dim=33,
    ),
    "rows of several snippets": cases.Problem(lambda: SnippetLayout.uniform(9, 32, q_tokens=1, window=4, sink=1)),
}


@pytest.mark.parametrize("name", DECODE)
def test_decode(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows: the keys are split among programs, however many run at a time, and the parts merged."""
    use_tiles(monkeypatch, 16, 16)
    problem = DECODE[name]
    case = cases.build(name, problem)
    q, k, v = case.tensors.values()
    tables = problem.layout().tables()
    low = case.call(q, k, v, backend="reference")
    exact = case.call(*(x.double() for x in (q, k, v)), backend="reference")
    split = set()
    for processors in (1, 3, 16):
        results = op._fake_fwd(q, k, v, *tables[:2], problem.factor)
        args = (q, k, v, *tables[:2], problem.factor, *results)
        launches = triton.forward_launches(*args, machine=Machine(90, processors))
        split.add(launches[0].arguments["splits"])
        for launch in launches:
            launch.run()
        for what, actual, rounded, expected in zip(("out", "lse"), results, low, exact, strict=False):
            assert_within_budget(actual, rounded, expected, what=f"{processors} processors: {what}")
    assert len(split) > 1


def test_what_nobody_sees_does_not_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN and infinity in keys and values that no row sees, and in rows that see nothing, change no bit; nor does a
    second run."""
    use_tiles(monkeypatch, 16, 16)
    problem = replace(cases.PROBLEMS["empty_rows"], batch=1, heads=1, view=cases.contiguous)
    case = interpreted(problem, cases.build("leak", problem))
    clean = evaluate(case, None)
    mask = problem.layout().dense_mask()[0]
    for poison in (torch.nan, torch.inf, 0.0):
        tensors = {name: x.clone() for name, x in case.tensors.items()}
        if poison:
            tensors["q"][:, :, ~mask.any(1)] = poison
            tensors["k"][:, :, ~mask.any(0)] = poison
            tensors["v"][:, :, ~mask.any(0)] = poison
        for name, result in evaluate(case._replace(tensors=tensors), None).items():
            assert torch.equal(result, clean[name]), name


@pytest.mark.parametrize("constructor", LAYOUTS)
def test_drawn(constructor: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the test of the same name of the op, with fewer and smaller cases."""
    use_tiles(monkeypatch, 16, 16)

    @settings(max_examples=4)
    @given(problem=problems(LAYOUTS[constructor]), seed=st.integers(0, 2**31 - 1))
    def run(problem: cases.Problem, seed: int) -> None:
        problem = replace(problem, batch=problem.layout().batch or 1, heads=1, group=min(2, problem.group))
        case = cases.build(str(seed), problem)
        exact, low = evaluate(densely(problem, case), None, torch.float64), evaluate(case, "reference")
        sums = terms(problem, case, exact)
        for name, actual in evaluate(interpreted(problem, case), None).items():
            assert_rounded(actual, low[name], exact[name], sums[name], name)

    run()
