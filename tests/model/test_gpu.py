"""The whole model on a GPU, on whatever kernels are there: as exact as its references, forward, backward, streamed."""

from __future__ import annotations

import pytest
import torch

from mirasol_kernels import use_backend
from tests.model.clips import SAMPLES_PER_FRAME, clip, model, words
from tests.numerics import assert_within_budget

KINDS = ["current", "all", "all-window", "ttm", "perceiver", "token_learner"]
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("variant", KINDS)
def test_kernels_are_as_exact_as_references(variant: str, dtype: torch.dtype) -> None:
    made, text = model(variant, dtype=dtype).cuda(), words(2).cuda()
    video, audio = (x.cuda() for x in clip(18, 2, dtype=torch.float32))
    call = {"frames": [18, 9], "has_audio": [True, False]}
    with torch.no_grad():
        fused = made(video, audio, text, **call)
        with use_backend("reference"):
            plain = made(video, audio, text, **call)
            exact = made.double()(video.double(), audio.double(), text, **call)
    for what in ("latents", "logits"):
        a, b, c = (getattr(out, what)[:1] for out in (fused, plain, exact))
        assert_within_budget(a, b, c, what=what)


@pytest.mark.parametrize("variant", KINDS)
def test_gradients(variant: str) -> None:
    """Of all parameters together: single small ones hang on cancelling sums."""
    made, text = model(variant, dtype=torch.float32).cuda(), words(1).cuda()
    video, audio = (x.cuda() for x in clip(18, dtype=torch.float32))

    def gradients(backend: str | None) -> torch.Tensor:
        made.zero_grad()
        with use_backend(backend):
            kind = next(made.parameters()).dtype
            made(video.to(kind), audio.to(kind), text, labels=text).loss.backward()
        return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])

    fused, plain = gradients(None), gradients("reference")
    made.double()
    assert_within_budget(fused, plain, gradients("reference"), what="gradients")


@pytest.mark.parametrize("variant", ["current", "all-window", "ttm"])
def test_a_stream_comes_to_the_latents_of_the_whole_clip(variant: str) -> None:
    made = model(variant, dtype=torch.float32).cuda()
    video, audio = (x.cuda() for x in clip(12, dtype=torch.float32))
    stream, pieces = made.stream(window=3), zip(video.split(4, 2), audio.split(4 * SAMPLES_PER_FRAME, 1), strict=True)
    latents = torch.stack([stream.push(*piece) for piece in pieces], 1)
    assert len(stream.generate(words(1).cuda(), 3)) == 1
    with torch.no_grad(), use_backend("reference"):
        plain = made(video, audio).latents
        exact = made.double()(video.double(), audio.double()).latents
    assert_within_budget(latents, plain, exact, what="latents")
