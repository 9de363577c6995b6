"""V-JEPA 2-AC: a small action-conditioned predictor, with its dense mask and with ours."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import scaled_dot_product_attention as sdpa

from mirasol_kernels import SnippetLayout
from mirasol_kernels.integrations.vjepa import frame_causal_attention
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.ops.attention import BACKENDS, served

Attend = Callable[[Tensor, Tensor, Tensor, int, int], Tensor]
GRID, WIDTH, HEADS, MOST_FRAMES = 3, 48, 3, 4


def by_dense_mask(q: Tensor, k: Tensor, v: Tensor, tokens_per_frame: int, frames: int) -> Tensor:
    """As they do it: one mask for the most frames, cut to those there are."""
    frame = torch.arange(MOST_FRAMES * tokens_per_frame) // tokens_per_frame
    mask = frame[:, None] >= frame
    return sdpa(q, k, v, attn_mask=mask[: q.shape[2], : q.shape[2]])


def rotated(x: Tensor, place: Tensor) -> Tensor:
    """x (B, H, N, d), place (N,).  Pairs turn; as in theirs, both halves of a pair have a frequency of their own."""
    omega = 10000 ** -(torch.arange(x.shape[3] // 2, dtype=x.dtype) / (x.shape[3] / 2))
    angle = torch.outer(place.to(x.dtype), omega).repeat(1, 2)  # (N, d)
    a, b = x.unflatten(3, (-1, 2)).unbind(4)
    return x * angle.cos() + torch.stack([-b, a], 4).flatten(3) * angle.sin()


class Attention(nn.Module):
    """A third of a head turns with time, one with height, one with width; conditioning tokens turn with time only."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend, self.third = attend, 2 * (WIDTH // HEADS // 3 // 2)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, frames: int, conditions: int) -> Tensor:
        patches = torch.arange(conditions + GRID * GRID) - conditions
        spatial = patches.clamp(min=0)
        time = torch.arange(frames).repeat_interleave(len(patches))
        places = time, *((y * (patches >= 0)).repeat(frames) for y in (spatial // GRID, spatial % GRID))
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D), views
        q, k = (self.roped(y, places) for y in (q, k))
        return self.proj(self.attend(q, k, v, len(patches), frames).transpose(1, 2).flatten(2))

    def roped(self, x: Tensor, places: tuple[Tensor, ...]) -> Tensor:
        *thirds, rest = x.split([self.third] * 3 + [x.shape[3] - 3 * self.third], 3)
        return torch.cat([*(rotated(part, place) for part, place in zip(thirds, places, strict=True)), rest], 3)


class Predictor(nn.Module):
    """(B, T * patches, C), actions and states (B, T, 7), extrinsics (B, T, 6) or None -> (B, T * patches, C)."""

    def __init__(self, attend: Attend, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.project = nn.Linear(20, WIDTH), nn.Linear(WIDTH, 20)
        self.action, self.state, self.extrinsics = nn.Linear(7, WIDTH), nn.Linear(7, WIDTH), nn.Linear(6, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2 * depth + 1))
        self.attentions = nn.ModuleList(Attention(attend) for _ in range(depth))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(depth)
        )

    def forward(self, x: Tensor, actions: Tensor, states: Tensor, extrinsics: Tensor | None = None) -> Tensor:
        conditions = [self.action(actions), self.state(states)]
        if extrinsics is not None:
            conditions.append(self.extrinsics(extrinsics))
        frames, count = actions.shape[1], len(conditions)
        x = self.embed(x).unflatten(1, (frames, -1))  # (B, T, H*W, C)
        x = torch.cat([*(c[:, :, None] for c in conditions), x], 2).flatten(1, 2)  # (B, T * (count + H*W), C)
        for before, attention, between, mlp in zip(
            self.norms[::2], self.attentions, self.norms[1::2], self.mlps, strict=False
        ):
            x = x + attention(before(x), frames, count)
            x = x + mlp(between(x))
        x = x.unflatten(1, (frames, -1))[:, :, count:].flatten(1, 2)
        return self.project(self.norms[-1](x))


def inputs(frames: int, extrinsics: bool, batch: int = 2) -> list[Tensor]:
    sizes = [(frames * GRID * GRID, 20), (frames, 7), (frames, 7), (frames, 6)]
    return [torch.randn(batch, *size, dtype=torch.float64) for size in sizes[: 4 if extrinsics else 3]]


