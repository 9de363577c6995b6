"""SnippetCache: a stream, snippet by snippet, equals the whole of it at once."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mirasol_kernels import SnippetCache, SnippetLayout, block_causal_attention, explain
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.ops.attention import BACKENDS, ON_GPU, on_gpu, served


def stream(batch: int, snippets: int, tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """q (B, 4, N, 6), k (B, 2, N, 6), v (B, 2, N, 5) of `snippets` snippets."""
    n = snippets * tokens
    return tuple(torch.randn(batch, heads, n, dim, dtype=dtype) for heads, dim in ((4, 6), (2, 6), (2, 5)))


def new(batch: int, tokens: int, window: int, sink: int, dtype: torch.dtype = torch.float64) -> SnippetCache:
    return SnippetCache(batch, 2, 6, 5, snippet_tokens=tokens, window=window, sink=sink, dtype=dtype)


def play(cache: SnippetCache, q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """All snippets through the cache -> (B, H, N, Dv)."""
    outs = []
    for q_t, k_t, v_t in zip(*(x.split(cache.snippet_tokens, 2) for x in (q, k, v)), strict=True):
        cache.append(k_t, v_t)
        outs.append(cache.attend(q_t, **options))
    return torch.cat(outs, 2)


@settings(max_examples=60)
@given(
    snippets=st.integers(1, 12),
    tokens=st.integers(1, 5),
    window=st.integers(1, 4),
    sink=st.integers(0, 3),
    restarts=st.sets(st.integers(1, 11), max_size=3),
)
def test_equals_offline(snippets: int, tokens: int, window: int, sink: int, restarts: set[int]) -> None:
    """Over several turns of the ring, and where one row of the batch starts anew now and then."""
    q, k, v = stream(2, snippets, tokens)
    cache = new(2, tokens, window, sink)
    begins = [0, *sorted(t for t in restarts if t < snippets), snippets]
    streamed = []
    for begin, end in itertools.pairwise(begins):
        cache.reset([1])
        streamed.append(play(cache, *(x[:, :, begin * tokens : end * tokens] for x in (q, k, v))))
    actual = torch.cat(streamed, 2)

    def offline(row: int, begin: int, end: int) -> Tensor:
        layout = SnippetLayout.uniform(end - begin, tokens, window=window, sink=sink)
        part = (x[row : row + 1, :, begin * tokens : end * tokens] for x in (q, k, v))
        return block_causal_attention(*part, layout)

    assert_close_fp64(actual[:1], offline(0, 0, snippets))
    parts = [offline(1, begin, end) for begin, end in itertools.pairwise(begins)]
    assert_close_fp64(actual[1:], torch.cat(parts, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", BACKENDS)
def test_thousands_of_snippets(backend: str, dtype: torch.dtype) -> None:
    """No drift: after a thousand turns of the ring the error is that of the offline reference."""
    served(backend, dtype)
    snippets, tokens, window, sink = 3000, 2, 3, 1
    q, k, v = stream(1, snippets, tokens, dtype)
    # Offline at a few snippets, early and late: each sees the sink and its window.
    asked = [*range(8), *range(snippets // 2, snippets // 2 + 8), *range(snippets - 8, snippets)]
    lengths = [tokens * (t in asked) for t in range(snippets)]
    layout = SnippetLayout.ragged([tokens] * snippets, lengths, window=window, sink=sink)
    streamed = play(new(1, tokens, window, sink, dtype), q, k, v, backend=backend)
    actual, q = (torch.cat([x.split(tokens, 2)[t] for t in asked], 2) for x in (streamed, q))
    low = block_causal_attention(q, k, v, layout, backend="reference")
    exact = block_causal_attention(q.double(), k.double(), v.double(), layout)
    assert_within_budget(actual, low, exact)
    late = slice(-8 * tokens, None)
    assert_within_budget(actual[:, :, late], low[:, :, late], exact[:, :, late])


def test_rows_at_different_positions() -> None:
    """A row that is reset starts its stream anew; the others do not notice."""
    q, k, v = stream(3, 7, 4)
    cache = new(3, 4, 2, 1)
    play(cache, *(x[:, :, : 3 * 4] for x in (q, k, v)))
    cache.reset([1])
    assert cache.position.tolist() == [3, 0, 3]
    late = play(cache, *(x[:, :, 3 * 4 :] for x in (q, k, v)))
    whole = block_causal_attention(q, k, v, SnippetLayout.uniform(7, 4, window=2, sink=1))
    anew = [x[1:2, :, 3 * 4 :] for x in (q, k, v)]
    expected = whole[:, :, 3 * 4 :].clone()
    expected[1:2] = block_causal_attention(*anew, SnippetLayout.uniform(4, 4, window=2, sink=1))
    assert_close_fp64(late, expected)


@pytest.mark.parametrize(
    "rows", [[0, 2], [0, -1], [True, False, True], torch.tensor([0, 2]), torch.tensor([True, False, True])]
)
def test_reset_of_rows(rows: list[int] | Tensor) -> None:
    cache = new(3, 2, 2, 0)
    cache.append(*stream(3, 1, 2)[1:])
    cache.reset([])
    assert cache.position.tolist() == [1, 1, 1]
    cache.reset(rows)
    assert cache.position.tolist() == [0, 1, 0]
    cache.reset()
    assert cache.position.tolist() == [0, 0, 0]


def test_before_the_first_snippet() -> None:
    """Nothing is seen, and what earlier streams left in the ring does not leak, NaN neither."""
    cache = new(2, 2, 2, 1)
    nothing = [torch.full_like(x, torch.nan) for x in stream(2, 1, 2)]
    cache.append(*nothing[1:])
    cache.reset()
    out, lse = cache.attend(stream(2, 1, 3)[0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_any_number_of_queries() -> None:
    """One, many or none, with the scale and lse of `block_causal_attention`."""
    q, k, v = stream(1, 3, 4)
    cache = new(1, 4, 2, 0)
    play(cache, q, k, v)
    for n in (0, 1, 9):
        q = torch.randn(1, 4, n, 6, dtype=torch.float64)
        out, lse = cache.attend(q, scale=0.3, return_lse=True)
        expected = block_causal_attention(
            q, k[:, :, 4:], v[:, :, 4:], SnippetLayout.cross([n], [8], [1]), scale=0.3, return_lse=True
        )
        assert_close_fp64(out, expected[0])
        assert_close_fp64(lse, expected[1])


def test_memory_stays_where_it_is() -> None:
    """Nothing is reallocated, so that one CUDA graph of a step serves every step."""
    cache = new(1, 2, 2, 1)
    tensors = {name: x for name, x in vars(cache).items() if isinstance(x, Tensor)}
    addresses = {name: x.data_ptr() for name, x in tensors.items()}
    play(cache, *stream(1, 8, 2))
    cache.load_state_dict(cache.state_dict())
    cache.reset()
    assert {name: getattr(cache, name).data_ptr() for name in tensors} == addresses


def test_state_dict_and_fork() -> None:
    """Copies: what happens to the cache afterwards is not in them."""
    q, k, v = stream(2, 6, 3)
    first, rest = ([x[:, :, a:b] for x in (q, k, v)] for a, b in ((0, 12), (12, 18)))
    cache = new(2, 3, 2, 1)
    play(cache, *first)
    state, fork = cache.state_dict(), cache.fork()
    expected = play(cache, *rest)
    other = new(2, 3, 2, 1)
    other.load_state_dict(state)
    for copy in (fork, other):
        assert torch.equal(play(copy, *rest), expected)
    assert all(isinstance(x, Tensor) for x in state.values())


def test_safetensors() -> None:
    """A state goes through a file as it is, and into a cache of another dtype or device: that is how one moves."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    cache, q = new(2, 3, 2, 1), stream(2, 1, 3)[0]
    play(cache, *stream(2, 5, 3))
    state = safetensors.load(safetensors.save(cache.state_dict()))
    other = new(2, 3, 2, 1)
    other.load_state_dict(state)
    assert torch.equal(other.attend(q), cache.attend(q))
    half = new(2, 3, 2, 1, torch.bfloat16)
    half.load_state_dict(state)
    assert torch.equal(half.k, cache.k.bfloat16()) and half.attend(q.bfloat16()).dtype == torch.bfloat16


