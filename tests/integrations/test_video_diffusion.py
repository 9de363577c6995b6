"""Autoregressive video diffusion: the masks and the rolling cache of CausVid, Self-Forcing and LongLive."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.flex_attention import create_mask
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils._python_dispatch import TorchDispatchMode

from mirasol_kernels import SnippetLayout
from mirasol_kernels.integrations.video_diffusion import (
    RollingCache,
    attention,
    chunk_causal,
    teacher_forcing,
    text_per_chunk,
)
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.ops.attention import BACKENDS, served

# num_frames, frame_seqlen, num_frame_per_block, local_attn_size, sink_size, independent_first_frame
VIDEOS = {
    "causvid": (6, 2, 3, -1, 0, False),
    "frame by frame": (5, 3, 1, -1, 0, False),
    "image to video": (7, 2, 3, -1, 0, True),
    "window of whole chunks": (9, 2, 3, 6, 0, False),
    "window that cuts a chunk": (12, 1, 3, 4, 0, False),
    "window, first frame alone": (13, 2, 4, 6, 0, True),
    "window and sink": (12, 2, 3, 7, 1, False),
    "longlive": (20, 1, 2, 6, 2, False),
    "sink longer than a chunk": (8, 1, 1, 4, 3, False),
    "window longer than the video": (6, 2, 2, 30, 3, False),
    "one frame": (1, 4, 1, -1, 0, True),
}
videos = pytest.mark.parametrize("video", VIDEOS.values(), ids=VIDEOS)


def options(video) -> dict:
    return dict(zip(("local_attn_size", "sink_size", "independent_first_frame"), video[3:], strict=True))


def chunk_end(frame: Tensor, chunk: int, first_alone: bool) -> Tensor:
    """The frame behind the last one of a frame's chunk."""
    alone = int(first_alone)
    end = alone + ((frame - alone).div(chunk, rounding_mode="floor") + 1) * chunk
    return torch.where(frame < alone, 1, end)


