"""Cutting a clip into snippets: consecutive, non-overlapping, video and audio on one clock (the paper's
"chunks", arXiv 2311.05698).

Axes: B batch, N frames, S samples, T snippets, F frames per snippet. Counts are Python integers: they follow from
lengths the caller knows on the host, so no device is ever asked for a size.

A batch of clips of different lengths is padded to its longest clip of N frames. Audio (B, S) spans the same time as
the padded video; row b, with frames[b] real frames, is real in its first frames[b] * S // N samples and padding
after. The bounds of a snippet depend on N and S alone, hence a row is cut where it would be cut by itself, provided
that N and S grow at one rate; `frame_counts` and `sample_counts` tell how much of each of its snippets is real.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F


def to_unit_range(video: Tensor, dtype: torch.dtype) -> Tensor:
    """Pixels in [0, 1] of type `dtype`: uint8 is divided by 255, floating point taken as it is."""
    return video.to(dtype) / 255 if video.dtype == torch.uint8 else video.to(dtype)


def count_snippets(frames: int, frames_per_snippet: int) -> int:
    """T = ceil(frames / frames_per_snippet)."""
    return -(-frames // frames_per_snippet)


def frame_counts(frames: int, frames_per_snippet: int, snippets: int | None = None) -> list[int]:
    """Real frames in each snippet of a clip of `frames`, with zeros up to `snippets` where the batch is longer."""
    _check_lengths("frame_counts", frames, frames_per_snippet)
    total = count_snippets(frames, frames_per_snippet) if snippets is None else snippets
    return [min(max(frames - t * frames_per_snippet, 0), frames_per_snippet) for t in range(total)]


def sample_bounds(samples: int, frames: int, frames_per_snippet: int) -> list[tuple[int, int]]:
    """[begin, end) of the samples that fall in the time of each snippet's frames.

    Snippet t owns [t*F*S // frames, min((t+1)*F, frames)*S // frames): every sample has exactly one owner, and no
    snippet owns a sample that sounds after its last frame.
    """
    _check_lengths("sample_bounds", frames, frames_per_snippet)
    if samples < 0:
        raise ValueError(f"sample_bounds: samples: expected at least 0, got {samples}")
    cuts = [
        min(t * frames_per_snippet, frames) * samples // frames
        for t in range(count_snippets(frames, frames_per_snippet) + 1)
    ]
    return list(pairwise(cuts))


def sample_counts(samples: int, frames: int, frames_per_snippet: int, real_frames: int | None = None) -> list[int]:
    """Real samples in each snippet, for a row of which only the first `real_frames` frames are real."""
    bounds = sample_bounds(samples, frames, frames_per_snippet)
    if real_frames is None:
        real_frames = frames
    if not 0 <= real_frames <= frames:
        raise ValueError(f"sample_counts: real_frames: expected 0..{frames}, got {real_frames}")
    last = real_frames * samples // frames
    return [max(min(end, last) - begin, 0) for begin, end in bounds]


def split_video(video: Tensor, frames_per_snippet: int) -> tuple[Tensor, list[int]]:
    """video (B, 3, N, H, W), float in [0, 1] or uint8 -> snippets (B, T, 3, F, H, W), real frames of each.

    The last, short snippet is padded with zeros. The dtype stays: uint8 becomes float in the tokenizer, where only
    the pixels that a tube reads are converted. Where F divides N the result is a view.
    """
    if video.ndim != 5 or video.shape[1] != 3:
        raise ValueError(f"split_video: video: expected (B, 3, frames, H, W), got {tuple(video.shape)}")
    if not (video.is_floating_point() or video.dtype == torch.uint8):
        raise TypeError(f"split_video: video: expected floating point in [0, 1] or uint8, got {video.dtype}")
    counts = frame_counts(video.shape[2], frames_per_snippet)
    if counts[-1] < frames_per_snippet:
        video = F.pad(video, (0, 0, 0, 0, 0, frames_per_snippet - counts[-1]))
    return video.unflatten(2, (-1, frames_per_snippet)).movedim(2, 1), counts  # (B, T, 3, F, H, W)


def split_audio(audio: Tensor, frames: int, frames_per_snippet: int) -> tuple[Tensor, list[int]]:
    """audio (B, S), spanning the time of `frames` video frames -> snippets (B, T, Smax), real samples of each.

    Smax is the longest snippet; shorter ones are padded with zeros, which `LogMel` takes for absent, not for silence,
    when it is given the counts. For rows of different lengths see the head of this file and `sample_counts`.
    """
    if audio.ndim != 2:
        raise ValueError(f"split_audio: audio: expected (B, samples), got {tuple(audio.shape)}")
    if not audio.is_floating_point():
        raise TypeError(f"split_audio: audio: expected floating point in [-1, 1], got {audio.dtype}")
    bounds = sample_bounds(audio.shape[1], frames, frames_per_snippet)
    counts = [end - begin for begin, end in bounds]
    longest = max(counts)
    pieces = [F.pad(audio[:, begin:end], (0, longest - (end - begin))) for begin, end in bounds]
    return torch.stack(pieces, dim=1), counts  # (B, T, Smax)


def _check_lengths(op: str, frames: int, frames_per_snippet: int) -> None:
    if frames < 1:
        raise ValueError(f"{op}: frames: expected at least 1, got {frames}")
    if frames_per_snippet < 1:
        raise ValueError(f"{op}: frames_per_snippet: expected at least 1, got {frames_per_snippet}")