def test_inference_mode() -> None:
    """A cache made in that mode, or forked in it, goes on outside of it."""
    q, k, v = stream(1, 2, 2)
    with torch.inference_mode():
        cache = new(1, 2, 2, 0)
        first = play(cache, q, k, v)
        fork = cache.fork()
    assert not first.requires_grad
    for each in (cache, fork):
        each.reset()
        assert torch.equal(play(each, q, k, v), play(new(1, 2, 2, 0), q, k, v))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype) -> None:
    """Whatever float32 and bfloat16 a model has by then, it is stored and asked in the cache's dtype."""
    q, k, v = stream(1, 5, 2, torch.float32)
    v = v.bfloat16()
    expected = play(new(1, 2, 2, 1, dtype), *(x.to(dtype) for x in (q, k, v)))
    with torch.autocast("cpu", torch.bfloat16):
        out = play(new(1, 2, 2, 1, dtype), q, k, v)
        with pytest.raises(TypeError, match=f"append: k: expected {dtype}, got torch.float64"):
            new(1, 2, 2, 1, dtype).append(*stream(1, 1, 2)[1:])
    assert out.dtype == dtype and torch.equal(out, expected)


def test_explain_stores_nothing() -> None:
    cache, (q, k, v) = new(1, 2, 2, 1), stream(1, 1, 2)
    assert explain(cache.append, k, v) == {"reference": "runs"}
    assert explain(cache.attend, q)["reference"] == "runs"
    assert not cache.position.any() and not cache.k.any()


