"""block_causal_attention: its two references, what it promises, its errors.  Drawn calls have their own file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirasol_kernels import SnippetLayout, block_causal_attention, explain, use_backend
from mirasol_kernels._check import evaluate
from mirasol_kernels.block_causal_attention import backward, cases, op, reference
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.ops.attention import BACKENDS, FUSED, served
from tests.test_every_backend import DTYPES

# -------------------------------------------------------------------- the two references

EXACT = [name for name, problem in cases.PROBLEMS.items() if problem.logits is None]
TILES = [(name, backward.TILE) for name in EXACT] + [
    (name, 5) for name in ("gqa", "teacher_forcing", "batch", "four_ranges")
]


@pytest.mark.parametrize(("name", "tile"), TILES)
def test_backward_by_hand(name: str, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal to autograd; but for logits of 1e4, which cost four of float64's digits in any way of computing."""
    monkeypatch.setattr(backward, "TILE", tile)
    problem = cases.PROBLEMS[name]
    case = cases.build(name, problem, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in case.tensors.values())
    out, lse = case.call(q, k, v)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    autograd = torch.autograd.grad((out, lse), (q, k, v), (dout, dlse))
    with torch.no_grad():
        by_hand = backward.block_causal_attention_backward(
            dout, dlse, q, k, v, out, lse, *problem.layout().tables(), problem.factor
        )
    for what, actual, expected in zip(("dq", "dk", "dv"), by_hand, autograd, strict=True):
        assert_close_fp64(actual, expected, what=what)


