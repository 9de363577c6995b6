"""The whole model: shapes, losses, time, what is absent, parameters, recomputation, precision."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from mirasol_kernels import use_backend, wanted_backend
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.layers import Block
from tests.model.clips import SAMPLES_PER_FRAME, VARIANTS, clip, model, scenes, tiny, words
from tests.numerics import assert_close_fp64, assert_within_budget

F, M, D, VOCABULARY = 4, 4, 64, 320
KINDS = ["current", "all", "all-window", "ttm", "perceiver", "token_learner"]


# ----------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize(("frames", "per_snippet"), [*itertools.product([1, 3, 4, 13, 16], [2, 4, 8])])
@pytest.mark.parametrize("given", ["both", "video", "audio"])
def test_shapes_for_every_length_and_modality(frames, per_snippet, given):
    made = model("current", dtype=torch.float32, video={"frames": per_snippet})
    video, audio = clip(frames, 2, dtype=torch.float32)
    video, audio = (None if given == "audio" else video), (None if given == "video" else audio)
    text = words(2)
    out = made(video, audio, text, labels=text, frames=frames if video is None else None)
    snippets = -(-frames // per_snippet)
    assert out.latents.shape == (2, snippets, M, D)
    assert out.logits.shape == (2, 6, VOCABULARY)
    assert out.latents.isfinite().all() and out.loss.isfinite()
    assert set(out.losses) == {"latent", "video", "audio", "text"}
    assert (out.losses["latent"] is None) == (snippets == 1)
    assert given == "both" or out.losses["audio" if given == "video" else "video"] is None


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_combiner_and_uint8_and_pictures_that_are_not_square(variant):
    made = model(variant, dtype=torch.float32)
    video, audio = clip(10, 2, size=(48, 32), dtype=torch.float32)
    video = (video * 255).to(torch.uint8)
    out = made(video, audio, words(2))
    assert out.latents.shape == (2, 3, M, D)
    assert out.loss is not None and out.losses["text"] is None
    assert torch.equal(out.latents, made(video.float() / 255, audio, words(2)).latents)


def test_without_text_and_without_anything_to_predict():
    made = model()
    out = made(*clip(12))
    assert out.logits is None and out.losses["text"] is None and out.loss is not None
    out = made(*clip(4))
    assert out.loss is None and set(out.losses.values()) == {None}
    ignored = torch.full((1, 6), -100)
    assert made(*clip(4), words(1), labels=ignored).loss is None


def test_the_loss_is_the_weighted_sum():
    weights = {"latent": 0.5, "reconstruction": 2.0, "text": 10.0}
    made, text = model(losses=weights), words(1)
    out = made(*clip(12), text, labels=text)
    parts = out.losses
    expected = 0.5 * parts["latent"] + 2 * (parts["video"] + parts["audio"]) + 10 * parts["text"]
    assert_close_fp64(out.loss, expected)
    made = model(losses={"latent": 0.0, "reconstruction": 0.0})
    assert set(made(*clip(12)).losses.values()) == {None}


def test_text_loss_reads_labels_at_their_own_places():
    made, text = model(), words(2)
    labels = text.clone()
    labels[0, :4] = -100
    labels[1, 5] = -100
    out = made(*clip(8, 2), text, labels=labels)
    each = -out.logits.log_softmax(-1)[:, :-1].gather(2, text[:, 1:, None]).squeeze(2)
    assert_close_fp64(out.losses["text"], each[labels[:, 1:] != -100].mean())


@pytest.mark.parametrize("distance", ["cosine", "l2"])
def test_losses_by_hand(distance):
    """Two full snippets: the second is predicted from h of the first."""
    made = model(losses={"distance": distance})
    video, audio = clip(8)
    out, encoded = made(video, audio), made.encode(video, audio)
    cosine = torch.nn.functional.cosine_similarity
    latent = 1 - cosine(made.latent_loss.predict(encoded.latents[:, 0]), encoded.combined[:, 1], dim=-1).mean()
    assert_close_fp64(out.losses["latent"], latent)

    guess = made.video_loss.predict(encoded.latents[:, 0])  # (1, 4 patches, 3*2*8*8)
    small = torch.nn.functional.adaptive_avg_pool3d(video[:, :, 4:] * 2 - 1, (2, 16, 16))
    patches = [small[:, :, :, i : i + 8, j : j + 8].flatten(1) for i in (0, 8) for j in (0, 8)]
    target = torch.stack(patches, dim=1)
    error = 1 - cosine(guess, target, dim=-1) if distance == "cosine" else (guess - target).square().mean(-1)
    assert_close_fp64(out.losses["video"], error.mean())


def test_a_latent_target_gets_no_gradient():
    made = model(losses={"reconstruction": 0.0})
    encoded = made.encode(*clip(8))
    x = encoded.combined
    loss = made.latent_loss(encoded.latents[:, 0], x[:, 1])
    (gradient,) = torch.autograd.grad(loss, x)
    assert gradient[:, 0].abs().max() > 0 and gradient[:, 1].abs().max() == 0


# --------------------------------------------------------------------------------------------------------- time


@pytest.mark.parametrize("variant", KINDS)
def test_a_changed_snippet_changes_nothing_before_it(variant):
    made = model(variant)
    video, audio = clip(5 * F, 2)
    before = made.encode(video, audio)
    for t in range(5):
        frames, samples = video.clone(), audio.clone()
        frames[:, :, t * F : (t + 1) * F] = torch.rand(2, 3, F, 32, 32, dtype=torch.float64)
        samples[:, t * F * SAMPLES_PER_FRAME : (t + 1) * F * SAMPLES_PER_FRAME] *= -0.5
        for changed in (made.encode(frames, audio), made.encode(video, samples)):
            assert torch.equal(changed.combined[:, :t], before.combined[:, :t])
            assert torch.equal(changed.latents[:, :t], before.latents[:, :t])
            assert not torch.equal(changed.latents[:, t], before.latents[:, t])


@pytest.mark.parametrize("variant", ["current", "ttm"])
@pytest.mark.parametrize("samples", [12_800, 12_801, 12_345])
def test_sound_after_time_s_is_not_heard_before_it(variant, samples):
    """Whatever the rate: h_t depends on samples [t*F*S // frames, (t+1)*F*S // frames) and earlier ones alone."""
    made, frames = model(variant), 4 * F
    video, audio = clip(frames)
    audio = 0.1 * torch.randn(1, samples, dtype=torch.float64)
    before = made.encode(video, audio).latents
    for t in range(4):
        start = t * F * samples // frames
        changed = audio.clone()
        changed[:, start:] = 0.1 * torch.randn(1, samples - start, dtype=torch.float64)
        after = made.encode(video, changed).latents
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t], before[:, t])


