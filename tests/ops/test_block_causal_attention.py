"""block_causal_attention against its definition written densely, for drawn layouts, shapes and strides."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirasol_kernels import SnippetLayout, block_causal_attention, explain, use_backend
from mirasol_kernels._check import Case, evaluate
from mirasol_kernels.block_causal_attention import backward, cases, op, reference
from tests.numerics import assert_close_fp64, assert_within_budget, budget

FUSED = [b.name for b in op.OP.backends if b.device == "cpu"]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The definition, read aloud, with every score in memory.  mask: bool (B or 1, Nq, Nk)."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    terms = (scale * q @ k.mT).exp().masked_fill(~mask[:, None], 0)  # (B, Hq, Nq, Nk)
    total = terms.sum(3, keepdim=True)
    some = total > 0
    total = total.where(some, 1)
    return terms @ v / total, total.log().where(some, -torch.inf).squeeze(3)


# -------------------------------------------------------------------- drawn calls

LENGTH = st.integers(0, 9) | st.sampled_from([31, 33, 63, 64, 65])
LENGTHS = st.lists(LENGTH, min_size=1, max_size=4)
LIMITS = st.fixed_dictionaries({"window": st.none() | st.integers(1, 4), "sink": st.integers(0, 3)})


@st.composite
def uniform(draw) -> SnippetLayout:
    tokens = draw(st.integers(1, 20) | st.sampled_from([63, 64, 65]))
    asked = draw(st.none() | st.integers(0, tokens))
    return SnippetLayout.uniform(draw(st.integers(1, 4)), tokens, q_tokens=asked, **draw(LIMITS))


@st.composite
def ragged(draw) -> SnippetLayout:
    keys = draw(LENGTHS)
    asked = draw(st.none() | st.lists(st.integers(0, 9), min_size=len(keys), max_size=len(keys)))
    return SnippetLayout.ragged(keys, asked, **draw(LIMITS))


@st.composite
def teacher_forcing(draw) -> SnippetLayout:
    return SnippetLayout.teacher_forcing(draw(LENGTHS), **draw(LIMITS))


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


VIEWS = [cases.contiguous, cases.transposed, cases.packed, cases.sliced, cases.scattered]


@st.composite
def problems(draw, layouts: st.SearchStrategy[SnippetLayout]) -> cases.Problem:
    layout = draw(layouts)
    return cases.Problem(
        lambda: layout,
        batch=layout.batch or draw(st.integers(1, 2)),
        heads=draw(st.integers(1, 2)),
        group=draw(st.integers(1, 3)),
        dim=draw(st.integers(1, 24) | st.sampled_from([32, 64])),
        value_dim=draw(st.none() | st.integers(1, 24)),
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


@pytest.mark.parametrize("constructor", LAYOUTS)
def test_drawn(constructor: str) -> None:
    """Outputs and gradients of the reference equal the dense form in float64; fused ones are within budget of it."""
    count = dict.fromkeys(["reference", *FUSED], 0)

    @settings(max_examples=64)
    @given(problem=problems(LAYOUTS[constructor]), seed=st.integers(0, 2**31 - 1))
    def run(problem: cases.Problem, seed: int) -> None:
        case = cases.build(str(seed), problem)
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
    print(f"{constructor}: " + ", ".join(f"{number} cases on {name}" for name, number in count.items()))
    assert count["reference"] >= 50


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

BACKENDS = ["reference", *FUSED]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that takes float32 on the CPU here."""
    case = next(cases.cases())
    said = explain(case.call, **case.tensors, backend=request.param)[request.param]
    if said != "runs":
        pytest.skip(f"{request.param}: {said}")
    return request.param


def test_what_nobody_sees_does_not_leak(backend: str) -> None:
    """NaN and infinity in keys and values that no row sees, and in rows that see nothing, change no bit."""
    problem = cases.PROBLEMS["empty_rows"]
    case = cases.build("leak", problem)
    clean = evaluate(case, backend)
    for poison in (torch.nan, torch.inf):
        tensors = {name: x.clone() for name, x in case.tensors.items()}
        mask = problem.layout().dense_mask()[0]
        tensors["q"][:, :, ~mask.any(1)] = poison
        tensors["k"][:, :, ~mask.any(0)] = poison
        tensors["v"][:, :, ~mask.any(0)] = poison
        for name, result in evaluate(case._replace(tensors=tensors), backend).items():
            assert torch.equal(result, clean[name]), name
    empty = ~mask.any(1)
    assert (clean["out0"][:, :, empty] == 0).all() and (clean["out1"][:, :, empty] == -torch.inf).all()
    assert (clean["dq"][:, :, empty] == 0).all()
    assert all((clean[name][:, :, ~mask.any(0)] == 0).all() for name in ("dk", "dv"))


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


