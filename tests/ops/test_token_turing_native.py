"""The fused steps of the Token Turing Machine on the CPU: against the definition, and what only they promise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from mirasol_kernels import explain, use_backend
from mirasol_kernels._check import evaluate, farthest
from mirasol_kernels.latent_recurrence import TokenTuringParameters, reference, token_turing_recurrence
from mirasol_kernels.latent_recurrence.cases import Problem, problem_case, shuffled
from mirasol_kernels.latent_recurrence.op import OP
from tests.numerics import assert_close_fp64, assert_within_budget

ABSENT = next(b.absent for b in OP.backends if b.name == "native")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"native: {ABSENT}")


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    heads = draw(st.integers(1, 4))
    return Problem(
        n=tuple(draw(st.lists(st.integers(0, 9), min_size=1, max_size=2))),
        steps=draw(st.integers(1, 5)),
        batch=draw(st.integers(1, 3)),
        c=16 * heads * draw(st.integers(1, 2)),
        heads=heads,
        memory=draw(st.integers(1, 20)),
        read=draw(st.integers(1, 18)),
        layers=draw(st.integers(1, 2)),
        placed=draw(st.booleans()),
        counted=draw(st.booleans()),
    )


def together(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """With all gradients as one: one that is 0 may be a sum of large terms; the largest of all is their scale."""
    gradients = torch.cat([x.flatten() for name, x in results.items() if name.startswith("d")])
    return {name: x for name, x in results.items() if not name.startswith("d")} | {"gradients": gradients}


@settings(max_examples=60)
@given(problems(), st.integers(0, 9999))
def test_drawn(problem: Problem, seed: int) -> None:
    """Last memory, outputs and every gradient.  What float32 cannot avoid varies by more than two from one order of
    summation to another, steps and norms amplifying it: of twelve the worst is taken."""
    case = problem_case(str(seed), problem)
    actual, exact = evaluate(case, "native"), together(evaluate(case, "reference", torch.float64))
    assert not actual["dread.mlp.out.bias"].any() and not actual["dwrite.mlp.out.bias"].any()  # see op.Steps.backward
    actual = together(actual)
    orders = (shuffled(case.call, problem.c, order) for order in range(12))
    lows = [together(evaluate(case._replace(call=order), "reference")) for order in orders]
    for name in exact:
        worst = farthest((low[name] for low in lows), exact[name])
        assert_within_budget(actual[name], worst, exact[name], what=name)


def machine(c: int = 48, memory: int = 6, read: int = 4, **options: int) -> TokenTuringParameters:
    made = TokenTuringParameters.init(c, memory, read, heads=4, mlp=32, hidden=16, **options)
    return made.replace({name: (x + 0.2 * torch.randn_like(x)).detach() for name, x in made.named_tensors()})


def steps_of(batch: int, steps: int, p: TokenTuringParameters, n: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, p.memory_tokens, p.width), torch.randn(batch, steps, n, p.width)


def test_neither_gradients_nor_threads_change_a_bit() -> None:
    p = machine()
    memory, x = steps_of(3, 5, p)
    threads, seen = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            leaves = [v.detach().clone().requires_grad_() for v in (memory, x)]
            results = token_turing_recurrence(*leaves, p, backend="native")
            grads = torch.autograd.grad(sum(y.square().sum() for y in results), leaves)
            with torch.no_grad():
                seen.append([*results, *grads, *token_turing_recurrence(memory, x, p, backend="native")])
    finally:
        torch.set_num_threads(threads)
    first = seen[0]
    assert torch.equal(first[0], first[4]) and torch.equal(first[1], first[5])
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(first, other, strict=True))


def test_rows_of_the_batch_are_strangers() -> None:
    """What is NaN in one video, or enormous, stays there."""
    p = machine()
    memory, x = steps_of(3, 4, p)
    expected = token_turing_recurrence(memory, x, p, backend="native")
    x[1, 2, 0] = torch.nan
    memory[1] = 1e30
    for got, alone in zip(token_turing_recurrence(memory, x, p, backend="native"), expected, strict=True):
        assert torch.equal(got[[0, 2]], alone[[0, 2]])
        assert got[1].isnan().any()


def test_memory_of_1e4() -> None:
    p = machine()
    memory, x = steps_of(2, 4, p)
    got = token_turing_recurrence(1e4 * memory, x, p, backend="native")
    low, exact = (
        reference.token_turing_recurrence((1e4 * memory).to(t), (x.to(t),), p.to(t), None)
        for t in (torch.float32, torch.float64)
    )
    for each in zip(got, low, exact, strict=True):
        assert_within_budget(*each)


def test_strided_and_shared_tensors() -> None:
    """Views are taken as they are, and one weight may serve twice: its gradient is the sum."""
    p = machine()
    memory, x = steps_of(2, 3, p)
    memory_view, x_view = memory.mT.contiguous().mT, x.transpose(1, 2).contiguous().transpose(1, 2)
    weight = p.process.norm.weight

    def run(memory: Tensor, x: Tensor, process: Tensor, read: Tensor) -> tuple[Tensor, ...]:
        both = p.replace({"process.norm.weight": process, "read.norm.weight": read})
        end, _ = token_turing_recurrence(memory, x, both, backend="native")
        leaves = [process] if process is read else [process, read]
        return end.detach(), *torch.autograd.grad(end.square().sum(), leaves)

    shared = weight.clone().requires_grad_()
    end, total = run(memory_view, x_view, shared, shared)
    apart, *parts = run(memory, x, *(weight.clone().requires_grad_() for _ in range(2)))
    assert torch.equal(end, apart)
    assert_within_budget(
        total, parts[0] + parts[1], parts[0].double() + parts[1].double()
    )  # three shares, in any order


def test_who_refuses_says_why() -> None:
    p = machine()
    memory, x = steps_of(1, 2, p)
    assert explain(token_turing_recurrence, memory, x, p)["native"] == "runs"

    def refusal(p: TokenTuringParameters, memory: Tensor = memory, x: Tensor = x) -> str:
        return explain(token_turing_recurrence, memory, x, p)["native"]

    mode = "memory mode TL of the standard unit only"
    assert refusal(machine(memory_mode="MHA")) == refusal(machine(memory_mode="AddErase")) == mode  # type: ignore
    assert refusal(machine(processor="mixer")) == "transformer as the processor only"  # type: ignore
    assert refusal(p.to(torch.float64), memory.double(), x.double()) == "float32 only"
    assert refusal(machine(24), memory[..., :24], x[..., :24]) == "widths that are multiples of 16 only"
    assert refusal(p, memory, x[:, :0]) == "at least one video, one slot of memory and one step"
    with torch.autocast("cpu", torch.bfloat16):
        assert refusal(p) == "float32 only"
    with use_backend("native"), pytest.raises(NotImplementedError, match="transformer as the processor only"):
        token_turing_recurrence(memory, x, machine(processor="mlp"))  # type: ignore


def test_forward_mode() -> None:
    """The fused steps carry no tangent, and without one their result would pass for a constant."""
    p = machine()
    memory, x = steps_of(2, 3, p)
    exact, wide = p.to(torch.float64), x.double()
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):  # torch has no tangent of its fused attention either
        dual = forward_ad.make_dual(memory, torch.ones_like(memory))
        for backend in (None, "native"):
            with pytest.raises(NotImplementedError, match=r"'native' .*forward-mode differentiation"):
                token_turing_recurrence(dual, x, p, backend=backend)
        dual = forward_ad.make_dual(memory.double(), torch.ones_like(memory.double()))
        ends = (
            token_turing_recurrence(dual, wide, exact, backend="reference")[0],
            reference.token_turing_recurrence(dual, (wide,), exact, None)[0],
        )
        ours, expected = (forward_ad.unpack_dual(end).tangent for end in ends)
    assert_close_fp64(ours, expected)


def test_second_derivatives_and_torch_func() -> None:
    p = machine()
    memory, x = steps_of(2, 2, p)
    x.requires_grad_()
    end, _ = token_turing_recurrence(memory, x, p)
    (grad,) = torch.autograd.grad(end.square().sum(), x, create_graph=True)
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second derivative|once_differentiable"):
        torch.autograd.grad(grad.sum(), x)
    alone = torch.func.vmap(lambda m, v: token_turing_recurrence(m[None], v[None], p)[0][0])(memory, x.detach())
    torch.testing.assert_close(alone, end)
