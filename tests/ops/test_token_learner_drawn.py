"""token_learner's fused backends against the reference in float64, for drawn sizes, sources, options and dtypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels import explain
from mirasol_kernels._check import Case, budget, evaluate
from mirasol_kernels.token_learner import cases, op
from mirasol_kernels.token_learner.backward import gelu_and_slope, outer
from mirasol_kernels.token_learner.reference import leading, tokens

FUSED = [b.name for b in op.OP.backends if b.device == "cpu"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@st.composite
def problems(draw: Callable, tokens: int = 150) -> cases.Problem:
    """Any legal call: tile and one more or less, no tokens, counts beyond [0, n], both forms of GELU and of result."""
    sizes = st.sampled_from([0, 1, 2, 63, 64, 65, 127, 128, 129]) | st.integers(0, tokens)
    n = tuple(min(x, tokens) for x in draw(st.lists(sizes, min_size=1, max_size=3)))
    batch = draw(st.integers(1, 4))
    counts = st.tuples(*(st.integers(-1, x + 1) for x in n))
    return cases.Problem(
        n,
        batch=batch,
        c=draw(st.integers(1, 80)),
        h=draw(st.integers(1, 40)),
        k=draw(st.integers(1, 40)),
        placed=draw(st.booleans()),
        valid=draw(st.none() | st.tuples(*[counts] * batch)),
        gelu=draw(st.sampled_from(["tanh", "erf"])),
        spread=draw(st.sampled_from([1.0, 1.0, 30.0])),
        sliced=draw(st.booleans()),
        eps=draw(st.sampled_from([1e-6, 1e-2])),
        state=draw(st.booleans()),
    )


def terms(problem: cases.Problem, case: Case, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every result would be if no two terms of its sums cancelled: rounding each of them costs an ulp of this.

    A drawn call may have gradients that are 0 because all that they sum cancels (one token, tokens alike after the
    norm): then neither their size nor the luck of one other computation measures what rounding may do.
    """
    names, count = cases.WEIGHTS, len(problem.n)
    all_tensors = {name: x.double() for name, x in case.tensors.items()}
    gamma, beta, w1, b1, w2, b2 = (all_tensors[name] for name in names)
    valid = None if problem.valid is None else torch.tensor(problem.valid)
    seen = []
    for i in range(count):
        source = all_tensors[f"source{i}"]
        mask = leading(source, None if valid is None else valid[:, i])
        x = tokens(source, all_tensors.get(f"position{i}"), mask)
        centred = x - x.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + problem.eps).rsqrt()
        normed = (centred * rstd).abs() * gamma.abs() + beta.abs()
        hidden, slope = gelu_and_slope(centred * rstd * gamma @ w1.mT + (beta @ w1.mT + b1), problem.gelu)
        logits = hidden @ w2.mT + b2
        if mask is not None:
            logits = logits.masked_fill(~mask, -torch.inf)
        # of a logit: its own sum, and that of the hidden unit before it, which LayerNorm of few channels may amplify
        unsure = (hidden.abs() + (normed @ w1.abs().mT + b1.abs()) * (1 + slope.abs())) @ w2.abs().mT + b2.abs()
        seen.append((x.abs(), rstd, normed, hidden.abs() + slope.abs(), slope.abs() + 1, logits, unsure))
    logits = torch.cat([each[5] for each in seen], 1)
    top = logits.amax(1, keepdim=True).nan_to_num(neginf=0) if logits.shape[1] else logits.new_zeros(len(logits), 1, 1)
    total = 1 if problem.state else (logits - top).exp().sum(1, keepdim=True).clamp_min(1e-300)
    pooled = exact["out2" if problem.state else "out0"].abs()
    dsum = 1 if problem.state else pooled.sum(2)[:, None]
    sums = {name: torch.zeros_like(all_tensors[name]) for name in names}
    state = [torch.zeros_like(x) for x in (exact["out0"], exact["out1"], pooled)] if problem.state else None
    out = torch.zeros_like(pooled)
    for i, (x, rstd, normed, hidden, slope, logits, unsure) in enumerate(seen):
        p = (logits - top).exp() / total * (1 + unsure)
        ds = p * (dsum + x.sum(2, keepdim=True))
        dz = ds @ w2.abs() * slope
        dnormed = dz @ w1.abs()
        dx = rstd * (1 + normed) * (dnormed * gamma.abs()).amax(-1, keepdim=True) * 3 + p.sum(2, keepdim=True)
        out += p.mT @ x
        if state:
            state[0] = torch.maximum(state[0], unsure.amax(1)) if unsure.shape[1] else state[0]
            state[1] += p.sum(1)
        sums[f"source{i}"], sums[f"position{i}"] = dx, dx.sum(0)
        parts = dnormed * normed, dnormed, outer(dz, normed), dz, outer(ds, hidden), ds
        for name, part in zip(names, parts, strict=True):
            sums[name] = sums[name] + (part if part.shape == sums[name].shape else part.sum((0, 1)))
    outputs = dict(zip(("out0", "out1", "out2"), (*state[:2], out) if state else (out,), strict=False))
    return outputs | {f"d{name}": x for name, x in sums.items()}


def assert_rounded(actual: Tensor, low: Tensor, exact: Tensor, terms: Tensor, dtype: torch.dtype, what: str) -> None:
    """`assert_within_budget` where the ulps are those of the largest sum of terms, in the dtype of the call: a state is
    of float32, and made of logits that were rounded to less."""
    finite = torch.isfinite(exact)
    assert torch.equal(actual.double()[~finite], exact[~finite]), what
    most, _ = budget(low[finite], exact[finite], actual.dtype)
    most += 4 * torch.finfo(dtype).eps * terms.amax().item() if terms.numel() else 0
    error = (actual.double() - exact)[finite].abs()
    assert (error <= most).all(), f"{what}: largest error {error.amax():.3e}, budget {most:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("backend", FUSED)
def test_drawn(backend: str, dtype: torch.dtype, record_property: Callable) -> None:
    """Outputs and every gradient are as near to float64 as the dtype allows."""
    case = next(cases.cases(dtype=dtype))
    said = explain(case.call, **case.tensors, backend=backend)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    drawn: Counter[str] = Counter()

    @settings(max_examples=170)
    @given(problem=problems(), seed=st.integers(0, 2**31 - 1))
    def run(problem: cases.Problem, seed: int) -> None:
        drawn["state" if problem.state else "finished"] += 1
        case = cases.build(str(seed), problem, dtype=dtype)
        actual, low = evaluate(case, backend), evaluate(case, "reference")
        exact = evaluate(case, "reference", torch.float64)
        assert actual.keys() == low.keys() == exact.keys()
        sums = terms(problem, case, exact)
        for name in exact:
            assert_rounded(actual[name], low[name], exact[name], sums[name], dtype, name)

    run()
    for kind, number in drawn.items():
        record_property("drawn cases", ("token_learner", f"{backend} {str(dtype)[6:]} {kind}", number))
