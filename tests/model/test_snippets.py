"""Snippets: every frame and every sample has one owner, and nothing of a snippet comes from after it."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mirasol_model.audio import LogMel
from mirasol_model.encoders import AudioTokenizer
from mirasol_model.snippets import (
    count_snippets,
    frame_counts,
    sample_bounds,
    sample_counts,
    split_audio,
    split_video,
    to_unit_range,
)

frames = st.integers(1, 70)
per_snippet = st.integers(1, 20)


@given(frames, per_snippet)
@settings(max_examples=50)
def test_frames_are_cut_in_order_and_the_last_snippet_padded(n, f):
    video = torch.rand(2, 3, n, 2, 3)
    snippets, counts = split_video(video, f)
    assert snippets.shape == (2, count_snippets(n, f), 3, f, 2, 3)
    assert sum(counts) == n and all(count == f for count in counts[:-1]) and 1 <= counts[-1] <= f
    joined = snippets.movedim(1, 2).flatten(2, 3)
    assert torch.equal(joined[:, :, :n], video)
    assert not joined[:, :, n:].any()


def test_whole_snippets_are_a_view_and_bytes_stay_bytes():
    video = torch.randint(0, 256, (1, 3, 8, 2, 2), dtype=torch.uint8)
    snippets, _ = split_video(video, 4)
    assert snippets.dtype == torch.uint8 and snippets.data_ptr() == video.data_ptr()
    assert torch.equal(to_unit_range(video, torch.float32), video.float() / 255)
    assert torch.equal(to_unit_range(video.float(), torch.float64), video.double())


@given(st.integers(0, 5000), frames, per_snippet)
@example(samples=8000, frames_=100, f=7)  # 80 samples a frame
@example(samples=3, frames_=64, f=4)  # more snippets than samples
@settings(max_examples=200)
def test_every_sample_has_one_owner_in_time(samples, frames_, f):
    bounds = sample_bounds(samples, frames_, f)
    assert [s for begin, end in bounds for s in range(begin, end)] == list(range(samples))
    for t, (begin, end) in enumerate(bounds):
        assert begin == t * f * samples // frames_
        assert end == min((t + 1) * f, frames_) * samples // frames_


@given(st.integers(0, 3000), frames, per_snippet)
@settings(max_examples=50)
def test_audio_is_contiguous(samples, n, f):
    audio = torch.rand(2, samples) + 1
    snippets, counts = split_audio(audio, n, f)
    assert snippets.shape == (2, count_snippets(n, f), max(counts))
    joined = torch.cat([snippets[:, t, :count] for t, count in enumerate(counts)], dim=1)
    assert torch.equal(joined, audio)
    assert all(not snippets[:, t, count:].any() for t, count in enumerate(counts))


@given(st.integers(1, 40), st.integers(0, 60), st.integers(1, 12), st.integers(1, 300))
@settings(max_examples=100)
def test_a_padded_row_is_cut_like_the_clip_alone(n, padding, f, rate):
    """`rate` samples a frame: a clip of n frames in a batch padded to n + padding of them."""
    total = n + padding
    counts = sample_counts(total * rate, total, f, real_frames=n)
    alone = sample_counts(n * rate, n, f)
    assert counts == alone + [0] * (len(counts) - len(alone))
    assert frame_counts(n, f, snippets=len(counts)) == frame_counts(n, f) + [0] * (len(counts) - len(alone))


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 2000), st.data())
@settings(max_examples=25)
def test_sound_after_time_s_leaves_the_snippets_before_it_alone(n, f, rate, data):
    """Bit-identical down to the spectrogram and the patches: not even the mean of the waveform may look ahead."""
    samples = n * rate
    s = data.draw(st.integers(0, samples - 1))
    audio = torch.rand(1, samples) * 2 - 1
    other = audio.clone()
    other[:, s:] = torch.rand(1, samples - s)
    log_mel, tokenizer = LogMel(), AudioTokenizer(8)

    def tokens(audio):
        snippets, counts = split_audio(audio, n, f)
        return tokenizer(log_mel(snippets[0], counts)), counts

    (before, counts), (after, _) = tokens(audio), tokens(other)
    end = 0
    for t, count in enumerate(counts):
        end += count
        if end <= s:
            assert torch.equal(before[t], after[t])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split_video(torch.rand(3, 4, 2, 2), 4), ValueError, r"split_video: video: expected \(B, 3, frames"),
        (lambda: split_video(torch.rand(1, 4, 4, 2, 2), 4), ValueError, r"got \(1, 4, 4, 2, 2\)"),
        (lambda: split_video(torch.zeros(1, 3, 4, 2, 2, dtype=torch.int64), 4), TypeError, "got torch.int64"),
        (lambda: split_video(torch.rand(1, 3, 0, 2, 2), 4), ValueError, "frames: expected at least 1, got 0"),
        (lambda: split_video(torch.rand(1, 3, 4, 2, 2), 0), ValueError, "frames_per_snippet: expected at least 1"),
        (lambda: split_audio(torch.rand(9), 4, 2), ValueError, r"split_audio: audio: expected \(B, samples\)"),
        (lambda: split_audio(torch.zeros(1, 9, dtype=torch.int16), 4, 2), TypeError, "got torch.int16"),
        (lambda: split_audio(torch.rand(1, 9), 0, 2), ValueError, "sample_bounds: frames: expected at least 1, got 0"),
        (lambda: sample_bounds(-1, 4, 2), ValueError, "samples: expected at least 0, got -1"),
        (lambda: sample_counts(9, 4, 2, real_frames=5), ValueError, r"real_frames: expected 0\.\.4, got 5"),
        (lambda: frame_counts(-1, 2), ValueError, "frame_counts: frames: expected at least"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