def rule(video):
    """The chunk-causal mask as a FlexAttention mask_mod, frame by frame and token by token."""
    _, size, chunk, local, sink, alone = video

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        end, frame = chunk_end(q // size, chunk, alone), k // size
        if local == -1:
            return frame < end
        return (frame < end) & ((frame >= end - (local - sink)) | (frame < sink))

    return seen


def forcing_rule(video):
    frames, size, chunk, _, _, alone = video
    half, clean = frames * size, rule(video)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        q_chunk, k_chunk = (chunk_end(i % half // size, chunk, alone) for i in (q, k))
        earlier = (k < half) & (k_chunk < q_chunk) & clean(b, h, q - half, k)
        own = (k >= half) & (k_chunk == q_chunk)
        return torch.where(q < half, (k < half) & clean(b, h, q, k), earlier | own)

    return seen


@videos
def test_masks(video) -> None:
    tokens = video[0] * video[1]
    layout = chunk_causal(*video[:3], **options(video))
    assert torch.equal(layout.dense_mask()[0], create_mask(rule(video), 1, 1, tokens, tokens, device="cpu")[0, 0])
    layout = teacher_forcing(*video[:3], **options(video))
    expected = create_mask(forcing_rule(video), 1, 1, 2 * tokens, 2 * tokens, device="cpu")[0, 0]
    assert torch.equal(layout.dense_mask()[0], expected)


def test_a_real_video_is_a_few_numbers() -> None:
    """LongLive 2's teacher forcing has 168,960 tokens; its mask would take 28 GB."""
    layout = teacher_forcing(96, 880, 8, local_attn_size=40, sink_size=8)
    assert layout.q_len == layout.k_len == 168_960
    assert sum(table.nbytes for table in layout.tables()) < 10_000


def tensors(tokens: int, dtype: torch.dtype = torch.float64, keys: int | None = None) -> list[Tensor]:
    """q (2, N, 4, 8), k and v (2, N, 2, 8), one video a row, as these models have them."""
    return [
        torch.randn(2, n, heads, 8, dtype=torch.float64).to(dtype)
        for heads, n in ((4, tokens), (2, keys or tokens), (2, keys or tokens))
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def with_gradients(call, *inputs: Tensor) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = call(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("make", [chunk_causal, teacher_forcing])
@videos
def test_equals_a_dense_mask(video, make, backend) -> None:
    """Forward and backward: in float64 to rounding, in float32 within twice the dense mask's own error."""
    served(backend)
    layout = make(*video[:3], **options(video))
    q, k, v = tensors(layout.q_len, torch.float32)
    mask = layout.dense_mask()
    exact = with_gradients(lambda *x: dense(*x, mask), *(x.double() for x in (q, k, v)))
    low = with_gradients(lambda *x: dense(*x, mask), q, k, v)
    ours = with_gradients(lambda *x: attention(*x, layout, backend=backend), q, k, v)
    for name, a, b, c in zip(("out", "dq", "dk", "dv"), ours, low, exact, strict=True):
        assert_within_budget(a, b, c, what=name)
    if backend == "reference":
        double = with_gradients(lambda *x: attention(*x, layout), *(x.double() for x in (q, k, v)))
        for name, a, c in zip(("out", "dq", "dk", "dv"), double, exact, strict=True):
            assert_close_fp64(a, c, what=name)


class Operations(TorchDispatchMode):
    """The operators that are called and make something new; and where those of ours read."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.read: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not func.is_view:
            self.names.append(str(func))
        if "mirasol" in str(func):
            self.read |= {x.data_ptr() for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("packed", [False, True])
def test_no_copies(packed) -> None:
    """Our operator reads the tensors of the projections where they lie, forward and backward, and is all that runs."""
    served("native")
    layout = chunk_causal(6, 2, 3)
    q, k, v = torch.randn(2, 12, 3, 4, 8).unbind(2) if packed else (torch.randn(2, 12, 4, 8) for _ in range(3))
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    dout = torch.randn(2, 12, 4, 8)
    with Operations() as operations:
        out = attention(q, k, v, layout, backend="native")
    assert out.is_contiguous() and {x.data_ptr() for x in (q, k, v)} <= operations.read
    assert [name for name in operations.names if "mirasol" not in name] == []
    with Operations() as operations:
        gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert {x.data_ptr() for x in (q, k, v, out, dout)} <= operations.read
    assert all("mirasol" in name or "zeros" in name for name in operations.names)  # zeros: of lse, which nobody asked
    assert [g.stride() for g in gradients] == [
        x.stride() if not packed else g.contiguous().stride() for x, g in zip((q, k, v), gradients, strict=True)
    ]


def test_compiled() -> None:
    """Without a graph break; videos of other lengths do not compile again."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(attention, fullgraph=True, backend=counter)
    for frames in range(3, 15, 3):
        layout = chunk_causal(frames, 2, 3)
        q, k, v = tensors(layout.q_len, torch.float32)
        assert torch.equal(compiled(q, k, v, layout), attention(q, k, v, layout))
    assert counter.frame_count <= 2


# -------------------------------------------------------------------- streaming


class Rolled:
    """What those models do: the cache as one tensor; what falls out of the window is cut away from behind the sink."""

    def __init__(self, size: int, local: int, sink: int) -> None:
        self.most, self.sink = (None, 0) if local == -1 else (local * size, sink * size)
        self.k, self.v, self.end = torch.empty(0), torch.empty(0), 0

    def step(self, q: Tensor, k: Tensor, v: Tensor, current_start: int) -> Tensor:
        if not self.end:
            self.k, self.v = k.clone(), v.clone()
        elif current_start + k.shape[1] == self.end:  # a further denoising step
            self.k[:, -k.shape[1] :], self.v[:, -k.shape[1] :] = k, v
        else:
            self.k, self.v = (self.roll(torch.cat([old, new], 1)) for old, new in ((self.k, k), (self.v, v)))
        self.end = current_start + k.shape[1]
        return dense(q, self.k, self.v, torch.ones(1, 1, q.shape[1], self.k.shape[1], dtype=torch.bool))

    def roll(self, x: Tensor) -> Tensor:
        if self.most is None or x.shape[1] <= self.most:
            return x
        return torch.cat([x[:, : self.sink], x[:, self.sink + x.shape[1] - self.most :]], 1)


def chunks(video) -> list[tuple[int, int]]:
    """First token and tokens of every chunk."""
    frames, size, chunk, *_, alone = video
    starts = [0, *range(1, frames, chunk)] if alone else list(range(0, frames, chunk))
    return [(a * size, (b - a) * size) for a, b in zip(starts, [*starts[1:], frames], strict=True)]


def held(k: Tensor) -> list[float]:
    """Which keys are there, in any order; keys are told apart by their first number."""
    return sorted(k[0, :, 0, 0].tolist())


@videos
def test_the_roll_step_by_step(video) -> None:
    """Three denoising steps a chunk: what is held, what comes out, and that nothing moves in memory; and the last step
    of every chunk equals the whole video under the training mask."""
    _, size, _, local, sink, _ = video
    q, k, v = tensors(video[0] * size)
    cache = RollingCache(
        2, 2, 8, frame_seqlen=size, local_attn_size=local, sink_size=sink, num_frames=video[0], dtype=torch.float64
    )
    theirs, place, outs = Rolled(size, local, sink), cache.frames.k.data_ptr(), []
    for start, tokens in chunks(video):
        here = slice(start, start + tokens)
        for step in range(3):
            noise = 0.0 if step == 2 else 1.0
            now = [x[:, here] + noise * torch.randn_like(x[:, here]) for x in (q, k, v)]
            out = cache.attend(*now, start)
            assert_close_fp64(out, theirs.step(*now, start))
            filled = min(start + tokens, cache.frames.k.shape[2])
            assert held(cache.frames.k[:, :, :filled].transpose(1, 2)) == held(theirs.k)
        outs.append(out)
        assert cache.frames.k.data_ptr() == place and cache.end == start + tokens
    whole = attention(q, k, v, chunk_causal(*video[:3], **options(video)))
    assert_close_fp64(torch.cat(outs, 1), whole)
    cache.reset()
    start, tokens = chunks(video)[0]
    assert_close_fp64(cache.attend(*(x[:, :tokens] for x in (q, k, v)), start), whole[:, :tokens])


@videos
def test_gradients_through_the_roll(video) -> None:
    """Every chunk's own q, k and v get theirs, also once the ring has moved on; the frames before are constants."""
    _, size, _, local, sink, _ = video
    whole = tensors(video[0] * size)
    cache = RollingCache(
        2, 2, 8, frame_seqlen=size, local_attn_size=local, sink_size=sink, num_frames=video[0], dtype=torch.float64
    )
    theirs, ours, expected = Rolled(size, local, sink), [], []
    for start, tokens in chunks(video):
        q, k, v = (x[:, start : start + tokens].clone().requires_grad_() for x in whole)
        with torch.no_grad():
            cache.attend(q + 1, k + 1, v + 1, start)  # an earlier denoising step
            theirs.step(q, k, v, start)
        ours.append((cache.attend(q, k, v, start), q, k, v))
        keys, values = (torch.cat([x[:, :-tokens], new], 1) for x, new in ((theirs.k, k), (theirs.v, v)))
        everything = torch.ones(1, 1, tokens, keys.shape[1], dtype=torch.bool)
        expected.append((dense(q, keys, values, everything), q, k, v))
    for (out, *inputs), (out_then, *_) in zip(ours, expected, strict=True):
        assert_close_fp64(out, out_then)
        weights = torch.randn_like(out)
        pairs = (torch.autograd.grad(x, inputs, weights) for x in (out, out_then))
        for name, a, b in zip(("dq", "dk", "dv"), *pairs, strict=True):
            assert_close_fp64(a, b, what=name)
    assert not cache.frames.k.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learns", [False, True])
def test_streaming_under_autocast(dtype: torch.dtype, learns: bool) -> None:
    """Norms give q and k in float32, linear layers v in bfloat16: all is stored, asked and answered in the cache's
    dtype, with gradients and without."""
    whole = tensors(24, torch.float32)
    whole[2] = whole[2].bfloat16()

    def streamed(cast: bool) -> list[Tensor]:
        cache, results = RollingCache(2, 2, 8, frame_seqlen=2, local_attn_size=5, sink_size=1, dtype=dtype), []
        for start in range(0, 24, 4):
            leaves = [x[:, start : start + 4].clone().requires_grad_(learns) for x in whole]
            out = cache.attend(*(x.to(dtype) if cast else x for x in leaves), start)
            grads = torch.autograd.grad(out.float().sin().sum(), leaves) if learns else ()
            assert out.dtype == dtype and [g.dtype for g in grads] == [x.dtype for x in leaves][: len(grads)]
            results += [out.detach(), *grads]
        return [*results, cache.frames.k, cache.frames.v]

    with torch.autocast("cpu", torch.bfloat16):
        ours = streamed(cast=False)
    assert all(map(torch.equal, ours, streamed(cast=True)))


def test_text_per_chunk() -> None:
    """Every chunk attends to its own prompt, as a loop over chunks would; two of them share one."""
    sizes, lengths, prompts = [4, 6, 6, 2], [5, 3, 7], [0, 2, 2, 1]
    q, k, v = tensors(sum(sizes), keys=sum(lengths))
    out = attention(q, k, v, text_per_chunk(sizes, lengths, prompts))
    texts = list(zip(k.split(lengths, 1), v.split(lengths, 1), strict=True))
    for q_chunk, part, prompt in zip(q.split(sizes, 1), out.split(sizes, 1), prompts, strict=True):
        text = texts[prompt]
        everything = torch.ones(1, 1, q_chunk.shape[1], lengths[prompt], dtype=torch.bool)
        assert_close_fp64(part, dense(q_chunk, *text, everything))
    assert text_per_chunk(lengths, lengths) == SnippetLayout.ragged(lengths, window=1)


# -------------------------------------------------------------------- errors and the example


def cache(**changes) -> RollingCache:
    return RollingCache(1, 2, 4, **{"frame_seqlen": 3, "local_attn_size": 4, "sink_size": 1} | changes)


def step(start: int = 0, frames: int = 1, *, into: RollingCache | None = None, **changes) -> Tensor:
    made = {name: torch.zeros(1, 3 * frames, 2, 4) for name in "qkv"} | changes
    return (into or cache()).attend(*made.values(), start)


X = torch.zeros(1, 3, 2, 4)
ERRORS = {
    "chunks": (lambda: chunk_causal(7, 2, 3), "num_frames: expected a multiple of num_frame_per_block = 3, got 7"),
    "first": (
        lambda: teacher_forcing(6, 2, 3, independent_first_frame=True),
        r"expected 1 \+ a multiple of .* 3, got 6",
    ),
    "frames": (lambda: chunk_causal(0, 2), "chunk_causal: num_frames: expected an integer of at least 1, got 0"),
    "tokens": (lambda: teacher_forcing(4, 2.0), "teacher_forcing: frame_seqlen: expected an integer .* got 2.0"),
    "window": (lambda: chunk_causal(6, 2, 3, local_attn_size=3, sink_size=1), r"at least .* = 1 \+ 3, got 3"),
    "sink": (lambda: chunk_causal(6, 2, 3, sink_size=-1), "sink_size: expected an integer of at least 0, got -1"),
    "prompts": (lambda: text_per_chunk([1, 2], [3], [0]), "prompts: expected 2 like chunk_tokens, got 1"),
    "prompt": (lambda: text_per_chunk([1, 2], [3], [0, 1]), r"prompts: expected 0 \.\. 0, got 1"),
    "dimensions": (lambda: attention(X, X[0], X, chunk_causal(1, 3)), r"attention: k: expected \(batch, tokens, heads"),
    "no tensor": (lambda: attention(None, X, X, chunk_causal(1, 3)), "q: expected a tensor, got NoneType"),
    "length": (lambda: attention(X, X, X, chunk_causal(2, 3)), "q: expected 6 tokens as in the layout, got 3"),
    "no window": (lambda: cache(sink_size=4), "local_attn_size: expected -1 or more than sink_size = 4, got 4"),
    "later": (lambda: step(3), "current_start: expected 0, where the video so far ends, or -3 .* got 3"),
    "too many": (lambda: step(0, 3, into=cache(local_attn_size=-1, num_frames=2)), r"at most 6 tokens .* got 0 \+ 9"),
    "chunk": (lambda: step(0, 4), r"SnippetCache.append: k: expected \(1, 2, 9, 4\), got \(1, 2, 12, 4\)"),
    "part of a frame": (lambda: step(q=X[:, :2], k=X[:, :2], v=X[:, :2]), r"k: expected \(1, 2, 3, 4\), got"),
    "q": (lambda: step(q=X[:, :2]), r"q: expected \(batch 1, tokens 3, a multiple of 2 heads, head_dim 4\) like k"),
    "q's dtype": (lambda: step(q=X.double()), "q: expected torch.float32 like k, got torch.float64"),
    "q's device": (lambda: step(q=X.to("meta")), "q: expected a tensor on cpu like k, got one on meta"),
    "v": (lambda: step(v=X[:, :2]), r"append: v: expected \(1, 2, 3, 4\), got \(1, 2, 2, 4\)"),
    "cache's dimensions": (lambda: step(v=X[0]), r"v: expected \(batch, tokens, heads, head_dim\), got \(3, 2, 4\)"),
    "cache's tensor": (lambda: step(k=None), "RollingCache: k: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call()


def test_an_error_stores_nothing() -> None:
    into = cache()
    step(0, 2, into=into)
    before = into.frames.state_dict()
    for wrong in ({"q": X[:, :2]}, {"v": X[:, :2]}, {"q": X.double()}, {"q": X.to("meta")}):
        with pytest.raises((ValueError, TypeError)):
            step(6, into=into, **wrong)
    assert into.end == 6 and all(torch.equal(x, before[name]) for name, x in into.frames.state_dict().items())


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_example(capsys) -> None:
    """FlexAttention and ours in one module of their call: the same, and streamed the same."""
    path = Path(__file__).parents[2] / "examples" / "causal_wan.py"
    spec = importlib.util.spec_from_file_location("causal_wan", path)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    example.main()
    assert len(capsys.readouterr().out.splitlines()) == 2

    layer, freqs = example.CausalWanSelfAttention(32, 2).double().requires_grad_(False), example.rope_table(16)
    x, lengths, grid = (
        torch.randn(2, 24, 32, dtype=torch.float64),
        torch.tensor([24, 24]),
        torch.tensor([[4, 2, 3]] * 2),
    )
    by_flex = layer(x, lengths, grid, freqs, example.flex_mask(4, 6, 2))
    ours = layer(x, lengths, grid, freqs, chunk_causal(4, 6, 2))
    assert_close_fp64(ours, by_flex)
    both = torch.cat([x, x], 1)  # a clean half that equals the noisy one: chunk by chunk they see the same numbers
    clean, noisy = layer(both, lengths, grid, freqs, teacher_forcing(4, 6, 2)).chunk(2, 1)
    assert_close_fp64(clean, ours)
    assert_close_fp64(noisy, ours)
