"""What a batch of clips is made of, checked and cut into snippets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirasol_model.snippets import frame_counts, sample_counts, split_audio, split_video

PerRow = Sequence[int] | Sequence[bool] | Tensor


class Clips(NamedTuple):
    """B clips of up to T snippets. Counts are host integers: what is real is known without asking a device."""

    video: Tensor | None  # (B, T, 3, F, H, W)
    audio: Tensor | None  # (B, T, S)
    frames: np.ndarray  # (B, T) real video frames in the time of each snippet, also where there is no video
    samples: np.ndarray  # (B, T) real samples, 0 where there is no audio

    @property
    def lengths(self) -> np.ndarray:
        """(B,) snippets of each clip."""
        return (self.frames > 0).sum(axis=1)

    def part(self, begin: int, end: int) -> Clips:
        """Snippets begin .. end-1."""
        video = None if self.video is None else self.video[:, begin:end]
        audio = None if self.audio is None else self.audio[:, begin:end]
        return Clips(video, audio, self.frames[:, begin:end], self.samples[:, begin:end])

    def take(self, snippets: np.ndarray, device: torch.device) -> Clips:
        """Some of the snippets, their pictures and sound on `device`: the others are not copied there."""

        def some(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[:, torch.from_numpy(snippets).to(x.device)].to(device)

        return Clips(some(self.video), some(self.audio), self.frames[:, snippets], self.samples[:, snippets])


def read_clips(
    op: str,
    video: Tensor | None,
    audio: Tensor | None,
    frames: int | PerRow | None,
    has_audio: PerRow | None,
    frames_per_snippet: int,
) -> Clips:
    """Check, and cut. Arguments and errors as `Mirasol.forward` says."""
    if video is None and audio is None:
        raise ValueError(f"{op}: video, audio: expected at least one of them, got None for both")
    for name, x in (("video", video), ("audio", audio)):
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor or None, got {type(x).__name__}")
    if video is not None and (video.ndim != 5 or video.shape[1] != 3 or 0 in video.shape):
        raise ValueError(f"{op}: video: expected (B, 3, frames, H, W), got {tuple(video.shape)}")
    if audio is not None and (audio.ndim != 2 or 0 in audio.shape):
        raise ValueError(f"{op}: audio: expected (B, samples), got {tuple(audio.shape)}")
    if video is not None and audio is not None and len(video) != len(audio):
        raise ValueError(f"{op}: audio: expected {len(video)} rows like video, got {len(audio)}")
    given = video if video is not None else audio
    assert given is not None
    rows = len(given)
    if frames is None and video is None:
        raise ValueError(
            f"{op}: frames: expected the number of video frames that the audio lasts, as there is no video"
        )
    real = [video.shape[2]] * rows if frames is None and video is not None else _per_row(f"{op}: frames", frames, rows)
    total = max(real) if video is None else video.shape[2]
    if min(real) < 1 or max(real) > total:
        raise ValueError(f"{op}: frames: expected 1 .. {total}, got {real}")
    heard = [audio is not None] * rows if has_audio is None else _per_row(f"{op}: has_audio", has_audio, rows)
    if any(heard) and audio is None:
        raise ValueError(f"{op}: has_audio: expected no row to have any, as audio is None, got {heard}")
    if video is None and not all(heard):
        raise ValueError(f"{op}: has_audio: expected every row to have some, as there is no video, got {heard}")

    snippets = -(-total // frames_per_snippet)
    frame_table = np.array([frame_counts(n, frames_per_snippet, snippets) for n in real])
    sample_table = np.zeros_like(frame_table)
    if audio is not None:
        samples = audio.shape[1]
        for b in np.flatnonzero(heard):
            sample_table[b] = sample_counts(samples, total, frames_per_snippet, real[b])
    return Clips(
        None if video is None else split_video(video, frames_per_snippet)[0],
        None if audio is None else split_audio(audio, total, frames_per_snippet)[0],
        frame_table,
        sample_table,
    )


def _per_row(name: str, values: int | PerRow | None, rows: int) -> list[int]:
    numbers = values.tolist() if isinstance(values, Tensor) else values
    numbers = [numbers] * rows if isinstance(numbers, int) else list(() if numbers is None else numbers)
    if len(numbers) != rows:
        raise ValueError(f"{name}: expected {rows}, one per row, got {len(numbers)}")
    if not all(isinstance(number, int | np.integer | np.bool_) for number in numbers):
        raise TypeError(f"{name}: expected integers, got {numbers}")
    return [int(number) for number in numbers]


def check_text(op: str, name: str, text: Tensor, rows: int | None, vocabulary: int) -> None:
    """(B, L) int64. The values are looked at where that costs no wait, on the CPU."""
    if not isinstance(text, Tensor) or text.dtype != torch.int64:
        got = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"{op}: {name}: expected an int64 tensor, got {got}")
    if text.ndim != 2 or text.shape[1] < 1 or (rows is not None and len(text) != rows):
        expected = "(B, L)" if rows is None else f"({rows}, L)"
        raise ValueError(f"{op}: {name}: expected {expected} with L at least 1, got {tuple(text.shape)}")
    hidden = name == "labels"  # where -100 says that a token does not matter
    given = text[text != -100] if hidden and text.device.type == "cpu" else text
    if given.device.type == "cpu" and given.numel():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= vocabulary:
            expected = f"{'-100 or ' if hidden else ''}tokens 0 .. {vocabulary - 1}"
            raise ValueError(f"{op}: {name}: expected {expected}, got {low} .. {high}")


def check_device(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Those that are tensors are on the model's device; what is none, others refuse."""
    for name, x in tensors.items():
        if isinstance(x, Tensor) and x.device != device:
            raise ValueError(f"{op}: {name}: expected a tensor on {device} like the model, got one on {x.device}")
