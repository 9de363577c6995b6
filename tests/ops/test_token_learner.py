"""token_learner against its definition written densely, the public numbers, and itself in pieces."""

from __future__ import annotations

import random
from functools import reduce

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mirasol_kernels import explain
from mirasol_kernels._dispatch import use_backend
from mirasol_kernels.token_learner import TokenLearnerState, cases, op, token_learner, token_learner_state
from mirasol_kernels.token_learner.api import _checked
from mirasol_kernels.token_learner.backward import token_learner_backward, token_learner_state_backward
from mirasol_kernels.token_learner.reference import pool
from tests.numerics import GOLDEN_GRADIENT, assert_close_fp64, assert_golden, assert_within_budget, golden

WEIGHTS = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")


def random_weights(c: int, h: int, k: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    shapes = [(c,), (c,), (h, c), (h,), (k, h), (k,)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def dense(sources, norm_weight, norm_bias, w1, b1, w2, b2, positions=None, valid=None, gelu="tanh", eps=1e-6) -> Tensor:
    """The definition, read aloud: everything concatenated, every score in memory."""
    positions = positions or [None] * len(sources)
    x = torch.cat([s if p is None else s + p for s, p in zip(sources, positions, strict=True)], 1)
    z = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps) @ w1.T + b1
    hidden = F.gelu(z, approximate="tanh" if gelu == "tanh" else "none")
    scores = hidden @ w2.T + b2  # (B, n, k)
    if valid is not None:
        counts = [torch.arange(s.shape[1])[None] < v[:, None] for s, v in zip(sources, valid.unbind(1), strict=True)]
        scores = scores.masked_fill(~torch.cat(counts, 1)[..., None], -torch.inf)
    weights = scores.softmax(1).nan_to_num(0.0)  # a row without tokens is 0/0
    return torch.einsum("bnk,bnc->bkc", weights, x)


FUSED = [b.name for b in op.OP.backends if b.device == "cpu"]


def served(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend, if it takes `dtype` on the CPU here; its reason skips the test."""
    case = next(cases.cases(dtype=dtype))
    said = explain(case.call, **case.tensors, backend=backend)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    return backend


@pytest.mark.parametrize("backend", ["reference", *FUSED])
@pytest.mark.parametrize("name", ["tl_v11_small", "tl_v11_4d"])
def test_golden(name: str, backend: str) -> None:
    z = golden(name)
    dtype = torch.float64 if backend == "reference" else torch.float32
    served(backend, dtype)
    paths = ["LayerNorm_0.scale", "LayerNorm_0.bias"] + [
        f"token_masking.Dense_{i}.{leaf}" for i in (0, 1) for leaf in ("kernel", "bias")
    ]
    x = torch.from_numpy(z["in.x"]).to(dtype).requires_grad_()
    # flax kernels are (in, out)
    weights = [torch.from_numpy(z[f"param.{path}"].T).to(dtype).requires_grad_() for path in paths]
    out = token_learner(x.flatten(1, -2), *weights, backend=backend)
    assert_golden(out, z["out.y"])
    grads = torch.autograd.grad(out, [x, *weights], torch.from_numpy(z["cot.y"]).to(dtype))
    assert_golden(grads[0], z["grad_in.x"], tol=GOLDEN_GRADIENT, what="x")
    for path, grad in zip(paths, grads[1:], strict=True):
        assert_golden(grad, z[f"grad_param.{path}"].T, tol=GOLDEN_GRADIENT, what=path)


@st.composite
def calls(draw) -> dict:
    """Any legal call in float64: sources of 0 and more tokens, tables or none, counts or none."""
    batch, c, h, k = (draw(st.integers(1, high)) for high in (3, 6, 5, 4))
    lengths = draw(st.lists(st.integers(0, 6), min_size=1, max_size=3))
    tables = [draw(st.sampled_from([None, 2, 3])) for _ in lengths]
    torch.manual_seed(draw(st.integers(0, 2**31)))
    valid = draw(st.booleans())
    return {
        "sources": [torch.randn(batch, n, c, dtype=torch.float64).requires_grad_() for n in lengths],
        "weights": random_weights(c, h, k),
        "positions": [
            None if d is None else torch.randn((1, n, c)[3 - d :], dtype=torch.float64).requires_grad_()
            for n, d in zip(lengths, tables, strict=True)
        ],
        "valid": torch.stack([torch.randint(0, n + 1, (batch,)) for n in lengths], 1) if valid else None,
        "gelu": draw(st.sampled_from(["tanh", "erf"])),
        "eps": draw(st.sampled_from([1e-6, 1e-2])),
    }


@settings(max_examples=150)
@given(calls())
def test_definition_and_backward(call: dict) -> None:
    """The op equals the dense definition; autograd, the dense form's autograd and the hand-written backward agree."""
    sources, weights = call.pop("sources"), call.pop("weights")
    out = token_learner(sources, *weights, **call)
    exact = dense(sources, *weights, **call)
    assert_close_fp64(out, exact)

    leaves = [*sources, *weights, *(p for p in call["positions"] if p is not None)]
    dout = torch.randn_like(out)
    mine = torch.autograd.grad(out, leaves, dout, materialize_grads=True)
    theirs = torch.autograd.grad(exact, leaves, dout, materialize_grads=True)
    with torch.no_grad():
        args = _checked("token_learner", sources, *weights, *call.values())
        by_hand = token_learner_backward(dout, out, token_learner_state(sources, *weights, **call), *args)
    flat = [*by_hand.sources, *by_hand.weights, *(p for p in by_hand.positions if p is not None)]
    for got, expected, hand in zip(mine, theirs, flat, strict=True):
        assert_close_fp64(got, expected)
        assert_close_fp64(hand, got)


@settings(max_examples=50)
@given(calls())
def test_state_backward_by_hand(call: dict) -> None:
    sources, weights = call.pop("sources"), call.pop("weights")
    state = token_learner_state(sources, *weights, **call)
    leaves = [*sources, *weights, *(p for p in call["positions"] if p is not None)]
    dsum, dweighted = torch.randn_like(state.sum), torch.randn_like(state.weighted)
    mine = torch.autograd.grad(state[1:], leaves, (dsum, dweighted), materialize_grads=True)
    with torch.no_grad():
        args = _checked("token_learner_state", sources, *weights, *call.values())
        hand = token_learner_state_backward(dsum, dweighted, state.max, *args)
    flat = [*hand.sources, *hand.weights, *(p for p in hand.positions if p is not None)]
    for got, expected in zip(flat, mine, strict=True):
        assert_close_fp64(got, expected)


@settings(max_examples=100)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sampled_from([1.0, 1e4]))
def test_merge_is_associative_and_commutative(seed: int, lengths: list[int], spread: float) -> None:
    """Any tree over the pieces, in any order, is the state of the whole: value, log of the sum, and the gradient."""
    torch.manual_seed(seed)
    logits = (spread * torch.randn(2, sum(lengths), 3, dtype=torch.float64)).requires_grad_()
    x = torch.randn(2, sum(lengths), 5, dtype=torch.float64).requires_grad_()
    pieces = [pool(s, t, None) for s, t in zip(logits.split(lengths, 1), x.split(lengths, 1), strict=True)]
    left = reduce(TokenLearnerState.merge, pieces)
    rng = random.Random(seed)
    while len(pieces) > 1:
        pieces.append(pieces.pop(rng.randrange(len(pieces))).merge(pieces.pop(rng.randrange(len(pieces)))))
    tree = pieces[0]
    whole = logits.softmax(1).mT @ x
    cotangent = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.autograd.grad(whole, [logits, x], cotangent)
    for state in (left, tree):
        assert_close_fp64(state.value(), whole)
        assert_close_fp64(state.max + state.sum.log(), logits.logsumexp(1))
        gradients = torch.autograd.grad(state.value(), [logits, x], cotangent, retain_graph=True)
        for got, want in zip(gradients, expected, strict=True):
            assert_close_fp64(got, want)


def test_empty_state_is_the_identity() -> None:
    state = token_learner_state(torch.randn(2, 3, 4), *random_weights(4, 3, 5, torch.float32))
    empty = TokenLearnerState.empty(torch.randn(2, 0, 4), 5)
    for merged in (state.merge(empty), empty.merge(state)):
        assert all(torch.equal(a, b) for a, b in zip(merged, state, strict=True))
    assert torch.equal(empty.merge(empty).value(), torch.zeros(2, 5, 4))


def test_gradcheck() -> None:
    sources = [torch.randn(2, n, 4, dtype=torch.float64).requires_grad_() for n in (3, 0, 2)]
    tables = [torch.randn(3, 4, dtype=torch.float64).requires_grad_(), None, torch.randn(1, 2, 4, dtype=torch.float64)]
    valid = torch.tensor([[2, 0, 2], [0, 0, 0]])

    def call(a: Tensor, b: Tensor, table: Tensor, *weights: Tensor) -> Tensor:
        return token_learner([a, sources[1], b], *weights, positions=[table, None, tables[2]], valid=valid)

    weights = random_weights(4, 3, 2)
    assert torch.autograd.gradcheck(call, (sources[0], sources[2], tables[0], *weights))
    assert torch.autograd.gradgradcheck(call, (sources[0], sources[2], tables[0], *weights))


def test_sources_as_one_sequence_and_as_merged_states() -> None:
    a, b = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 4, 6, dtype=torch.float64)
    weights = random_weights(6, 7, 3)
    whole = token_learner(torch.cat([a, b], 1), *weights)
    assert_close_fp64(token_learner((a, b), *weights), whole)
    assert_close_fp64(token_learner_state(a, *weights).merge(token_learner_state(b, *weights)).value(), whole)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_does_not_count_does_not_leak(poison: float) -> None:
    """Tokens past `valid` may hold anything; they reach neither the output nor any gradient."""
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    valid = torch.tensor([3, 0])
    x[0, 3:], x[1] = poison, poison
    x.requires_grad_()
    weights = random_weights(4, 3, 2)
    out = token_learner(x, *weights, valid=valid)
    assert_close_fp64(out[:1], token_learner(x[:1, :3], *weights))
    assert torch.equal(out[1], torch.zeros(2, 4, dtype=torch.float64))
    grads = torch.autograd.grad(out.sum(), [x, *weights])
    assert all(g.isfinite().all() for g in grads)
    assert not grads[0][0, 3:].any() and not grads[0][1].any()