def test_nothing_carries_a_gradient() -> None:
    q, k, v = (x.requires_grad_() for x in stream(1, 2, 2))
    assert not play(new(1, 2, 2, 0), q, k, v).requires_grad


def step_of(cache: SnippetCache, backend: str | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cache.append(k, v)
        return cache.attend(q, backend=backend)

    return step


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_compiles_once(backend: str) -> None:
    """One graph for every step of a stream, whatever the positions."""
    served(backend)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    cache, plain = (new(1, 2, 2, 1, torch.float32) for _ in range(2))
    compiled = torch.compile(step_of(cache, backend), fullgraph=True, backend=counter)
    eager = step_of(plain, backend)
    exact = step_of(new(1, 2, 2, 1))
    for snippet in zip(*(x.split(2, 2) for x in stream(1, 6, 2, torch.float32)), strict=True):
        assert_within_budget(compiled(*snippet), eager(*snippet), exact(*(x.double() for x in snippet)))
    assert counter.frame_count == 1


class Steps(TorchDispatchMode):
    """Every operator that runs, with the shapes of its results; one that brings a number to the host is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert torch.Tag.data_dependent_output not in func.tags, func
        assert torch.Tag.dynamic_output_shape not in func.tags, func
        result = func(*args, **(kwargs or {}))
        self.seen.append((func, [x.shape for x in tree_leaves(result) if isinstance(x, Tensor)]))
        return result


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_never_looks(backend: str) -> None:
    """No number comes to the host, so a GPU is not waited for; and each step does the same, in the same memory."""
    served(backend)
    step, steps = step_of(new(2, 2, 2, 1, torch.float32), backend), []
    for snippet in zip(*(x.split(2, 2) for x in stream(2, 6, 2, torch.float32)), strict=True):
        with Steps() as mode:
            step(*snippet)
        steps.append(mode.seen)
    assert all(seen == steps[0] for seen in steps)


def test_a_step_on_meta_tensors() -> None:
    """Which have no numbers to look at."""
    cache = SnippetCache(2, 2, 6, snippet_tokens=3, window=2, sink=1, device="meta")
    k = torch.empty(2, 2, 3, 6, device="meta")
    out = step_of(cache)(torch.empty(2, 4, 3, 6, device="meta"), k, k)
    assert out.device.type == "meta" and out.shape == (2, 4, 3, 6)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ON_GPU)
def test_cuda_graph(backend: str) -> None:
    """One graph of a step, replayed, is the stream."""
    on_gpu(backend)
    q, k, v = (x.cuda() for x in stream(2, 9, 16, torch.float32))
    snippets = [x.split(16, 2) for x in (q, k, v)]
    static = [x[0].clone() for x in snippets]
    cache, plain = (SnippetCache(2, 2, 6, 5, snippet_tokens=16, window=3, sink=1, device="cuda") for _ in range(2))
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # what the first call compiles and allocates, a capture must not
        step_of(cache, backend)(*static)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step_of(cache, backend)(*static)
    cache.reset()
    for snippet in zip(*snippets, strict=True):
        for x, new_x in zip(static, snippet, strict=True):
            x.copy_(new_x)
        graph.replay()
        assert torch.equal(out, step_of(plain, backend)(*snippet))


K, V = torch.zeros(2, 2, 3, 6), torch.zeros(2, 2, 3, 5)


def ready() -> SnippetCache:
    return new(2, 3, 2, 1, torch.float32)


def changed(name: str, value: Tensor) -> dict[str, Tensor]:
    return ready().state_dict() | {name: value}


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in ready().state_dict().items() if key != name}


ERRORS: dict[str, tuple[Callable, type[Exception], str]] = {
    "batch": (lambda: SnippetCache(-1, 2, 6, snippet_tokens=3, window=2), ValueError, "batch: expected .* 0, got -1"),
    "heads": (lambda: SnippetCache(1, 0, 6, snippet_tokens=3, window=2), ValueError, "heads: expected .* 1, got 0"),
    "window": (lambda: SnippetCache(1, 2, 6, snippet_tokens=3, window=0), ValueError, "window: expected .* 1, got 0"),
    "sink": (lambda: SnippetCache(1, 2, 6, snippet_tokens=3, window=1, sink=-1), ValueError, "sink: .* 0, got -1"),
    "float": (lambda: SnippetCache(1, 2, 6, snippet_tokens=1.5, window=1), ValueError, "snippet_tokens: .* got 1.5"),
    "wide": (lambda: SnippetCache(1, 2, 300, snippet_tokens=1, window=1), ValueError, "head_dim: .* 256, got 300"),
    "long": (
        lambda: SnippetCache(1, 2, 6, snippet_tokens=2**20, window=2**11),
        ValueError,
        r"\(sink \+ window\) \* snippet_tokens: expected at most 2147483647, got 2147483648",
    ),
    "dtype": (
        lambda: SnippetCache(1, 2, 6, snippet_tokens=1, window=1, dtype=torch.int32),
        TypeError,
        "dtype: expected float32, float16, bfloat16 or float64, got torch.int32",
    ),
    "k": (
        lambda: ready().append(K[:, :, :2], V),
        ValueError,
        r"append: k: expected \(2, 2, 3, 6\), got \(2, 2, 2, 6\)",
    ),
    "v": (lambda: ready().append(K, K), ValueError, r"append: v: expected \(2, 2, 3, 5\), got \(2, 2, 3, 6\)"),
    "no tensor": (lambda: ready().append(None, V), TypeError, "append: k: expected a tensor, got NoneType"),
    "k's dtype": (
        lambda: ready().append(K.half(), V),
        TypeError,
        "append: k: expected torch.float32, got torch.float16",
    ),
    "k's device": (lambda: ready().append(K.to("meta"), V), ValueError, "append: k: expected device cpu, got meta"),
    "q": (lambda: ready().attend(K[:1]), ValueError, r"attend: q: expected \(batch 2, .* got \(1, 2, 3, 6\)"),
    "q's dtype": (lambda: ready().attend(K.double()), TypeError, "SnippetCache.attend: q: expected torch.float32"),
    "rows": (lambda: ready().reset([0, 2]), ValueError, r"reset: rows: expected 0 \.\. 1, got 2"),
    "mask of rows": (
        lambda: ready().reset(torch.tensor([True])),
        ValueError,
        r"reset: rows: expected a mask \(2,\), got \(1,\)",
    ),
    "no rows": (lambda: ready().reset([0.5]), TypeError, "reset: rows: expected indices or a bool mask, got .*float32"),
    "scale": (lambda: ready().attend(K, scale="1"), TypeError, "attend: scale: expected a number or None, got str"),
    "no state": (lambda: ready().load_state_dict(without("v")), ValueError, r"expected \['geometry', .* got"),
    "other state": (
        lambda: ready().load_state_dict(changed("geometry", torch.tensor([3, 1, 2]))),
        ValueError,
        r"geometry: expected \(snippet_tokens, window, sink\) = \(3, 2, 1\), got \(3, 1, 2\)",
    ),
    "other batch": (
        lambda: ready().load_state_dict(changed("position", torch.zeros(3, dtype=torch.int32))),
        ValueError,
        r"position: expected \(2,\), got \(3,\)",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name: str) -> None:
    call, error, text = ERRORS[name]
    with pytest.raises(error, match=text):
        call()


def test_an_error_changes_nothing() -> None:
    """Neither half of a bad snippet is stored."""
    cache = ready()
    before = cache.state_dict()
    for k, v in itertools.permutations((K + 1, V.half() + 1, None), 2):
        with pytest.raises((ValueError, TypeError)):
            cache.append(k, v)
    assert all(torch.equal(x, before[name]) for name, x in cache.state_dict().items())


@settings(max_examples=50)
@given(
    window=st.integers(1, 4),
    sink=st.integers(0, 3),
    steps=st.lists(st.tuples(st.integers(1, 4), st.booleans()), min_size=1, max_size=8),
)
def test_several_at_a_time_and_again(window: int, sink: int, steps: list[tuple[int, bool]]) -> None:
    """Several snippets in one call are as many calls; what is replaced might never have been there."""
    tokens, kept = 2, []
    cache = new(2, tokens, window, sink)
    for count, again in steps:
        q, k, v = stream(2, min(count, window), tokens)
        cache.append(k, v, replace=again)
        if again:
            del kept[max(0, len(kept) - k.shape[2] // tokens) :]
        kept += zip(k.split(tokens, 2), v.split(tokens, 2), strict=True)
        seen = [torch.cat(x, 2) for x in zip(*kept[:sink], *kept[sink:][-window:], strict=True)]
        layout = SnippetLayout.cross([q.shape[2]], [seen[0].shape[2]], [1])
        assert_close_fp64(cache.attend(q), block_causal_attention(q, *seen, layout))
