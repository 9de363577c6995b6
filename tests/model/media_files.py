"""Video files written for tests. A frame carries its index as a 3 x 3 pattern of dark and light, and sound carries its
time as the onset of a tone, so that what comes back says whether it is what was asked for."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mirasol_model.media import Clip, read_clip

av = pytest.importorskip("av", reason="PyAV reads the files of this test")

RATE = 16_000  # samples a second, of every clip that is read back


def pattern(index: int, width: int, height: int) -> np.ndarray:
    """-> (height, width, 3) uint8; its central square holds the nine bits of index as 3 x 3 blocks."""
    side = min(width, height)
    bits = np.array([index >> k & 1 for k in range(9)]).reshape(3, 3)
    square = np.kron(bits, np.ones((-(-side // 3), -(-side // 3)), int))[:side, :side]
    picture = np.full((height, width), 128)
    top, left = (height - side) // 2, (width - side) // 2
    picture[top : top + side, left : left + side] = 16 + 224 * square
    return np.repeat(picture[..., None], 3, 2).astype(np.uint8)


def indices(clip: Clip) -> list[int]:
    """The index each frame of a clip carries."""
    size = clip.video.shape[-1]
    centres = [size // 6, size // 2, size - 1 - size // 6]
    bits = clip.video.mean(0)[:, centres][:, :, centres].flatten(1) > 0.5  # (frames, 9)
    return (bits * 2 ** torch.arange(9)).sum(1).tolist()


def write(
    path: Path,
    *,
    codec: str = "mpeg4",
    frames: int = 40,
    fps: Fraction | int = 25,
    width: int = 96,
    height: int = 72,
    pix_fmt: str = "yuv420p",
    times: list[int] | None = None,
    sound: dict | None = None,
    aspect: Fraction | None = None,
    options: dict | None = None,
    container_options: dict | None = None,
) -> Path:
    """times: of the frames, in milliseconds; else they come at `fps`. sound: see `write_sound`."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        video = audio = None
        if frames:
            video = container.add_stream(codec, rate=fps, options={"threads": "1", **(options or {})})
            video.width, video.height, video.pix_fmt = width, height, pix_fmt
            video.bit_rate = 400_000
            if aspect:
                video.sample_aspect_ratio = aspect
            video.codec_context.time_base = Fraction(1, 1000) if times else 1 / Fraction(fps)
        if sound:
            audio = container.add_stream(
                sound["codec"],
                rate=sound["rate"],
                layout=sound.get("layout", "mono"),
                options={"strict": "experimental"},
            )
        for index in range(frames):
            frame = av.VideoFrame.from_ndarray(pattern(index, width, height), format="rgb24").reformat(format=pix_fmt)
            frame.pts = times[index] if times else index
            frame.time_base = Fraction(1, 1000) if times else 1 / Fraction(fps)
            container.mux(video.encode(frame))
        if video:
            container.mux(video.encode(None))
        if audio:
            write_sound(container, audio, **sound)
    return path


def write_sound(container, stream, *, codec, rate, layout="mono", seconds=1.6, onset=0.5, starts=0.0, only=None):
    """A tone from `onset` on (seconds of the file's time); the stream itself spans [starts, starts + seconds)."""
    time = starts + np.arange(round(seconds * rate)) / rate
    wave = 0.5 * np.sin(2 * np.pi * 1000 * (time - onset)) * (time >= onset)
    resampler = av.AudioResampler(
        format=stream.codec_context.format, layout=layout, rate=rate, frame_size=stream.codec_context.frame_size or 1024
    )
    channels = av.AudioLayout(layout).nb_channels
    planes = np.zeros((channels, len(wave)), np.float32)
    planes[range(channels) if only is None else only] = wave
    for first in range(0, len(wave), 1000):
        piece = np.ascontiguousarray(planes[:, first : first + 1000])
        frame = av.AudioFrame.from_ndarray(piece, "fltp", layout)
        frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), round(starts * rate) + first
        for out in resampler.resample(frame):
            container.mux(stream.encode(out))
    for out in resampler.resample(None):
        container.mux(stream.encode(out))
    container.mux(stream.encode(None))


def onset(audio: torch.Tensor) -> float:
    """Seconds at which the tone begins."""
    return int((audio.abs() > 0.1).nonzero()[0]) / RATE


def read(path, frames=32, fps=None, size=48) -> Clip:
    return read_clip(path, frames=frames, fps=fps, size=size, sample_rate=RATE)


def check(clip: Clip, frames: int = 32, fps: float = 25, size: int = 48) -> None:
    assert clip.video.shape == (3, frames, size, size) and clip.video.dtype == torch.float32
    assert clip.video.is_contiguous() and clip.video.min() >= 0 and clip.video.max() <= 1
    assert clip.fps == pytest.approx(fps)
    assert indices(clip) == list(range(frames))
    if clip.audio is not None:
        assert clip.audio.shape == (round(frames / fps * RATE),) and clip.audio.dtype == torch.float32
        assert clip.audio.abs().max() <= 1
