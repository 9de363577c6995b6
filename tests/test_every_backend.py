"""Generic over every op, its fused backends and its cases: what any kernel must keep, whatever it computes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from mirasol_kernels import SnippetLayout, block_causal_attention, explain, token_learner
from mirasol_kernels._check import Case, evaluate, leaves, unavoidable
from mirasol_kernels._dispatch import Op
from tests.numerics import assert_within_budget

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ON = {"cpu": (), "cuda": (pytest.mark.gpu,)}
Entry = tuple[Op, str, str, int]  # an op, a backend, the device it runs on, the number of a case


def entries(*, reference: bool) -> Iterator:
    """Every case on every fused backend, and on the reference if asked for; one skip for a backend that is not here."""
    for op in Op.all:
        names = [case.name for case in op.cases.cases("cpu")] if op.cases else []
        for b in op.backends:
            if b.absent:
                marks = [pytest.mark.skip(reason=f"{b.name}: {b.absent}"), *ON[b.device]]
                yield pytest.param((op, b.name, b.device, 0), id=f"{op.name}-{b.name}", marks=marks)
        runs = [(b.name, b.device) for b in op.backends if not b.absent] + [("reference", "cpu")] * reference
        for backend, device in runs:
            for number, name in enumerate(names):
                yield pytest.param((op, backend, device, number), id=f"{op.name}-{backend}-{name}", marks=ON[device])


def case_of(entry: Entry, dtype: torch.dtype = torch.float32) -> Case:
    """The case, if the backend serves it; its reason skips the test."""
    op, backend, device, number = entry
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU")
    case = list(op.cases.cases(device, dtype))[number]
    said = explain(case.call, **leaves(case), backend=backend)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    return case


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Bit by bit; NaN is nowhere."""
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("entry", list(entries(reference=False)))
def test_budget(entry: Entry, dtype: torch.dtype) -> None:
    """Outputs and every gradient are as near to the reference in float64 as the dtype allows."""
    case = case_of(entry, dtype)
    actual, exact = evaluate(case, entry[1]), evaluate(case, "reference", torch.float64)
    low = unavoidable(case, exact)
    assert actual.keys() == low.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == low[name].dtype, name
        assert_within_budget(actual[name], low[name], exact[name], what=name)


def poisoned(x: Tensor) -> Tensor:
    """x with its strides, in memory that holds NaN before it, behind it and in every gap."""
    margin = 64
    extent = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    memory = torch.full((extent + 2 * margin,), torch.nan, dtype=x.dtype, device=x.device)
    return memory.as_strided(x.shape, x.stride(), margin).copy_(x)


@pytest.mark.parametrize("entry", list(entries(reference=True)))
def test_reads_only_its_inputs_and_repeats(entry: Entry) -> None:
    """NaN around the inputs, and in memory not yet written (conftest), change no bit, nor does a second run."""
    case = case_of(entry)
    once = evaluate(case, entry[1])
    around = {name: poisoned(x) for name, x in case.tensors.items()}
    assert_same(evaluate(case._replace(tensors=around), entry[1]), once)
    for name, x in around.items():
        assert torch.equal(x, case.tensors[name]), f"{name} was written to"


@pytest.mark.parametrize("entry", list(entries(reference=False)))
def test_any_number_of_threads(entry: Entry) -> None:
    case, before = case_of(entry), torch.get_num_threads()
    if entry[2] != "cpu":
        pytest.skip(f"runs on {entry[2]} tensors")
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(evaluate(case, entry[1]))
    finally:
        torch.set_num_threads(before)
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


@pytest.mark.parametrize("entry", list(entries(reference=False)))
def test_one_gradient_at_a_time(entry: Entry) -> None:
    """Whether gradients are asked for, of all inputs, of one or of none, the bits are the same."""
    case = case_of(entry)
    once = evaluate(case, entry[1])
    with torch.no_grad():
        outputs = case.call(**case.tensors, backend=entry[1])
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    assert_same({f"out{i}": out for i, out in enumerate(outputs)}, {k: v for k, v in once.items() if k[:3] == "out"})
    for name, x in case.tensors.items():
        # the others as constants of the call
        constants = {other: y for other, y in case.tensors.items() if other != name}

        def call(constants: dict[str, Tensor] = constants, **kwargs):
            return case.call(**constants, **kwargs)

        alone = evaluate(Case(case.name, call, {name: x}), entry[1])
        assert_same(alone, {key: value for key, value in once.items() if key in alone})
        assert f"d{name}" in alone


def attends(dim: int) -> Case:
    """Of the size of a training step: all of a GPU is busy, and its tensor cores wait for memory."""
    layout = SnippetLayout.uniform(8, 512)
    q, k, v = (torch.randn(1, heads, layout.q_len, dim, device="cuda") for heads in (16, 4, 4))
    tensors = {name: x.bfloat16() for name, x in {"q": q, "k": k, "v": v}.items()}
    return Case(f"D {dim}", lambda q, k, v, **more: block_causal_attention(q, k, v, layout, **more), tensors)


def learns(k: int) -> Case:
    shapes = {"sources": (64, 1568, 768), "norm_weight": (768,), "norm_bias": (768,)}
    shapes |= {"w1": (64, 768), "b1": (64,), "w2": (k, 64), "b2": (k,)}
    tensors = {name: torch.randn(shape, device="cuda").bfloat16() for name, shape in shapes.items()}
    return Case(f"k {k}", token_learner, tensors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("build", "size"), [(attends, 64), (attends, 80), (attends, 128), (learns, 32), (learns, 96)])
def test_a_busy_gpu_repeats(build: Callable[[int], Case], size: int) -> None:
    """Twenty runs give the same bits.  What would not: a barrier that a compiler leaves out between two warpgroups of a
    tile (triton-lang/triton#11047), or a register that it reuses while tensor cores read it (#11781)."""
    torch.manual_seed(0)
    case = build(size)
    once = evaluate(case, "triton")
    for _ in range(20):
        assert_same(evaluate(case, "triton"), once)