@pytest.mark.parametrize(
    "layout", [SnippetLayout.uniform(3, 4), SnippetLayout.batch([SnippetLayout.uniform(3, 4)] * 2)]
)
def test_vmap(backend: str, layout: SnippetLayout) -> None:
    q, k, v = torch.randn(3, 2, 4, 12, 8), torch.randn(3, 2, 2, 12, 8), torch.randn(2, 2, 12, 8, 3)

    def loss(q: Tensor, k: Tensor, v: Tensor, backend: str = backend) -> Tensor:
        out, lse = block_causal_attention(q, k, v, layout, return_lse=True, backend=backend)
        return out.square().sum() + lse.sum()

    for function in (loss, torch.func.grad(loss, argnums=(0, 1, 2))):
        rows = [(q[i], k[i], v[..., i]) for i in range(3)]
        mapped = tree_leaves(torch.func.vmap(function, in_dims=(0, 0, 4))(q, k, v))
        single = zip(*[tree_leaves(function(*row)) for row in rows], strict=True)
        exact = zip(*[tree_leaves(function(*[x.double() for x in row], "reference")) for row in rows], strict=True)
        for actual, low, wide in zip(mapped, single, exact, strict=True):
            assert_within_budget(actual, torch.stack(low), torch.stack(wide))


def test_differentiated_twice(backend: str) -> None:
    """The reference as often as one likes (gradcheck above); a fused backend says that it cannot."""
    q, k, v = (torch.randn(1, 1, 6, 4, requires_grad=True) for _ in range(3))
    out = block_causal_attention(q, k, v, SnippetLayout.uniform(2, 3), backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    if backend == "reference":
        dq.sum().backward()
        assert k.grad.abs().sum() > 0
    else:
        with pytest.raises(RuntimeError, match="differentiate twice"):
            dq.sum().backward()


@pytest.mark.parametrize("backend", FUSED, indirect=True)
def test_a_fused_backend_keeps_no_scores(backend: str) -> None:
    """For backward: q, k, v, out, lse with its lower half, and the tables."""
    layout, saved = SnippetLayout.uniform(4, 16), []
    q, k, v = (torch.randn(1, 2, 64, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        block_causal_attention(q, k, v, layout, backend=backend)
    assert sum(saved) == 4 * q.numel() + 2 * (2 * 64) + sum(table.numel() for table in layout.tables())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    case = cases.build("dtypes", cases.PROBLEMS["gqa"], dtype=dtype)
    out, lse = case.call(**case.tensors)
    assert out.dtype == dtype and lse.dtype == torch.promote_types(dtype, torch.float32)
    exact, actual = evaluate(case, "reference", torch.float64), evaluate(case, "reference")
    rounded = {name: x.to(actual[name].dtype) for name, x in exact.items()}
    assert_within_budget(actual["out0"], rounded["out0"], exact["out0"])  # the only rounding is that of the result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """As PyTorch's own attention: operands are cast, but not float64; what is inside stays as wide as without."""
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    layout = SnippetLayout.uniform(3, 4)
    with torch.autocast("cpu", dtype):
        out = block_causal_attention(q, k, v, layout)
        double = block_causal_attention(q.double(), k.double(), v.double(), layout)
    assert torch.equal(out, block_causal_attention(q.to(dtype), k.to(dtype), v.to(dtype), layout))
    assert double.dtype == torch.float64


def test_return_lse_and_scale() -> None:
    layout = SnippetLayout.uniform(2, 3)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    out = block_causal_attention(q, k, v, layout)
    again, lse = block_causal_attention(q, k, v, layout, return_lse=True)
    assert isinstance(out, Tensor) and torch.equal(out, again) and lse.shape == (1, 1, 6)
    assert torch.equal(out, block_causal_attention(q, k, v, layout, scale=0.5))  # 1/sqrt(4)
    assert not torch.equal(out, block_causal_attention(q, k, v, layout, scale=1))


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
    "dropout": ({"dropout_p": 0.1}, TypeError, "dropout_p"),
    "backend": ({"backend": "flash"}, ValueError, "'flash'"),
    "absent backend": ({"backend": "triton"}, NotImplementedError, "backend 'triton' refuses this call: "),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    change, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        block_causal_attention(**({"q": X, "k": X, "v": X, "layout": SIX} | change))
