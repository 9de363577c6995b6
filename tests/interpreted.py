"""The Triton kernels on CPU tensors, run by Triton's interpreter: test_gpu_code.py runs this file with TRITON_INTERPRET=1.

Not in bfloat16: the interpreter of Triton 3.6 to 3.9 multiplies its bit patterns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mirasol_kernels._check import Case, evaluate
from mirasol_kernels._triton import Config
from mirasol_kernels.block_causal_attention import cases, op, triton, triton_backward, triton_config
from mirasol_kernels.block_causal_attention.op import unit_stride
from tests.numerics import assert_within_budget

DTYPES = (torch.float32, torch.float16)
MACHINE = triton_config.Machine(90, 8)


class Interpreted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tables, scale):
        q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
        results = op._fake_fwd(q, k, v, *tables[:2], scale)
        triton.run_forward(q, k, v, *tables[:2], scale, *results, machine=MACHINE)
        out, lse, low = results
        ctx.save_for_backward(q, k, v, out, lse, low)
        ctx.tables, ctx.scale = tables, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        args = unit_stride(dout), dlse.contiguous(), *ctx.saved_tensors, *ctx.tables, ctx.scale
        grads = op._fake_bwd(*args)
        triton_backward.run_backward(*args, *grads, machine=MACHINE)
        return *grads, None, None


def interpreted(problem: cases.Problem, case: Case) -> Case:
    tables = problem.layout().tables()

    def call(q: Tensor, k: Tensor, v: Tensor, backend: Any) -> tuple[Tensor, ...]:
        return Interpreted.apply(q, k, v, tables, problem.factor)

    return case._replace(call=call)


@pytest.fixture(params=["16x16", "table"])
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles have more edges; and those that a GPU would get."""
    if request.param != "table":
        monkeypatch.setattr(triton, "config_of", lambda *_: Config(16, 16, 4, 2))
        monkeypatch.setattr(triton_backward, "config_of", lambda *_: Config(16, 16, 4, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float16"])
@pytest.mark.parametrize("name", cases.PROBLEMS)
def test_budget(name: str, dtype: torch.dtype, tiles: None) -> None:
    problem = cases.PROBLEMS[name]
    case = cases.build(name, problem, dtype=dtype)
    actual, low = evaluate(interpreted(problem, case), None), evaluate(case, "reference")
    exact = evaluate(case, "reference", torch.float64)
    assert actual.keys() == low.keys() == exact.keys()
    for what in exact:
        assert actual[what].dtype == low[what].dtype, what
        assert_within_budget(actual[what], low[what], exact[what], what=what)
