"""Generic over every op: what torch.library and torch.compile must find true of it."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from mirasol_kernels import SnippetLayout, block_causal_attention, explain, use_backend
from mirasol_kernels._check import evaluate
from mirasol_kernels._dispatch import Op
from mirasol_kernels.block_causal_attention import cases
from tests.numerics import assert_within_budget
from tests.test_every_backend import Entry, case_of, entries


class Calls(TorchDispatchMode):
    """Records every call of an operator of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace.startswith("mirasol_"):
            self.seen.append((func, tree_map_only(Tensor, Tensor.detach, args)))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("entry", list(entries(reference=False)))
def test_opcheck(entry: Entry) -> None:
    """Schemas, fakes (with their strides) and functionalisation, for the arguments that each case leads to."""
    case = case_of(entry)
    with Calls() as calls:
        evaluate(case, entry[1])
    assert {func.name().split("::")[1] for func, _ in calls.seen} >= {f"{entry[0].name}_{p}" for p in entry[0].schemas}
    for func, args in calls.seen:
        torch.library.opcheck(func, tuple(args))


@pytest.mark.parametrize("entry", [p for p in entries(reference=True) if p.values[0][3] == 0])
def test_compiled(entry: Entry) -> None:
    """One graph, forward and backward, that computes what eager does."""
    torch._dynamo.reset()
    case = case_of(entry)
    compiled = case._replace(call=torch.compile(case.call, fullgraph=True, backend="aot_eager"))
    actual, eager = evaluate(compiled, entry[1]), evaluate(case, entry[1])
    exact = evaluate(case, "reference", torch.float64)
    assert actual.keys() == eager.keys()
    for name in exact:
        assert_within_budget(actual[name], eager[name], exact[name], what=name)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_inductor(backend: str) -> None:
    """The compiler that users get by default generates code around the operators, and for all of the reference."""
    torch._dynamo.reset()
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    case = next(cases.cases())
    said = explain(case.call, **case.tensors, backend=backend)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    compiled = case._replace(call=torch.compile(case.call, fullgraph=True))
    actual, eager, exact = (
        evaluate(compiled, backend),
        evaluate(case, backend),
        evaluate(case, "reference", torch.float64),
    )
    for name in exact:
        assert_within_budget(actual[name], eager[name], exact[name], what=name)


SERIES = {
    "uniform": lambda t: SnippetLayout.uniform(t, 5),
    "window and sink": lambda t: SnippetLayout.uniform(t, 3 + t % 4, window=3, sink=1),
    "teacher forcing": lambda t: SnippetLayout.teacher_forcing([3, t, 4, 2 * t][: 2 + t % 3]),
    "ragged": lambda t: SnippetLayout.ragged([t, 0, 5, 1] * (t % 3 + 1)),
}


@pytest.mark.parametrize("kind", SERIES)
@pytest.mark.parametrize("backend", ["reference", *(b.name for op in Op.all for b in op.backends if b.device == "cpu")])
def test_twenty_layouts_compile_at_most_twice(kind: str, backend: str) -> None:
    """Once for the first, once for any size; forward and backward, gradients of eager."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def call(q: Tensor, k: Tensor, v: Tensor, layout: SnippetLayout) -> Tensor:
        out, lse = block_causal_attention(q, k, v, layout, return_lse=True, backend=backend)
        return out.square().sum() + lse.sin().sum()

    compiled = torch.compile(call, fullgraph=True, backend=counter)
    for t in range(2, 22):
        layout = SERIES[kind](t)
        q, k, v = (torch.randn(2, heads, layout.q_len, 8, requires_grad=True) for heads in (4, 2, 2))
        said = explain(block_causal_attention, q, k, v, layout, backend=backend)[backend]
        if said != "runs":
            pytest.skip(f"{backend}: {said}")
        actual = torch.autograd.grad(compiled(q, k, v, layout), (q, k, v))
        low = torch.autograd.grad(call(q, k, v, layout), (q, k, v))
        wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
        out, lse = block_causal_attention(*wide, layout, return_lse=True)
        exact = torch.autograd.grad(out.square().sum() + lse.sin().sum(), wide)
        for compiled_grad, eager_grad, exact_grad in zip(actual, low, exact, strict=True):
            assert_within_budget(compiled_grad, eager_grad, exact_grad)
    assert counter.frame_count <= 2


def test_a_compiled_call_follows_use_backend() -> None:
    """The choice is made above the operator, in plain Python that Dynamo guards on."""
    torch._dynamo.reset()
    traced: list[set[str]] = []

    def record(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        traced.append({str(node.target) for node in graph.graph.nodes if "mirasol_" in str(node.target)})
        return graph

    case = next(cases.cases())
    compiled = torch.compile(case.call, fullgraph=True, backend=aot_autograd(fw_compiler=record))
    chosen = [name for name, said in explain(case.call, **case.tensors).items() if said == "runs"]
    for name in chosen:
        with use_backend(name):
            compiled(**case.tensors)
    for name, targets in zip(chosen, traced, strict=True):
        assert [target.split(".")[0] for target in targets] == ([] if name == "reference" else [f"mirasol_{name}"])
