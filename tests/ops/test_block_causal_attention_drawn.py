"""block_causal_attention against its definition written densely, for drawn layouts, shapes, strides and dtypes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mirasol_kernels import SnippetLayout, explain
from mirasol_kernels._check import Case, evaluate
from mirasol_kernels.block_causal_attention import cases
from tests.numerics import assert_close_fp64, budget
from tests.ops.attention import FUSED
from tests.test_every_backend import DTYPES


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, read aloud, with every score in memory.  mask: bool (B or 1, Nq, Nk)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    terms = (scale * q @ k.mT).exp().masked_fill(~mask[:, None], 0)  # (B, Hq, Nq, Nk)
    total = terms.sum(3, keepdim=True)
    some = total > 0
    total = total.where(some, 1)
    return terms @ v / total, total.log().where(some, -torch.inf).squeeze(3)


SHORT = st.integers(0, 9) | st.sampled_from([31, 33, 63, 64, 65])  # tiles of 64, and one off them
LENGTH = SHORT | st.sampled_from([127, 128, 129])
LENGTHS = st.lists(LENGTH, min_size=1, max_size=4)
LIMITS = st.fixed_dictionaries({"window": st.none() | st.integers(1, 4), "sink": st.integers(0, 3)})


@st.composite
def uniform(draw) -> SnippetLayout:
    tokens = draw(st.integers(0, 20) | st.sampled_from([63, 64, 65, 127, 128, 129]))
    asked = draw(st.none() | st.integers(0, tokens))
    return SnippetLayout.uniform(draw(st.integers(0, 4)), tokens, q_tokens=asked, **draw(LIMITS))


@st.composite
def ragged(draw) -> SnippetLayout:
    keys = draw(LENGTHS)
    asked = draw(st.none() | st.lists(st.integers(0, 9), min_size=len(keys), max_size=len(keys)))
    return SnippetLayout.ragged(keys, asked, **draw(LIMITS))


@st.composite
def teacher_forcing(draw) -> SnippetLayout:
    return SnippetLayout.teacher_forcing(draw(st.lists(SHORT, min_size=1, max_size=4)), **draw(LIMITS))


@st.composite
def from_block_ids(draw) -> SnippetLayout:
    """Text around runs of image tokens, some padding on the left."""
    runs = draw(st.lists(st.tuples(st.booleans(), st.integers(1, 12)), min_size=1, max_size=6))
    ids = [i if image else -1 for i, (image, length) in enumerate(runs) for _ in range(length)]
    padding = draw(st.integers(0, len(ids)))
    valid = [i >= padding for i in range(len(ids))]
    asked = draw(st.none() | st.integers(0, len(ids)))
    return SnippetLayout.from_block_ids(ids, valid=valid, queries=asked, window_tokens=draw(st.none() | st.just(7)))


@st.composite
def cross(draw) -> SnippetLayout:
    keys = draw(LENGTHS)
    groups = draw(st.lists(st.tuples(LENGTH, st.integers(0, len(keys)), st.integers(0, 5)), min_size=1, max_size=5))
    lengths, upto, back = zip(*groups, strict=True)
    return SnippetLayout.cross(lengths, keys, upto, [max(0, u - b) for u, b in zip(upto, back, strict=True)])


@st.composite
def from_ranges(draw) -> SnippetLayout:
    """At most four slices, so that no row can see a fifth range; rows and keys in none of them are common."""
    edge = st.integers(0, 80)
    slices = draw(st.lists(st.tuples(edge, edge, edge, edge), min_size=1, max_size=4))
    queries = [sorted(s[:2]) for s in slices]
    keys = [sorted(s[2:]) for s in slices]
    return SnippetLayout.from_ranges(queries, keys, q_len=81, k_len=82)


SINGLE = uniform() | ragged() | teacher_forcing() | from_block_ids() | cross() | from_ranges()
LAYOUTS = {
    "uniform": uniform(),
    "ragged": ragged(),
    "teacher_forcing": teacher_forcing(),
    "from_block_ids": from_block_ids(),
    "cross": cross(),
    "from_ranges": from_ranges(),
    "packed": st.lists(SINGLE, min_size=2, max_size=3).map(SnippetLayout.packed),
    "batch": st.lists(SINGLE, min_size=1, max_size=3).map(SnippetLayout.batch),
}


WIDTH = st.integers(1, 24) | st.sampled_from([32, 64, 80, 128])
VIEWS = [cases.contiguous, cases.transposed, cases.packed, cases.sliced, cases.scattered]


@st.composite
def problems(draw, layouts: st.SearchStrategy[SnippetLayout]) -> cases.Problem:
    layout = draw(layouts)
    return cases.Problem(
        lambda: layout,
        batch=layout.batch or draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        dim=draw(WIDTH),
        value_dim=draw(st.none() | WIDTH),
        view=draw(st.sampled_from(VIEWS)),
        scale=draw(st.none() | st.sampled_from([0.5, -0.1])),
    )


def densely(problem: cases.Problem, case: Case) -> Case:
    """The same case, computed by `dense`."""
    mask = problem.layout().dense_mask()
    return case._replace(call=lambda q, k, v, backend: dense(q, k, v, mask, problem.factor))


def terms(problem: cases.Problem, case: Case, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """What every result would be if no two terms of its sums cancelled: rounding each of them costs an ulp of this.

    A drawn call may have so few results, and such small ones (rows that see one key have dS = 0), that neither their
    size nor the luck of one other computation measures what rounding may do.
    """
    q, k, v = (x.double().abs() for x in case.tensors.values())
    mask, scale, group = problem.layout().dense_mask()[:, None], abs(problem.factor), problem.group
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    signed_k = case.tensors["k"].double().repeat_interleave(group, 1)
    scores = problem.factor * case.tensors["q"].double() @ signed_k.mT
    p = (scores - exact["out1"].nan_to_num(neginf=0)[..., None]).exp().where(mask, 0)
    p = p * (1 + scale * q @ k.mT)  # an error of the score is a relative error of its exponential
    ones = torch.ones_like(exact["out0"])  # bounds every weight that `evaluate` gives to an output
    ds = p * (ones @ v.mT + (ones * exact["out0"].abs()).sum(3, keepdim=True) + 1)
    sums = {"out0": p @ v, "out1": p.sum(3), "dq": scale * ds @ k, "dk": scale * ds.mT @ q, "dv": p.mT @ ones}
    for name in ("dk", "dv"):
        sums[name] = sums[name].unflatten(1, (-1, group)).sum(2)
    return sums


def assert_rounded(actual: Tensor, low: Tensor, exact: Tensor, terms: Tensor, what: str) -> None:
    """`assert_within_budget` where the ulps are those of the largest sum of terms."""
    finite = torch.isfinite(exact)
    assert torch.equal(actual.double()[~finite], exact[~finite]), what
    most, _ = budget(low[finite], exact[finite], actual.dtype)
    most += 4 * torch.finfo(actual.dtype).eps * terms.amax().item() if terms.numel() else 0
    error = (actual.double() - exact)[finite].abs()
    assert (error <= most).all(), f"{what}: largest error {error.amax():.3e}, budget {most:.3e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("constructor", LAYOUTS)
def test_drawn(constructor: str, dtype: torch.dtype, record_property: Callable[[str, object], None]) -> None:
    """Outputs and gradients of the reference equal the dense form in float64; fused ones are within budget of it."""
    count = dict.fromkeys(["reference", *FUSED], 0)

    @settings(max_examples=52)
    @given(problem=problems(LAYOUTS[constructor]), seed=st.integers(0, 2**31 - 1))
    def run(problem: cases.Problem, seed: int) -> None:
        case = cases.build(str(seed), problem, dtype=dtype)
        exact, wide = evaluate(densely(problem, case), None, torch.float64), evaluate(case, "reference", torch.float64)
        for name in exact:
            assert_close_fp64(wide[name], exact[name], what=f"reference {name}")
        count["reference"] += 1
        low, sums = evaluate(case, "reference"), terms(problem, case, exact)
        for backend in FUSED:
            if explain(case.call, **case.tensors, backend=backend)[backend] == "runs":
                for name, actual in evaluate(case, backend).items():
                    assert_rounded(actual, low[name], exact[name], sums[name], f"{backend} {name}")
                count[backend] += 1

    run()
    for backend, number in count.items():
        record_property("drawn cases", (f"block_causal_attention, {backend}", constructor, number))
    assert count["reference"] >= 50
