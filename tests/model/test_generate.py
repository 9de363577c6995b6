"""Text: the cache changes nothing, sampling does what it says, many questions about one clip, and streams."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mirasol_model.generate import pick
from tests.model.clips import SAMPLES_PER_FRAME, clip, model, words
from tests.numerics import assert_close_fp64

F = 4
BOUNDED = {"latent": {"window": 3, "sink": 1}}


def uncached(made, encoded, prompt, steps):
    """Greedy without a cache: the whole text again for each token."""
    text = prompt
    for _ in range(steps):
        logits = made.text(text, made.text.remember(encoded.latents, encoded.age))
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    return text[:, prompt.shape[1] :]


def test_ages_count_by_their_ratio():
    """Keys turn by the logarithm of the age: from 1 to 4 is as far as from 32 to 128. What is past the end has none."""
    decoder = model().text
    h = torch.randn(1, 1, 4, 64, dtype=torch.float64).expand(1, 5, 4, 64)
    memory = decoder.remember(h, np.array([[128, 32, 4, 1, 0]]))
    for keys, _ in memory.layers:
        far, near = (keys.unflatten(2, (5, 4))[:, :, at] for at in (slice(0, 2), slice(2, 4)))  # (1, H, 2, 4, D)
        turned = [(pair[:, :, 0] * pair[:, :, 1]).sum(-1) for pair in (far, near)]
        assert_close_fp64(turned[0], turned[1])
        assert (turned[0] - keys.unflatten(2, (5, 4))[:, :, 3].square().sum(-1)).abs().max() > 1e-3
    assert memory.real.flatten().tolist() == [True] * 16 + [False] * 4


@pytest.mark.parametrize("variant", ["current", "ttm"])
def test_the_cache_changes_nothing(variant):
    made = model(variant)
    video, audio = clip(10, 3)
    encoded, prompt = made.encode(video, audio, frames=[10, 4, 7]), words(3)
    answer = made.answer(encoded, prompt, 12)
    expected = uncached(made, encoded, prompt, 12)
    for row, want in zip(answer, expected, strict=True):
        stop = (want == 1).nonzero()
        end = int(stop[0]) + 1 if len(stop) else 12
        assert torch.equal(row[:end], want[:end])
        assert (row[end:] == 0).all()
    assert torch.equal(made.generate(video, audio, prompt, 12, frames=[10, 4, 7]), answer)


def test_prompts_of_different_lengths_are_what_they_are_alone():
    made = model()
    encoded = made.encode(*clip(8, 3))
    prompt, lengths = words(3, 7), [7, 2, 4]
    together = made.answer(encoded, prompt, 9, prompt_lengths=lengths)
    for b, length in enumerate(lengths):
        mine = type(encoded)(*(field[b : b + 1] for field in encoded))
        alone = made.answer(mine, prompt[b : b + 1, :length], 9)[0]
        assert torch.equal(together[b, : len(alone)], alone)
        assert (together[b, len(alone) :] == 0).all()


def test_one_clip_many_questions():
    made = model()
    encoded, prompts = made.encode(*clip(8)), words(5)
    answers = made.answer(encoded, prompts, 4)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = made.answer(encoded, prompt[None], 4)[0]
        assert torch.equal(answer[: len(alone)], alone)


def test_an_answer_ends_with_eos():
    made = model()
    encoded, prompt = made.encode(*clip(8)), words(1)
    plain = uncached(made, encoded, prompt, 8)[0].tolist()
    end = next(i for i, token in enumerate(plain) if token not in plain[:i] and i > 0)
    made.text.config = replace(made.config.text, eos=plain[end], pad=0)
    both = type(encoded)(
        *(field.repeat(2, *(1,) * (field.ndim - 1)) for field in encoded[:2]), encoded.age.repeat(2, 0)
    )
    answer = made.answer(both, torch.cat([prompt, words(1)]), 8)
    assert answer[0, : end + 1].tolist() == plain[: end + 1]
    assert (answer[0, end + 1 :] == 0).all()


def test_tokens_come_one_by_one():
    """As they are in the answer; -1 where a longer prompt goes on, and after the end."""
    made = model()
    encoded = made.encode(*clip(8, 3))
    prompt, lengths = words(3, 7), [7, 2, 4]
    answer = made.answer(encoded, prompt, 9, prompt_lengths=lengths)
    tokens = torch.stack(list(made.answer_tokens(encoded, prompt, 9, prompt_lengths=lengths)), dim=1)
    for b, length in enumerate(lengths):
        begin = length - min(lengths)
        assert (tokens[b, :begin] == -1).all()
        said = tokens[b][tokens[b] >= 0]
        assert torch.equal(said, answer[b, : len(said)]) and (answer[b, len(said) :] == 0).all()
        assert torch.equal(tokens[b, begin : begin + len(said)], said)
    first = next(made.answer_tokens(encoded, prompt, 9, prompt_lengths=lengths))
    assert first.tolist() == [-1, answer[1, 0].item(), -1]
    with pytest.raises(ValueError, match="generate: max_new_tokens: expected at least 1, got 0"):
        made.answer_tokens(encoded, prompt, 0)

    stream = made.stream(window=2)
    for part in parts(*clip(8, 3), 8):
        stream.push(*part)
    asked = stream.generate(prompt, 5)
    assert torch.equal(torch.stack(list(stream.generate_tokens(prompt, 5)), dim=1).clamp(min=0), asked)


def test_train_mode_changes_no_answer():
    made = model(latent={"mask_ratio": 0.9})
    (video, audio), prompt = clip(8), words(1)
    encoded, answer = made.encode(video, audio), made.generate(video, audio, prompt, 4)
    made.train()
    assert torch.equal(made.encode(video, audio).latents, encoded.latents)
    assert torch.equal(made.generate(video, audio, prompt, 4), answer)
    assert not torch.equal(made(video, audio).latents, encoded.latents)


def test_stop_tokens_end_an_answer():
    made = model()
    encoded, prompt = made.encode(*clip(8)), words(1)
    plain = made.answer(encoded, prompt, 8)[0].tolist()
    end = next(i for i, token in enumerate(plain) if token not in plain[:i] and i > 0)
    assert made.answer(encoded, prompt, 8, stop=[plain[end], 319])[0].tolist() == plain[: end + 1]


def test_sampling():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).log_softmax(-1)
    generator = torch.Generator().manual_seed(0)

    def drawn(temperature=1.0, top_k=None, top_p=None, times=4000):
        every = pick(logits.expand(times, -1), temperature, top_k, top_p, generator)
        return torch.bincount(every, minlength=4) / times

    share = logits.softmax(-1)[0]  # 0.03 0.09 0.24 0.64
    assert torch.equal(drawn(0.0), torch.tensor([0.0, 0.0, 0.0, 1.0]))
    error = 5 * (share * (1 - share) / 4000).sqrt()
    assert ((drawn() - share).abs() < error).all()
    assert (drawn(top_k=2)[:2] == 0).all() and drawn(top_k=2)[2] > 0
    assert (drawn(top_p=0.7)[:2] == 0).all() and drawn(top_p=0.7)[2] > 0
    assert drawn(top_p=0.6)[3] == 1 and drawn(top_p=1.0)[0] > 0
    assert drawn(temperature=10.0)[0] > 0.15


def test_sampling_is_reproducible_and_stays_in_the_vocabulary():
    made = model()
    encoded, prompt = made.encode(*clip(8)), words(1)
    kwargs = {"temperature": 1.0, "top_k": 50, "top_p": 0.9}
    first, second = (
        made.answer(encoded, prompt, 16, generator=torch.Generator().manual_seed(1), **kwargs) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert first.min() >= 0 and first.max() < made.config.text.vocabulary


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"prompt": words(3)}, ValueError, "generate: prompt: expected 2 rows like the clips, got 3"),
        ({"prompt": words(2).int()}, TypeError, "generate: prompt: expected an int64 tensor, got torch.int32"),
        ({"prompt": words(2, 0)}, ValueError, r"generate: prompt: expected \(B, L\) with L at least 1, got \(2, 0\)"),
        ({"max_new_tokens": 0}, ValueError, "generate: max_new_tokens: expected at least 1, got 0"),
        ({"temperature": -1.0}, ValueError, "generate: temperature: expected at least 0, got -1.0"),
        ({"top_k": 0}, ValueError, "generate: top_k: expected None or at least 1, got 0"),
        ({"top_p": 0.0}, ValueError, r"generate: top_p: expected None or a share in \(0, 1\], got 0.0"),
        ({"prompt_lengths": [6]}, ValueError, r"generate: prompt_lengths: expected \(2,\) of 1 .. 6, got \[6\]"),
        ({"stop": [320]}, ValueError, r"generate: stop: expected tokens 0 .. 319, got \[320\]"),
        ({"prompt_lengths": [0, 6]}, ValueError, r"prompt_lengths: expected \(2,\) of 1 .. 6, got \[0, 6\]"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    made = model(dtype=torch.float32)
    encoded = made.encode(*clip(8, 2, dtype=torch.float32))
    with pytest.raises(error, match=message):
        made.answer(encoded, **{"prompt": words(2), **change})


def test_one_clip_and_no_prompt_is_an_error():
    made = model(dtype=torch.float32)
    with pytest.raises(ValueError, match="generate: prompt: expected at least 1 row, got 0"):
        made.answer(made.encode(*clip(8, dtype=torch.float32)), words(0))


# ------------------------------------------------------------------------------------------------------ streams


def parts(video, audio, frames):
    for begin in range(0, frames, F):
        end = min(begin + F, frames)
        yield video[:, :, begin:end], audio[:, begin * SAMPLES_PER_FRAME : end * SAMPLES_PER_FRAME]


@pytest.mark.parametrize("variant", ["current", "all-window", "ttm", "perceiver", "token_learner"])
def test_a_stream_is_the_clip(variant):
    """The last snippet is a short one."""
    made, frames = model(variant, **BOUNDED), 30
    video, audio = clip(frames, 2)
    encoded = made.encode(video, audio)
    stream = made.stream()
    h = torch.stack([stream.push(*part) for part in parts(video, audio, frames)], dim=1)
    assert_close_fp64(h, encoded.latents)
    kept = [0, 5, 6, 7]  # the sink, and the window
    asked = type(encoded)(*(field[:, kept] for field in encoded))
    prompt = words(2)
    assert torch.equal(stream.generate(prompt, 6), made.answer(asked, prompt, 6))


@pytest.mark.parametrize("variant", ["current", "ttm"])
def test_a_short_stream_is_exact_without_a_window_in_the_config(variant):
    made, frames = model(variant), 20
    video, audio = clip(frames, 1)
    stream = made.stream(window=5)
    for part in parts(video, audio, frames):
        stream.push(*part)
    prompt = words(1)
    assert torch.equal(stream.generate(prompt, 6), made.generate(video, audio, prompt, 6))


@pytest.mark.parametrize("variant", ["all-window", "ttm", "perceiver"])
def test_sound_or_picture_may_drop_out(variant):
    """Where one is missing in all snippets, that is known offline too."""
    made = model(variant, **BOUNDED)
    video, audio = clip(12)
    silent, dark = made.stream(), made.stream()
    seen = torch.stack([silent.push(v) for v, _ in parts(video, audio, 12)], dim=1)
    heard = torch.stack([dark.push(None, a) for _, a in parts(video, audio, 12)], dim=1)
    assert_close_fp64(seen, made.encode(video, None).latents)
    assert_close_fp64(heard, made.encode(None, audio, frames=12).latents)
    mixed = made.stream()
    for i, (v, a) in enumerate(parts(video, audio, 12)):
        h = mixed.push(None if i == 1 else v, None if i == 2 else a)
        assert h.isfinite().all()


def test_what_a_stream_keeps_does_not_grow():
    def kept(stream) -> int:
        tensors = [stream._combiner] if isinstance(stream._combiner, torch.Tensor) else []
        if hasattr(stream._combiner, "layers"):
            tensors += [x for piece in stream._combiner.layers for pair in piece for x in pair]
        tensors += [x for cache in stream._caches for x in (cache.k, cache.v)]
        tensors += [*stream._first, *stream._last]
        return sum(x.untyped_storage().nbytes() for x in tensors)

    for variant in ("current", "all-window", "ttm"):
        made = model(variant, dtype=torch.float32, **BOUNDED)
        video, audio = clip(F, dtype=torch.float32)
        stream, sizes = made.stream(), []
        for _ in range(20):
            stream.push(video, audio)
            sizes.append(kept(stream))
        assert len(set(sizes[5:])) == 1 and stream.seen == 20
        stream.reset()
        assert stream.seen == 0 and stream._caches is None


@pytest.mark.parametrize("variant", ["current", "all-window", "ttm"])
def test_a_stream_is_saved_forked_and_batched(variant, tmp_path):
    """In the middle of a clip, one row of which has no sound in its second snippet; the rest is what it would be."""
    from safetensors.torch import load_file, save_file

    made, frames = model(variant, **BOUNDED), 24
    video, audio = clip(frames, 3)
    pieces = list(parts(video, audio, frames))
    whole, early = made.stream(), made.stream()
    expected = [whole.push(*part) for part in pieces]
    for part in pieces[:4]:
        early.push(*part)
    save_file(early.state_dict(), tmp_path / "state.safetensors")
    restored = made.stream()
    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))
    fork, beams = early.fork(), early.select(torch.tensor([2, 0, 2]))
    early.push(video[:, :, :F] + 1, None)  # goes another way, and changes no other
    apart = [restored.select([row]) for row in range(3)]
    together = type(early).batch(apart)
    for i in (4, 5):
        for stream in (restored, fork, together):
            assert_close_fp64(stream.push(*pieces[i]), expected[i])
        assert_close_fp64(beams.push(*(x[[2, 0, 2]] for x in pieces[i])), expected[i][[2, 0, 2]])
    prompt = words(3)
    answers = [stream.generate(prompt, 4) for stream in (whole, restored, fork, together)]
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_what_a_restored_stream_refuses():
    made = model(dtype=torch.float32, **BOUNDED)
    stream, other = made.stream(), made.stream(window=5)
    with pytest.raises(ValueError, match=r"stream.select: rows: expected some of the 0 rows of this stream, got \[0\]"):
        stream.select([0])
    with pytest.raises(ValueError, match=r"stream.batch: streams: expected one model, and equal window"):
        type(stream).batch([stream, other])
    with pytest.raises(ValueError, match=r"stream.load_state_dict: state: expected window 3 and sink 1, got 5 and 1"):
        stream.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match=r"stream.load_state_dict: state: expected a state_dict of a stream"):
        stream.load_state_dict({})
    stream.load_state_dict(made.stream().state_dict())
    assert stream.seen == 0


@pytest.mark.parametrize("variant", ["current", "all-window", "ttm"])
def test_a_state_that_is_not_of_this_stream_changes_nothing(variant):
    made = model(variant, dtype=torch.float32, **BOUNDED)
    stream, (video, audio) = made.stream(), clip(12, 2, dtype=torch.float32)
    for part in parts(video, audio, 12):
        stream.push(*part)
    good, answer = stream.state_dict(), stream.generate(words(2) * 0 + 5, 4)
    for other, message in (
        ("perceiver", r"combiner.kind '\w+' \(not 'perceiver'\)"),
        ("current-last", r"combiner.order 'queries' \(not 'last'\)"),
        (variant, r"latent.layers 2 \(not 3\)"),
    ):
        deeper = {"layers": 3} if other == variant else {}
        state = model(other, dtype=torch.float32, latent=BOUNDED["latent"] | deeper).stream().state_dict()
        with pytest.raises(ValueError, match=rf"stream.load_state_dict: state: is of another model: .*{message}"):
            stream.load_state_dict(state)
    for name in good:
        with pytest.raises(ValueError, match=r"stream.load_state_dict: state: "):
            stream.load_state_dict({other: x for other, x in good.items() if other != name})
        if name not in ("model", "past.seen"):
            with pytest.raises(ValueError, match=r"stream.load_state_dict: state: "):
                stream.load_state_dict(good | {name: torch.cat([good[name], good[name]])})
    with pytest.raises(ValueError, match=r"expected the \d+ tensors of 3 snippets, got \d+, different in more"):
        stream.load_state_dict(good | {"more": torch.zeros(1)})
    assert torch.equal(stream.generate(words(2) * 0 + 5, 4), answer)


def test_what_a_stream_refuses():
    made = model(dtype=torch.float32)
    video, audio = clip(8, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"stream: window: expected at least 1 snippet, .*, got None"):
        made.stream()
    with pytest.raises(ValueError, match="stream: sink: expected at least 0, got -1"):
        made.stream(window=2, sink=-1)
    with pytest.raises(ValueError, match=r"stream: combiner.window: expected a number with context 'all'"):
        model("all").stream(window=2)
    stream = made.stream(window=2)
    with pytest.raises(ValueError, match=r"stream.generate: expected a snippet to be pushed first, got none"):
        stream.generate(words(1))
    with pytest.raises(ValueError, match=r"stream.push: video: expected at most 4 frames, got 8"):
        stream.push(video, audio)
    with pytest.raises(ValueError, match=r"stream.push: video, audio: expected at least one of them"):
        stream.push(None)
    stream.push(video[:, :, :4])
    with pytest.raises(ValueError, match=r"stream.push: video, audio: expected 1 rows, got 2"):
        stream.push(video[:, :, :4].expand(2, -1, -1, -1, -1))