def test_valid_clamps_and_takes_any_integer_dtype() -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    weights = random_weights(5, 3, 2)
    wild = torch.tensor([-7, 2, 99], dtype=torch.int32)
    expected = token_learner(x, *weights, valid=torch.tensor([0, 2, 4]))
    assert torch.equal(token_learner(x, *weights, valid=wild), expected)
    assert torch.equal(token_learner([x], *weights, valid=wild[:, None]), expected)


def test_extreme_logits_are_finite() -> None:
    x = torch.randn(2, 6, 4)
    weights = random_weights(4, 3, 2, torch.float32)
    weights[4] = (weights[4] * 1e4).detach().requires_grad_()
    out = token_learner(x, *weights)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), weights))


def test_states_do_not_depend_on_the_size_of_the_batch() -> None:
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    weights = random_weights(6, 4, 2)
    together = token_learner(x, *weights)
    for row in range(3):
        assert_close_fp64(token_learner(x[row : row + 1], *weights), together[row : row + 1])
    assert token_learner(x[:0], *weights).shape == (0, 2, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_tokens_have_float32_states(dtype: torch.dtype) -> None:
    x, weights = torch.randn(2, 5, 4, dtype=dtype), random_weights(4, 3, 2, dtype)
    assert {field.dtype for field in token_learner_state(x, *weights)} == {torch.float32}
    assert token_learner(x, *weights).dtype == dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert token_learner(x.float(), *random_weights(4, 3, 2, torch.float32)).dtype == torch.float32
        assert token_learner([x, x.float()], *random_weights(4, 3, 2, torch.float32)).dtype == dtype


def test_named_cases_run() -> None:
    for case in cases.cases(dtype=torch.float64):
        out = case.call(**case.tensors)
        *_, pooled = (out,) if isinstance(out, Tensor) else out
        assert pooled.isfinite().all(), case.name


def test_vmap() -> None:
    x, weights = torch.randn(4, 2, 5, 3, dtype=torch.float64), random_weights(3, 4, 2)
    rows = torch.stack([token_learner(row, *weights) for row in x])
    assert_close_fp64(torch.func.vmap(lambda row: token_learner(row, *weights))(x), rows)


def test_compiles_without_graph_breaks() -> None:
    x, weights = torch.randn(2, 5, 4, dtype=torch.float64), random_weights(4, 3, 2)
    valid = torch.tensor([[5, 2], [0, 1]])
    compiled = torch.compile(token_learner, fullgraph=True, backend="aot_eager")
    assert_close_fp64(
        compiled((x, x[:, :3]), *weights, valid=valid), token_learner((x, x[:, :3]), *weights, valid=valid)
    )


def test_backend_by_name() -> None:
    x, weights = torch.randn(2, 5, 4), random_weights(4, 3, 2, torch.float32)
    with use_backend("reference"):
        assert torch.equal(token_learner(x, *weights), token_learner(x, *weights, backend="reference"))
    with pytest.raises(ValueError, match="backend"):
        token_learner(x, *weights, backend="fast")


@pytest.mark.parametrize("backend", FUSED)
class TestFused:
    """What only a fused backend can get wrong, whichever it is."""

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
        return torch.randn(2, 5, 4, dtype=dtype).requires_grad_(), random_weights(4, 3, 2, dtype)

    def test_refuses_by_name(self, backend: str) -> None:
        served(backend)
        x, weights = self.arguments(torch.float64)
        with pytest.raises(NotImplementedError, match="refuses this call: no float64"):
            token_learner(x, *weights, backend=backend)
        x, weights = self.arguments()
        with pytest.raises(NotImplementedError, match="at least one channel, hidden unit and learned token"):
            token_learner(x, *weights[:4], weights[4][:0], weights[5][:0], backend=backend)

    @pytest.mark.parametrize("poison", [torch.nan, torch.inf])
    def test_what_does_not_count_does_not_leak(self, backend: str, poison: float) -> None:
        served(backend)
        _, weights = self.arguments()
        x, valid = torch.randn(2, 5, 4), torch.tensor([3, 0])
        clean = x.clone().requires_grad_()
        x[0, 3:], x[1] = poison, poison
        x.requires_grad_()
        results = []
        for tokens in (clean, x):
            out = token_learner(tokens, *weights, valid=valid, backend=backend)
            results.append((out, *torch.autograd.grad(out.sum(), [tokens, *weights])))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert not results[0][1][0, 3:].any() and not results[0][1][1].any()

    def test_merged_states(self, backend: str) -> None:
        """Tokens in pieces and as one, with gradients through the merge."""
        served(backend)
        x, weights = self.arguments()
        whole = token_learner(x, *weights, backend=backend)
        parts = [token_learner_state(piece, *weights, backend=backend) for piece in x.split([2, 0, 3], 1)]
        merged = reduce(TokenLearnerState.merge, parts).value()
        exact = token_learner(x.double(), *(w.double() for w in weights))
        dout = torch.randn_like(whole)
        assert_within_budget(merged, whole, exact)
        merged_grads, whole_grads, exact_grads = (
            torch.autograd.grad(out, [x, *weights[:5]], dout.to(out.dtype), retain_graph=True)
            for out in (merged, whole, exact)
        )
        for got, low, want in zip(merged_grads, whole_grads, exact_grads, strict=True):
            assert_within_budget(got, low, want.double())

    def test_second_derivatives_and_forward_mode_say_no(self, backend: str) -> None:
        served(backend)
        x, weights = self.arguments()
        (dx,) = torch.autograd.grad(token_learner(x, *weights, backend=backend).sum(), x, create_graph=True)
        with pytest.raises(NotImplementedError, match="not a second derivative"):
            dx.sum().backward()
        with pytest.raises(NotImplementedError, match="not forward-mode differentiation"):
            torch.func.jvp(lambda y: token_learner(y, *weights, backend=backend), (x,), (x,))

    def test_vmap_over_anything(self, backend: str) -> None:
        """Tokens, or weights (an ensemble), or both; and gradients under it."""
        served(backend)
        x = torch.randn(3, 2, 5, 4)
        weights = [torch.stack(each) for each in zip(*(random_weights(4, 3, 2, torch.float32) for _ in x), strict=True)]

        def call(x: Tensor, *weights: Tensor) -> Tensor:
            return token_learner(x, *weights, backend=backend)

        def gradient(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            return torch.func.grad(lambda *leaves: call(*leaves).square().sum(), tuple(range(7)))(x, *weights)

        for dims in ((0, *[None] * 6), (None, *[0] * 6), (0,) * 7):
            args = [y if dim == 0 else y[0] for y, dim in zip((x, *weights), dims, strict=True)]
            rows = [[y[i] if dim == 0 else y for y, dim in zip(args, dims, strict=True)] for i in range(3)]
            mapped = torch.func.vmap(call, dims)(*args)
            assert torch.equal(mapped, torch.stack([call(*row) for row in rows]))
            for i, each in enumerate(torch.func.vmap(gradient, dims)(*args)):
                assert torch.equal(each, torch.stack([gradient(*row)[i] for row in rows]))

    def test_autocast(self, backend: str) -> None:
        """Tokens and weights are cast as PyTorch's attention does; the result is of the tokens' dtype."""
        served(backend, torch.bfloat16)
        x, weights = self.arguments()
        with torch.autocast("cpu", torch.bfloat16):
            out = token_learner(x, *weights, backend=backend)
        cast = token_learner(x.bfloat16(), *(w.bfloat16() for w in weights), backend=backend)
        assert out.dtype == torch.float32 and torch.equal(out.bfloat16(), cast)
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(out.sum(), [x, *weights]))

    def test_same_tensor_twice_compiles(self, backend: str) -> None:
        served(backend)
        x, weights = self.arguments()
        compiled = torch.compile(token_learner, fullgraph=True, backend="aot_eager")
        out, eager = compiled((x, x), *weights, backend=backend), token_learner((x, x), *weights, backend=backend)
        assert torch.equal(out, eager)
        for a, b in zip(*(torch.autograd.grad(y.sum(), [x, *weights]) for y in (out, eager)), strict=True):
            torch.testing.assert_close(a, b)

    def test_direct_calls_are_checked(self, backend: str) -> None:
        served(backend)
        x, weights = self.arguments()
        forward = op.calls(backend)["fwd"]
        rest = (None, False, 1e-6, True)
        with torch.no_grad():
            for sources, tables in (([], []), ([x], []), ([x, x[:1]], [None, None]), ([x], [x[0, 1:]])):
                with pytest.raises(RuntimeError, match="token_learner: "):
                    forward(sources, tables, *weights, *rest)
            with pytest.raises(RuntimeError, match="token_learner: w2"):
                forward([x], [None], *weights[:4], weights[4].T, weights[5], *rest)


def good() -> dict:
    names = dict(zip(WEIGHTS, random_weights(4, 3, 2, torch.float32), strict=True))
    return {"sources": [torch.randn(2, 5, 4), torch.randn(2, 1, 4)], **names}


ERRORS = [
    ({"sources": []}, ValueError, "sources: expected at least one tensor, got none"),
    ({"sources": [None]}, TypeError, r"sources\[0\]: expected a tensor, got NoneType"),
    ({"sources": torch.randn(2, 5)}, ValueError, r"sources: expected \(B, n, c\), got \(2, 5\)"),
    ({"sources": torch.ones(2, 5, 4, dtype=torch.int64)}, TypeError, "sources: expected a floating dtype"),
    (
        {"sources": [torch.randn(2, 5, 4), torch.randn(3, 5, 4)]},
        ValueError,
        r"sources\[1\]: expected \(2, n, 4\), got \(3, 5, 4\)",
    ),
    ({"sources": torch.randn(2, 5, 4).double()}, TypeError, "norm_weight: expected torch.float64 like"),
    ({"sources": torch.randn(2, 5, 4, device="meta").double()}, TypeError, "norm_weight: expected torch.float64 like"),
    ({"sources": torch.randn(2, 5, 4, device="meta")}, ValueError, "norm_weight: expected a tensor on meta"),
    ({"norm_weight": torch.randn(5)}, ValueError, r"norm_weight: expected \(4,\), got \(5,\)"),
    ({"norm_bias": torch.randn(1, 4)}, ValueError, r"norm_bias: expected \(4,\), got \(1, 4\)"),
    ({"w1": torch.randn(4, 3)}, ValueError, r"w1: expected \(h, 4\), got \(4, 3\)"),
    ({"b1": torch.randn(4)}, ValueError, r"b1: expected \(3,\), got \(4,\)"),
    ({"w2": torch.randn(3, 2)}, ValueError, r"w2: expected \(k, 3\), got \(3, 2\)"),
    ({"b2": torch.randn(3)}, ValueError, r"b2: expected \(2,\), got \(3,\)"),
    ({"positions": torch.randn(5, 4)}, ValueError, "positions: expected one table or None for each of 2 sources"),
    ({"positions": [None]}, ValueError, "positions: expected one table or None for each of 2 sources, got 1"),
    ({"positions": [None, torch.randn(2, 4)]}, ValueError, r"positions\[1\]: expected \(1, 4\), got \(2, 4\)"),
    ({"positions": [torch.randn(2, 5, 4), None]}, ValueError, r"positions\[0\]: expected \(1, 5, 4\), got \(2, 5, 4\)"),
    ({"valid": [5, 1]}, TypeError, "valid: expected a tensor, got list"),
    ({"valid": torch.ones(2, 2)}, TypeError, "valid: expected integers, got torch.float32"),
    ({"valid": torch.ones(2, 2, dtype=torch.bool)}, TypeError, "valid: expected integers, got torch.bool"),
    ({"valid": torch.ones(2, dtype=torch.int64)}, ValueError, r"valid: expected \(2, 2\), got \(2,\)"),
    ({"valid": torch.ones(2, 2, dtype=torch.int64, device="meta")}, ValueError, "valid: expected a tensor on cpu"),
    ({"gelu": "relu"}, ValueError, "gelu: expected 'tanh' or 'erf', got 'relu'"),
]


@pytest.mark.parametrize("op", [token_learner, token_learner_state])
@pytest.mark.parametrize(("change", "error", "text"), ERRORS, ids=[text for _, _, text in ERRORS])
def test_errors(op, change: dict, error: type[Exception], text: str) -> None:
    call = good() | change
    with pytest.raises(error, match=f"^{op.__name__}: {text}"):
        op(**call)


def test_error_of_counts_for_one_source() -> None:
    call = good() | {"sources": torch.randn(2, 5, 4), "valid": torch.ones(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=r"token_learner: valid: expected \(2,\) or \(2, 1\), got \(3,\)"):
        token_learner(**call)
