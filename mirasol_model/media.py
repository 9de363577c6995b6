"""Read a clip from any file that PyAV (FFmpeg) decodes: frames at a constant rate, and the sound of the same time."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

# Time stamps of sound are rounded (Matroska: to 1 ms), so sound is laid down gapless, by counting samples, until they
# disagree with the count by this many seconds: then something is missing or a clock drifted, and the time stamp wins.
RESYNC = Fraction(1, 20)


class MediaError(ValueError):
    """A file that gives no such clip. The message names the file and the reason."""


class Clip(NamedTuple):
    video: torch.Tensor  # (3, frames, size, size) float32 in [0, 1], or uint8, RGB
    audio: torch.Tensor | None  # (samples,) float32 in [-1, 1], mono, samples = round(frames / fps * sample_rate)
    fps: float  # frames per second, constant


def read_clip(
    path: str | os.PathLike,
    *,
    frames: int,
    least: int | None = None,
    fps: float | None = None,
    size: int,
    sample_rate: int,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """The first `frames` frames of a video file, and the sound of exactly their time.

    frames: how many; of a shorter file all, if it has at least `least` (by default it must have all of them).
    fps: frames per second; frame i is what a player shows i/fps seconds after the first one (the nearest earlier frame
    of the file). None takes every frame of the file in the order shown, at the file's own rate; where that puts one
    more than a frame off its time (variable frame rate), at the mean rate of these frames.
    size: side of the square in pixels; the centre of the upright picture is cut out and resized.
    sample_rate: samples per second of the sound, mixed to mono (the mean of its channels).
    dtype: of the picture, torch.float32 in [0, 1], or torch.uint8, a quarter of the memory.

    The sound spans [time of the first frame, + frames/fps). Where the file is silent inside that span (its sound starts
    later, ends earlier, or lost packets) the samples are zero; with no sound in it at all, `audio` is None: the model
    masks what is missing. Damaged packets are skipped, as long as enough frames remain.

    Raises FileNotFoundError, IsADirectoryError, PermissionError from the file system, and MediaError (a ValueError)
    for what is not a video, cannot be decoded, or has fewer frames (frames are never repeated to fill up a clip).
    Reads no further than it needs and holds no more than the clip.
    """
    least = frames if least is None else least
    for name, value in (("frames", frames), ("least", least), ("size", size), ("sample_rate", sample_rate)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"read_clip: {name}: expected a positive int, got {value!r}")
    if least > frames:
        raise ValueError(f"read_clip: least: expected at most frames {frames}, got {least}")
    if fps is not None and not 0 < fps < float("inf"):
        raise ValueError(f"read_clip: fps: expected a positive number or None, got {fps!r}")
    if dtype not in (torch.float32, torch.uint8):
        raise ValueError(f"read_clip: dtype: expected torch.float32 or torch.uint8, got {dtype!r}")
    name = os.fsdecode(path)
    status = os.stat(path)
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise MediaError(f"{name}: the file is empty")
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISDIR(status.st_mode):
        raise MediaError(f"{name}: not a regular file (a clip is read twice, picture and sound)")

    # A file object, not a name: FFmpeg takes "a:b.mp4" for a protocol, and "%" or bytes that are not UTF-8 for worse.
    with Path(os.fsdecode(path)).open("rb") as file:
        with _opened(file, name) as container:
            stream = _stream(container, "video", name)
            if stream is None:
                has = "only sound" if container.streams.audio else "and no sound; is it damaged?"
                raise MediaError(f"{name}: no video in this file, {has}")
            wanted = None if fps is None else Fraction(fps)
            video, start, rate = _read_video(container, stream, name, frames, least, wanted, size)
        with _opened(file, name) as container:
            stream = _stream(container, "audio", name)
            audio = stream and _read_audio(container, stream, start, start + video.shape[1] / rate, sample_rate)
    return Clip(video if dtype == torch.uint8 else video.float().div_(255), audio, float(rate))


@contextmanager
def _opened(file: Any, name: str) -> Iterator[Any]:
    """The file as a PyAV container; whatever FFmpeg says while it is open becomes one error that names the file."""
    try:
        import av
    except ImportError as error:
        raise ImportError("reading video needs PyAV: pip install 'mirasol-kernels[model]'") from error
    file.seek(0)
    try:
        # No protocols: a playlist in disguise must not open other files or the network.
        with av.open(file, container_options={"protocol_whitelist": "none"}, metadata_errors="replace") as container:
            if container.format.name == "tty":  # FFmpeg would play a .txt as a terminal session
                raise MediaError(f"{name}: this is text, not video")
            yield container
    except av.FFmpegError as error:
        raise MediaError(f"{name}: cannot be read as video: {error.strerror}") from error


def _stream(container: Any, kind: str, name: str) -> Any | None:
    """The best stream of this kind, or None. The cover picture of a sound file is no video."""
    from av.stream import Disposition

    stream = container.streams.best(kind)
    if stream is None:  # FFmpeg passes over what it has no decoder for, but the user should hear of it
        stream = next(iter(getattr(container.streams, kind)), None)
    if stream is None or stream.disposition & Disposition.attached_pic:
        return None
    if stream.codec_context is None:
        raise MediaError(f"{name}: its {kind} cannot be decoded: this PyAV has no decoder for its codec")
    return stream


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of a stream as they are shown. Damaged packets are passed over; a damaged container ends the stream."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.FFmpegError, IndexError):  # IndexError: PyAV's, of a stream that damage made up
            return
        if packet.is_corrupt:  # cut off by the end of the file: it would decode to a frame that never was
            continue
        try:
            yield from packet.decode()
        except av.FFmpegError:
            continue


def _read_video(
    container: Any, stream: Any, name: str, count: int, least: int, fps: Fraction | None, size: int
) -> tuple[torch.Tensor, Fraction, Fraction]:
    """-> video (3, least .. count, size, size) uint8, time of its first frame in seconds, frames per second."""
    stream.thread_type = "AUTO"
    nominal = Fraction(stream.average_rate or stream.guessed_rate or 25)
    # Two time stamps, each rounded to the clock of the container, may disagree by one tick about the same moment. A
    # coarser clock than a millisecond (AVI: one tick per frame) is not rounded but exact.
    tick = stream.time_base if stream.time_base <= Fraction(1, 1000) else Fraction(0)
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    pictures: list[np.ndarray] = []  # (size, size, 3) each
    times: list[Fraction] = []  # of the frames decoded so far
    held = None  # the frame on show
    for frame in _decoded(container, stream):
        time = None if frame.pts is None else frame.pts * frame.time_base
        if times and (time is None or time <= times[-1]):
            time = times[-1] + 1 / nominal
        times.append(Fraction(time or 0))
        if held is not None:
            _show(pictures, held, until=times[-1], start=times[0], tick=tick, fps=fps, count=count)
        if len(pictures) == count:
            break
        held = _Shown(frame, aspect, size)
        end = times[-1] + (frame.duration * frame.time_base if frame.duration else 1 / nominal)
    else:
        if held is not None:
            _show(pictures, held, until=end, start=times[0], tick=tick, fps=fps, count=count)
            times.append(end)
    if len(pictures) < least:
        at = f" at {float(fps):g} frames per second" if fps else ""
        have = f"only {len(pictures)} frames{at}" if pictures else "no frame that can be decoded"
        raise MediaError(f"{name}: {have}, expected {least}")
    count = len(pictures)

    if fps is None:
        steady = all(abs(times[i] - times[0] - i / nominal) <= 1 / nominal for i in range(count))
        fps = nominal if steady else count / (times[count] - times[0])
        if fps < Fraction(1, 100):  # damaged, and as long a sound would fill the memory
            raise MediaError(f"{name}: its time stamps spread {count} frames over {float(count / fps):,.0f} seconds")
    video = torch.from_numpy(np.stack(pictures)).permute(3, 0, 1, 2)  # from (count, size, size, 3)
    return video.contiguous(), times[0], fps


class _Shown:
    """A frame on show; converted to a square picture only if a moment of the clip falls on it."""

    def __init__(self, frame: Any, aspect: Fraction, size: int):
        self.frame, self.aspect, self.size = frame, aspect, size
        self.picture: np.ndarray | None = None

    def square(self) -> np.ndarray:  # (size, size, 3) uint8
        if self.picture is None:
            frame, size = self.frame, self.size
            ratio = frame.width * self.aspect / frame.height  # of the picture as it is to be seen
            wide, high = (round(size * ratio), size) if ratio >= 1 else (size, round(size / ratio))
            rgb = frame.reformat(wide, high, "rgb24", interpolation="BILINEAR").to_ndarray()  # (high, wide, 3)
            top, left = (high - size) // 2, (wide - size) // 2
            quarters = round(frame.rotation / 90)  # phones store upright video lying down
            self.picture = np.rot90(rgb[top : top + size, left : left + size], quarters).copy()
            self.frame = None
        return self.picture


def _show(
    pictures: list[np.ndarray],
    held: _Shown,
    *,
    until: Fraction,
    start: Fraction,
    tick: Fraction,
    fps: Fraction | None,
    count: int,
) -> None:
    """Append the held frame once for each moment of the clip before `until`; once in all when every frame counts."""
    if fps is None:
        pictures.append(held.square())
        return
    while len(pictures) < count and start + len(pictures) / fps + tick < until:
        pictures.append(held.square())


def _read_audio(container: Any, stream: Any, start: Fraction, stop: Fraction, rate: int) -> torch.Tensor | None:
    """-> the sound in [start, stop) seconds, (samples,) mono at `rate`; None when the file has none there."""
    import av

    samples = round((stop - start) * rate)
    sound = np.zeros(samples, np.float32)
    heard = False
    resampler, form, position = None, None, 0  # position: where in `sound` the next resampled sample belongs
    expected = start  # when the next frame begins if nothing is missing

    def lay(chunks: list[Any]) -> None:
        nonlocal position, heard
        for chunk in chunks:
            # FFmpeg's own mix of float channels adds them up, to twice full scale and more.
            piece = chunk.to_ndarray().mean(0)  # (channels, samples) -> (samples,)
            low, high = max(-position, 0), min(samples - position, len(piece))
            if low < high:
                sound[position + low : position + high] = piece[low:high]
                heard = True
            position += len(piece)

    for frame in _decoded(container, stream):
        time = expected if frame.pts is None else frame.pts * frame.time_base
        if time > stop + RESYNC:
            break
        if resampler is None or abs(time - expected) > RESYNC or form != (frame.format.name, frame.layout, frame.rate):
            if resampler is not None:
                lay(resampler.resample(None))
            resampler = av.AudioResampler(format="fltp", rate=rate)
            form = (frame.format.name, frame.layout, frame.rate)
            position, expected = round((time - start) * rate), time
        expected += Fraction(frame.samples, frame.rate)
        lay(resampler.resample(frame))
    if resampler is not None:
        lay(resampler.resample(None))
    return torch.from_numpy(sound.clip(-1, 1)) if heard else None