@pytest.mark.parametrize("budget", [reference.BUDGET, 500])
def test_gradcheck(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """First and second derivatives, with rows that see nothing, whole and block by block."""
    monkeypatch.setattr(reference, "BUDGET", budget)
    problem = replace(cases.PROBLEMS["empty_rows"], batch=1, heads=1, dim=2, value_dim=1)
    case = cases.build("gradcheck", problem, dtype=torch.float64)

    def finite(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = case.call(q, k, v, backend="reference")
        return out, lse.masked_fill(lse == -torch.inf, 0)

    tensors = tuple(x.requires_grad_() for x in case.tensors.values())
    assert torch.autograd.gradcheck(finite, tensors)
    assert torch.autograd.gradgradcheck(finite, tensors, fast_mode=True)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not func.is_view:
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_in_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps to its budget forward and backward, and the blocks do not show in the result."""
    problem = cases.Problem(cases.uniform(8, 32), heads=2, group=2)
    case = cases.build("blocks", problem, dtype=dtype)
    whole = evaluate(case, "reference")
    tokens = 8 * 32
    scores = 4 * tokens * tokens * 4
    monkeypatch.setattr(reference, "BUDGET", scores // 8)
    with Largest() as largest:
        blocks = evaluate(case, "reference")
    assert largest.bytes <= scores // 8
    exact = evaluate(case, "reference", torch.float64)
    for name in exact:
        assert_within_budget(blocks[name], whole[name], exact[name], what=name)


# -------------------------------------------------------------------- what it promises


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return served(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_what_nobody_sees_does_not_leak(backend: str, dtype: torch.dtype) -> None:
    """NaN and infinity in keys and values that no row sees, and in rows that see nothing, change no bit."""
    served(backend, dtype)
    problem = cases.PROBLEMS["empty_rows"]
    case = cases.build("leak", problem, dtype=dtype)
    clean = evaluate(case, backend)
    mask = problem.layout().dense_mask()[0]
    for poison in (torch.nan, torch.inf):
        tensors = {name: x.clone() for name, x in case.tensors.items()}
        tensors["q"][:, :, ~mask.any(1)] = poison
        tensors["k"][:, :, ~mask.any(0)] = poison
        tensors["v"][:, :, ~mask.any(0)] = poison
        for name, result in evaluate(case._replace(tensors=tensors), backend).items():
            assert torch.equal(result, clean[name]), name
    empty = ~mask.any(1)
    assert (clean["out0"][:, :, empty] == 0).all() and (clean["out1"][:, :, empty] == -torch.inf).all()
    assert (clean["dq"][:, :, empty] == 0).all()
    assert all((clean[name][:, :, ~mask.any(0)] == 0).all() for name in ("dk", "dv"))


def test_gradients_of_rows_that_see_nothing_do_not_leak(backend: str) -> None:
    """What arrives at their out and their lse of -inf, be it NaN, goes nowhere."""
    problem = cases.PROBLEMS["empty_rows"]
    case = cases.build("leak", problem)
    tensors = [x.requires_grad_() for x in case.tensors.values()]
    outputs = case.call(*tensors, backend=backend)
    arriving = [torch.randn_like(out) for out in outputs]
    clean = torch.autograd.grad(outputs, tensors, arriving, retain_graph=True)
    empty = ~problem.layout().dense_mask()[0].any(1)
    for poison in (torch.nan, torch.inf):
        poisoned = [x.clone() for x in arriving]
        for x in poisoned:
            x[:, :, empty] = poison
        for actual, expected in zip(
            torch.autograd.grad(outputs, tensors, poisoned, retain_graph=True), clean, strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("far", ["batch", "heads", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beyond_31_bits(backend: str, dtype: torch.dtype, far: str) -> None:
    """Elements whose index in memory no int32 holds are those of compact copies: results and gradients, bit by bit."""
    served(backend, dtype)
    size = torch.Size((2, 2, 5, 8))
    strides = [80, 40, 8, 1]
    step = {"batch": 2**31, "heads": 2**31, "tokens": 2**29}[far]
    strides[["batch", "heads", "tokens"].index(far)] = step
    # Zeros from the system, which lends no page before it is touched: gigabytes that cost nothing.
    width = torch.empty((), dtype=dtype).element_size()
    memory = torch.from_numpy(np.zeros(width * (2**31 + 2**12), np.uint8)).view(dtype)

    def place(i: int) -> Tensor:
        return memory.as_strided(size, strides, 200 * i).copy_(torch.randn(size))

    *placed, dout = (place(i) for i in range(4))
    assert all(
        x.storage_offset() + sum((n - 1) * s for n, s in zip(size, strides, strict=True)) >= 2**31 for x in placed
    )

    def results(tensors: list[Tensor], dout: Tensor) -> tuple[Tensor, ...]:
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = block_causal_attention(*tensors, SnippetLayout.ragged([2, 3]), backend=backend)
        return out.detach(), *torch.autograd.grad(out, tensors, dout)

    compact = results([x.contiguous() for x in placed], dout.contiguous())
    for actual, expected in zip(results(placed, dout), compact, strict=True):
        assert torch.equal(actual, expected)


def test_causality(backend: str) -> None:
    """What happens in snippet t moves nothing before it by one bit, forward; nor what comes after, backward."""
    layout = SnippetLayout.uniform(5, 13)
    q, k, v = (torch.randn(2, 2, 65, 24) for _ in range(3))
    before = block_causal_attention(q, k, v, layout, backend=backend)
    for x in (q, k, v):
        x[:, :, 39:] += 1
    after = block_causal_attention(q, k, v, layout, backend=backend)
    assert torch.equal(before[:, :, :39], after[:, :, :39])
    assert (before[:, :, 39:] != after[:, :, 39:]).any(3).all()


def test_parts_merge_through_lse(backend: str) -> None:
    """Attention over two halves of the keys, weighted by their lse, is attention over all: values and gradients."""
    q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))

    def merged(q: Tensor, k: Tensor, v: Tensor, backend: str) -> Tensor:
        parts = [
            block_causal_attention(
                q, k[:, :, i:j], v[:, :, i:j], SnippetLayout.cross([20], [j - i], [1]), return_lse=True, backend=backend
            )
            for i, j in ((0, 7), (7, 20))
        ]
        weights = torch.stack([lse for _, lse in parts]).softmax(0)[..., None]
        return (weights * torch.stack([out for out, _ in parts])).sum(0)

    def results(out: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *torch.autograd.grad(out.square().sum(), tensors)

    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = results(block_causal_attention(*wide, SnippetLayout.uniform(1, 20)), *wide)
    low = results(merged(q, k, v, "reference"), q, k, v)
    for actual, rounded, expected in zip(results(merged(q, k, v, backend), q, k, v), low, exact, strict=True):
        assert_within_budget(actual, rounded, expected)


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_fused_backend_keeps_no_scores(backend: str) -> None:
    """For backward: q, k, v, out and lse with its lower half; the tables stay the layout's."""
    layout, saved = SnippetLayout.uniform(4, 16), []
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        block_causal_attention(q, k, v, layout, backend=backend)
    assert sum(saved) == 4 * q.numel() + 2 * (2 * 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    case = cases.build("dtypes", cases.PROBLEMS["gqa"], dtype=dtype)
    out, lse = case.call(**case.tensors)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    exact, actual = evaluate(case, "reference", torch.float64), evaluate(case, "reference")
    rounded = {name: x.to(actual[name].dtype) for name, x in exact.items()}
    assert_within_budget(actual["out0"], rounded["out0"], exact["out0"])  # the only rounding is that of the result


def test_return_lse_and_scale() -> None:
    layout = SnippetLayout.uniform(2, 3)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    out = block_causal_attention(q, k, v, layout)
    again, lse = block_causal_attention(q, k, v, layout, return_lse=True)
    assert isinstance(out, Tensor) and torch.equal(out, again) and lse.shape == (1, 1, 6)
    assert torch.equal(out, block_causal_attention(q, k, v, layout, scale=0.5))  # 1/sqrt(4)
    assert not torch.equal(out, block_causal_attention(q, k, v, layout, scale=1))


def test_meta_tensors() -> None:
    """Shapes without numbers, of gradients too; torch raises where one asks it about autocast of theirs."""
    q, k, v = (torch.empty(2, *size, device="meta", requires_grad=True) for size in ((4, 6, 8), (2, 6, 8), (2, 6, 3)))
    out, lse = block_causal_attention(q, k, v, SIX, return_lse=True)
    (out.sum() + lse.sum()).backward()
    assert out.is_meta and out.shape == (2, 4, 6, 3) and lse.shape == (2, 4, 6)
    assert all(x.grad.is_meta and x.grad.shape == x.shape for x in (q, k, v))


def test_cuda_is_never_chosen_unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that no results file speaks for, its kernels run only for who asks for them by name."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert op._cuda(X, None) == "not verified on this GPU: runs only if asked for by name"
    assert op._cuda(X, "cuda") is None
    assert op._cuda(X.half(), "cuda") == "float32 only"
    with use_backend("cuda"):
        assert op._cuda(X, None) is None
    monkeypatch.setitem(op.VERIFIED, (9, 0), "results.json")
    assert op._cuda(X, None) is None


@pytest.mark.parametrize("name", cases.PROBLEMS)
def test_the_short_way_is_the_long_one(name: str) -> None:
    """A call that asks for nothing skips most checks and the choice of a backend; nothing else may differ."""
    native = served("native")
    case = cases.build(name, cases.PROBLEMS[name])
    short, long = evaluate(case, None), evaluate(case, native)
    assert short.keys() == long.keys()
    for what, x in long.items():
        assert torch.equal(short[what], x) and short[what].stride() == x.stride(), what
    with use_backend("reference"):
        assert evaluate(case, None).keys() == long.keys()


def test_the_short_way_heeds_who_asks() -> None:
    """Autocast, a backend for the thread, explain: each changes what runs, though the tensors are as usual."""
    served("native")
    q = torch.randn(1, 2, 6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert block_causal_attention(q, q, q, SIX).dtype == torch.bfloat16
    with use_backend("triton"), pytest.raises(NotImplementedError, match="backend 'triton' refuses this call"):
        block_causal_attention(q, q, q, SIX)
    assert explain(block_causal_attention, q, q, q, SIX)["native"] == "runs"
    assert block_causal_attention(q.double(), q.double(), q.double(), SIX).dtype == torch.float64


# -------------------------------------------------------------------- errors

X = torch.zeros(2, 4, 6, 8)  # (B, H, N, D)
SIX = SnippetLayout.uniform(2, 3)
ERRORS = {
    "no tensor": ({"q": [1.0]}, TypeError, "q: expected a tensor, got list"),
    "dimensions": ({"k": X[0]}, ValueError, r"k: expected 4 dimensions .*, got \(4, 6, 8\)"),
    "integers": ({"q": X.int()}, TypeError, "q: expected float32, .*, got torch.int32"),
    "dtype": ({"v": X.half()}, TypeError, "v: expected torch.float32 like q, got torch.float16"),
    "device": ({"k": X.to("meta")}, ValueError, "k: expected device cpu like q, got meta"),
    "batch": ({"k": X[:1]}, ValueError, r"k: expected batch 2 and head_dim 8 like q, got \(1, 4, 6, 8\)"),
    "head_dim": ({"k": X[..., :7]}, ValueError, r"k: expected batch 2 and head_dim 8 like q, got \(2, 4, 6, 7\)"),
    "values": ({"v": X[:, :, :5]}, ValueError, r"v: expected batch, heads and tokens \(2, 4, 6\) like k, got"),
    "wide head": (
        dict.fromkeys("qk", torch.zeros(2, 4, 6, 257)),
        ValueError,
        "q: expected head_dim 1 .. 256, got 257",
    ),
    "wide value": ({"v": torch.zeros(2, 4, 6, 257)}, ValueError, "v: expected head_dim 1 .. 256, got 257"),
    "no width": (dict.fromkeys("qk", X[..., :0]), ValueError, "q: expected head_dim 1 .. 256, got 0"),
    "groups": ({"q": X[:, :3]}, ValueError, "q: expected heads a multiple of the 4 of k, got 3"),
    "no heads": (dict.fromkeys("kv", X[:, :0]), ValueError, "q: expected heads a multiple of the 0 of k, got 4"),
    "layout": ({"layout": torch.ones(6, 6)}, TypeError, "layout: expected a SnippetLayout, got Tensor"),
    "rows": ({"q": X[:, :, :5]}, ValueError, "q: expected 6 .*, got 5"),
    "keys": (dict.fromkeys("kv", X[:, :, :5]), ValueError, "k: expected 6 .*, got 5"),
    "layout's batch": ({"layout": SnippetLayout.batch([SIX] * 3)}, ValueError, "q: expected .* 3 .*, got 2"),
    "scale": ({"scale": "1"}, TypeError, "scale: expected a number or None, got str"),
    "dropout": ({"dropout_p": 0.1}, TypeError, "dropout_p: no such argument: .* no dropout"),
    "mask": ({"attn_mask": X}, TypeError, "attn_mask: no such argument: layout says who sees whom"),
    "backend": ({"backend": "flash"}, ValueError, "'flash'"),
    "absent backend": ({"backend": "triton"}, NotImplementedError, "backend 'triton' refuses this call: "),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        block_causal_attention(**({"q": X, "k": X, "v": X, "layout": SIX} | change))