def results(predictor: Predictor, *given: Tensor) -> dict[str, Tensor]:
    """The prediction, and the gradient of every parameter and input."""
    leaves = {f"input {i}": x.detach().requires_grad_() for i, x in enumerate(given)}
    out = predictor(*leaves.values())
    named = leaves | dict(predictor.named_parameters())
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).reshape(out.shape).to(out.dtype)
    grads = torch.autograd.grad(out, list(named.values()), weights, allow_unused=True)
    return {"out": out.detach()} | {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def switched(predictor: Predictor, attend: Attend) -> Predictor:
    for attention in predictor.attentions:
        attention.attend = attend
    return predictor


@pytest.mark.parametrize("extrinsics", [False, True], ids=["2 conditions", "3 conditions"])
@pytest.mark.parametrize("frames", [1, 3, MOST_FRAMES])
def test_predictor(frames: int, extrinsics: bool) -> None:
    """Outputs and every gradient: in float64 to rounding; in float32, those of all parameters as one (a bias alone may
    be lucky), within twice the dense mask's own error."""
    given, predictor = inputs(frames, extrinsics), Predictor(by_dense_mask).double()
    exact = results(predictor, *given)
    double = results(switched(predictor, frame_causal_attention), *given)
    ours = results(predictor.float(), *(x.float() for x in given))
    low = results(switched(predictor, by_dense_mask), *(x.float() for x in given))
    assert exact.keys() == double.keys() == ours.keys() and len(ours) > 30
    rounded = results(predictor.double(), *(x.float().double() for x in given))  # of the weights and inputs in float32
    for name in exact:
        assert_close_fp64(double[name], exact[name], what=name)
    parameters = [name for name, _ in predictor.named_parameters() if name in exact]
    for x in (ours, low, rounded):
        x["parameters"] = torch.cat([x.pop(name).flatten() for name in parameters])
    for name in rounded:
        assert_within_budget(ours[name], low[name], rounded[name], what=name)


def test_a_frame_does_not_see_later_ones() -> None:
    given, predictor = inputs(3, False), Predictor(frame_causal_attention).double()
    before = predictor(*given)
    for x in given:
        x[:, -(x.shape[1] // 3) :] = torch.randn(())
    changed = (predictor(*given) != before).any(2).any(0)
    assert not changed[: 2 * GRID * GRID].any() and changed[2 * GRID * GRID :].all()


@torch.no_grad()
def test_planning() -> None:
    """Many candidates for the next actions, forward only: each is predicted as it would be alone; and there may be
    more frames than any mask was made for."""
    context, candidates = inputs(2, False, batch=1), 40
    actions = torch.randn(candidates, 2, 7, dtype=torch.float64)
    predictor = Predictor(frame_causal_attention).double()
    together = predictor(context[0].expand(candidates, -1, -1), actions, context[2].expand(candidates, -1, -1))
    for i in (0, 17, 39):
        assert_close_fp64(predictor(context[0], actions[i : i + 1], context[2])[0], together[i])
    assert predictor(*inputs(MOST_FRAMES + 3, False)).shape == (2, (MOST_FRAMES + 3) * GRID * GRID, 20)


@pytest.mark.parametrize("backend", BACKENDS)
def test_their_tokens_per_frame(backend: str) -> None:
    """258 and 259 are no multiple of any tile."""
    served(backend)
    for tokens in (258, 259):
        q, k, v = (torch.randn(1, 1, 2 * tokens, 64) for _ in range(3))
        frame = torch.arange(2 * tokens) // tokens
        low, exact = (
            sdpa(*x, attn_mask=frame[:, None] >= frame) for x in ((q, k, v), (q.double(), k.double(), v.double()))
        )
        assert_within_budget(frame_causal_attention(q, k, v, tokens, 2, backend=backend), low, exact)


def test_compiled() -> None:
    """Without a graph break where the layout is made outside; other numbers of frames do not compile again."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(frame_causal_attention, fullgraph=True, backend=counter)
    for frames in (2, 3, 4, 5, 2):
        q, k, v = torch.randn(3, 1, 2, frames * 6, 8)
        out = compiled(q, k, v, 6, frames, layout=SnippetLayout.uniform(frames, 6))
        assert torch.equal(out, frame_causal_attention(q, k, v, 6, frames))
    assert counter.frame_count <= 2


ERRORS = {
    "frames": (lambda x: frame_causal_attention(x, x, x, 5, 3), "q: expected 15 tokens as in the layout, got 10"),
    "none": (lambda x: frame_causal_attention(x, x, x, 5, -1), "snippets"),
    "kind": (lambda x: frame_causal_attention(x, x, x, 2.5, 4), "tokens"),
    "tensor": (lambda x: frame_causal_attention(x, x, None, 5, 2), "v: expected a tensor, got NoneType"),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(call, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        call(torch.zeros(1, 2, 10, 4))