@pytest.mark.parametrize("variant", KINDS)
def test_clips_of_different_lengths_and_without_sound_are_what_they_are_alone(variant):
    made, lengths, sound = model(variant), [18, 7, 12, 1], [True, True, False, True]
    video, audio = clip(18, 4)
    text = words(4)
    together = made(video, audio, text, labels=text, frames=lengths, has_audio=sound)
    encoded = made.encode(video, audio, frames=lengths, has_audio=torch.tensor(sound))
    parts: dict[str, list] = {"latent": [], "video": [], "audio": [], "text": []}
    for b, (frames, heard) in enumerate(zip(lengths, sound, strict=True)):
        heard_audio = audio[b : b + 1, : frames * SAMPLES_PER_FRAME] if heard else None
        alone = made(video[b : b + 1, :, :frames], heard_audio, text[b : b + 1], labels=text[b : b + 1])
        snippets = -(-frames // F)
        assert_close_fp64(together.latents[b : b + 1, :snippets], alone.latents)
        assert_close_fp64(together.logits[b : b + 1], alone.logits)
        assert list(encoded.age[b]) == [snippets - t for t in range(5)]
        for name, loss in alone.losses.items():
            count = {"latent": snippets - 1, "text": 1}.get(name, _patches(name, frames))
            assert (loss is None) == (count == 0 or (name == "audio" and not heard))
            parts[name] += [] if loss is None else [(loss, count)]
    for name, terms in parts.items():  # the batch's loss is the mean over what counts in all of it
        total = sum(loss * count for loss, count in terms) / sum(count for _, count in terms)
        assert_close_fp64(together.losses[name], total, what=name)


def _patches(name: str, frames: int) -> int:
    """Time steps of patches that are whole: video has one for both halves of a snippet, so F frames or none; sound is
    pooled to 4 steps, one patch of all of them, and counts if its snippet is full or the padding is no frame."""
    full = frames // F - 1 + (1 if frames < F else 0)
    return full if frames >= F else 0


@pytest.mark.parametrize("variant", KINDS)
def test_padding_may_hold_anything(variant):
    made = model(variant)
    video, audio = clip(16, 2)
    call = {"frames": [16, 6], "has_audio": [True, False]}
    before = made(video, audio, words(2), **call)
    video[1, :, 6:], audio[1] = 0.5, 7.0
    after = made(video, audio, words(2), **call)
    assert torch.equal(after.latents[1, :2], before.latents[1, :2])
    assert torch.equal(after.loss, before.loss)


# --------------------------------------------------------------------------------------------------- parameters


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_parameter_count_depends_on_no_length(variant):
    """Neither T nor F: the model has no table of times, and the same tubes serve every F."""
    states = [
        {n: p.shape for n, p in _meta(tiny(variant, video={"frames": f})).state_dict().items()} for f in (2, 4, 8)
    ]
    assert states[0] == states[1] == states[2]
    made = Mirasol(tiny(variant))
    before = sum(p.numel() for p in made.parameters())
    for frames in (4, 32):
        made(*clip(frames, dtype=torch.float32))
        assert sum(p.numel() for p in made.parameters()) == before


def _meta(config: MirasolConfig) -> Mirasol:
    with torch.device("meta"):
        return Mirasol(config)


def test_presets_have_the_size_they_say():
    count = {}
    for name in ("tiny", "small", "base", "3b"):
        made = _meta(MirasolConfig.preset(name))
        count[name] = sum(p.numel() for p in made.parameters())
    assert count["tiny"] < 1e6
    assert 25e6 < count["small"] < 35e6
    assert 330e6 < count["base"] < 380e6
    assert 2.8e9 < count["3b"] < 3.1e9
    text = sum(p.numel() for p in made.text.parameters())
    assert 0.50 < 1 - text / count["3b"] < 0.55


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_reach_every_parameter(variant):
    made = model(variant, latent={"mask_ratio": 0.5}).train()
    text = words(2)
    made(*clip(18, 2), text, labels=text, frames=[18, 10]).loss.backward()
    missing = [name for name, p in made.named_parameters() if p.grad is None or not p.grad.any()]
    assert not missing


@pytest.mark.parametrize("variant", [*KINDS, "all-last"])
@pytest.mark.parametrize("ragged", [False, True])
def test_recomputation_changes_no_loss_and_no_gradient(variant, ragged, monkeypatch):
    monkeypatch.setattr("mirasol_model.layers.AT_A_TIME", 5)  # tokens: several pieces, the last one short
    made = model(variant).train()
    text, (video, audio) = words(2), clip(26, 2)
    more = {"frames": [26, 9], "has_audio": [True, False]} if ragged else {}
    results = []
    for recompute in ("none", "snippet"):
        made.config = replace(made.config, recompute=recompute)
        made.zero_grad()
        torch.manual_seed(2)  # of the tokens that are masked
        out = made(video, audio, text, labels=text, **more)
        out.loss.backward()
        results.append([out.loss.detach(), out.latents.detach(), *(p.grad for p in made.parameters())])
    for i, (plain, again) in enumerate(zip(*results, strict=True)):
        assert_close_fp64(again, plain, what=f"result {i}")


def test_recomputation_runs_on_the_backend_of_its_forward(monkeypatch):
    """Backward may run in another thread, as it does on a GPU, and outside of `use_backend`."""
    made, text, asked = model("all").train(), words(2), []
    made.config = replace(made.config, recompute="snippet")
    block = Block._think

    def think(self, x):
        asked.append(wanted_backend())
        return block(self, x)

    monkeypatch.setattr(Block, "_think", think)
    with use_backend("reference"):
        loss = made(*clip(18, 2), text, labels=text).loss
    forward = len(asked)
    loss.backward()
    assert len(asked) > forward and set(asked) == {"reference"}


def test_recomputation_keeps_no_activations():
    """Bytes that autograd saves besides inputs and parameters: with recomputation hardly more for 4 times the clip."""
    saved = {}
    for recompute, frames in itertools.product(("none", "snippet"), (64, 256)):
        made = model("current", dtype=torch.float32, losses={"latent": 0.0})
        made.config = replace(made.config, recompute=recompute)
        video, audio = clip(frames, dtype=torch.float32)
        known = {p.untyped_storage().data_ptr() for p in (*made.parameters(), video, audio)}
        sizes: dict[int, int] = {}

        def keep(x, known=known, sizes=sizes):
            storage = x.untyped_storage()
            if storage.data_ptr() not in known:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            x = made._combine(made._read("test", video, audio, None, None))
        saved[recompute, frames] = sum(sizes.values())
        del x
    compact = 256 // F * M * D * 4
    assert saved["snippet", 256] - saved["snippet", 64] <= 2 * compact
    assert saved["none", 256] > 20 * saved["snippet", 256]


# ---------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("variant", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_are_as_exact_as_references(variant, dtype):
    """The whole model on whatever backends are here, against itself on the references, both against float64."""
    made, text = model(variant, dtype=dtype), words(2)
    video, audio = clip(18, 2, dtype=torch.float32)
    call = {"frames": [18, 9], "has_audio": [True, False]}
    with torch.no_grad():
        fused = made(video, audio, text, **call)
        with use_backend("reference"):
            plain = made(video, audio, text, **call)
            exact = made.double()(video.double(), audio.double(), text, **call)
    for what in ("latents", "logits"):
        a, b, c = (getattr(out, what)[:1] for out in (fused, plain, exact))
        assert_within_budget(a, b, c, what=what)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast(variant):
    """Losses stay float32; a stream may begin without autocast and go on with it. Backward is outside of it: what it
    recomputes must have the dtypes that it had all the same, or torch raises."""
    made, text = Mirasol(tiny(variant, recompute="snippet")).eval(), words(2)
    video, audio = clip(10, 2, dtype=torch.float32)
    stream = made.stream(window=2) if variant not in ("all", "all-last") else None
    snippet = video[:, :, :F], audio[:, : F * SAMPLES_PER_FRAME]
    if stream:
        stream.push(*snippet)
    with torch.autocast("cpu", torch.bfloat16):
        out = made(video, audio, text, labels=text, frames=[10, 5], has_audio=[True, False])
        if stream:
            assert stream.push(*snippet).isfinite().all() and len(stream.generate(text, 3)) == 2
    out.loss.backward()
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in out.losses.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in made.parameters())


# ----------------------------------------------------------------------------------------------------- learning


def test_the_latent_loss_does_not_collapse():
    """Pretraining as a whole: the latent loss falls, and x tells clips and snippets apart better than at first. (By
    the latent loss alone it would not: what cannot be predicted leaves x, and the reconstruction brings it back.)"""
    torch.manual_seed(0)
    made = Mirasol(tiny("current"))
    optimizer = torch.optim.AdamW(made.parameters(), 1e-3)
    video, audio = scenes()

    @torch.no_grad()
    def spread() -> float:
        """Deviation of x over clips and snippets, whose channels have unit variance within a token."""
        return made.eval().encode(video, audio).combined.flatten(0, 1).std(0).mean().item()

    spreads, losses = [spread()], []
    for _ in range(4):
        for _ in range(15):
            out = made.train()(video, audio)
            losses.append(out.losses["latent"].item())
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        spreads.append(spread())
    assert np.mean(losses[-5:]) < 0.2 * losses[0]
    assert min(spreads) > 0.1 * spreads[0] and spreads[-1] > 2 * spreads[0], spreads
