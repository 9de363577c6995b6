"""Files of every kind, written by `media_files` and read back."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from mirasol_model.media import MediaError, read_clip
from tests.model.media_files import RATE, av, check, indices, onset, pattern, read, write, write_sound

SAMPLE = Path(__file__).parents[2] / "examples" / "sample.mp4"


AAC = {"codec": "aac", "rate": 48_000, "layout": "stereo"}
KINDS = {  # name of the file, how it is written, within how many seconds the onset is known
    "mp4-h264-aac": ("a.mp4", {"codec": "libx264", "sound": AAC}, 0.002),
    "mp4-bframes": ("a.mp4", {"codec": "libx264", "options": {"bf": "3"}, "sound": AAC}, 0.002),
    "mp4-mpeg4-aac": ("a.mp4", {"sound": AAC}, 0.002),
    "mkv-hevc-8kHz-mono": (
        "a.mkv",
        {
            "codec": "libx265",
            "options": {"x265-params": "log-level=none"},
            "sound": {"codec": "pcm_s16le", "rate": 8000},
        },
        0.002,
    ),
    "mov-pcm-float": (
        "a.mov",
        {"codec": "mjpeg", "pix_fmt": "yuvj420p", "sound": {"codec": "pcm_f32le", "rate": 44_100}},
        0.002,
    ),
    "webm-vp8-vorbis": ("a.webm", {"codec": "libvpx", "sound": {**AAC, "codec": "vorbis"}}, 0.01),
    "webm-vp9-opus": (
        "a.webm",
        {
            "codec": "libvpx-vp9",
            "options": {"deadline": "realtime", "cpu-used": "8"},
            "sound": {**AAC, "codec": "libopus"},
        },
        0.002,
    ),
    "avi-5.1-ac3": ("a.avi", {"sound": {"codec": "ac3", "rate": 48_000, "layout": "5.1"}}, 0.01),
    "avi-u8": ("a.avi", {"sound": {"codec": "pcm_u8", "rate": 8000}}, 0.002),
    "ts": ("a.ts", {"codec": "mpeg2video", "sound": {**AAC, "codec": "mp2"}}, 0.002),
    "gray-ffv1": ("a.mkv", {"codec": "ffv1", "pix_fmt": "gray"}, None),
    "ten-bit": ("a.mkv", {"codec": "ffv1", "pix_fmt": "yuv422p10le"}, None),
    "alpha": ("a.mov", {"codec": "png", "pix_fmt": "rgba"}, None),
    "odd-sizes": ("a.mkv", {"codec": "ffv1", "width": 101, "height": 57}, None),
    "tall": ("a.mkv", {"codec": "ffv1", "width": 33, "height": 131}, None),
    "tiny-picture": ("a.mkv", {"codec": "ffv1", "width": 6, "height": 5}, None),
    "ntsc": ("a.mp4", {"fps": Fraction(30_000, 1001), "sound": AAC}, 0.002),
    "60-fps-matroska": ("a.mkv", {"fps": 60, "frames": 100, "sound": AAC}, 0.002),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind, tmp_path):
    name, how, within = KINDS[kind]
    clip = read(write(tmp_path / name, **how))
    check(clip, fps=float(how.get("fps", 25)))
    assert (clip.audio is None) == (within is None)
    if within is not None:
        assert onset(clip.audio) == pytest.approx(0.5, abs=within)


def test_avi_without_sound(tmp_path):
    clip = read(write(tmp_path / "a.avi"))
    check(clip)
    assert clip.audio is None


def test_sample_clip():
    clip = read_clip(SAMPLE, frames=512, size=112, sample_rate=RATE)
    assert SAMPLE.stat().st_size < 2e6
    assert clip.video.shape == (3, 512, 112, 112) and clip.fps == 25
    assert clip.audio is not None and clip.audio.shape == (512 * RATE // 25,) and clip.audio.std() > 0.01
    pictures = (clip.video.transpose(0, 1) * 255).round().byte().flatten(1).numpy()
    assert len({picture.tobytes() for picture in pictures}) == 512


def test_at_its_own_size_the_picture_is_the_source(tmp_path):
    for side in (64, 57):
        clip = read(write(tmp_path / "a.mkv", codec="ffv1", pix_fmt="bgr0", width=side, height=side), size=side)
        expected = np.stack([pattern(i, side, side) for i in range(32)])
        assert torch.equal((clip.video * 255).round().byte(), torch.from_numpy(expected).permute(3, 0, 1, 2))


def test_pixels_that_are_not_square(tmp_path):
    """96 x 96 pixels, each twice as wide as high, show a picture 192 x 96: its central square is 48 pixels wide."""
    path = write(tmp_path / "a.mp4", codec="libx264", width=96, height=96, aspect=Fraction(2), options={"crf": "10"})
    first = read(path, size=96).video[:, 1].mean(0)  # index 1: light in columns 0 to 31, rows 0 to 31
    assert first[4:28, 4:12].min() > 0.8 and first[4:28, 20:].max() < 0.2 and first[36:].max() < 0.2


def test_rotation(tmp_path):
    path = write(tmp_path / "a.mp4", codec="libx264", width=96, height=72, options={"crf": "10"})
    upright = read(path).video
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40  # the matrix of the track header: 90 degrees clockwise
    data[at : at + 36] = np.array([0, 1 << 16, 0, -1 << 16, 0, 0, 72 << 16, 0, 1 << 30], ">i4").tobytes()
    (tmp_path / "phone.mp4").write_bytes(data)
    turned = read(tmp_path / "phone.mp4").video
    assert torch.equal(turned, upright.rot90(-1, (2, 3)))


# Time


def test_resampled_in_time(tmp_path):
    path = write(tmp_path / "a.mkv", sound=AAC)
    clip = read(path, frames=12, fps=10)
    assert indices(clip) == [int(i * 2.5) for i in range(12)] and clip.fps == 10
    assert clip.audio.shape == (12 * RATE // 10,) and onset(clip.audio) == pytest.approx(0.5, abs=0.002)
    assert indices(read(path, frames=16, fps=10)) == [int(i * 2.5) for i in range(16)]  # all 1.6 s of it
    with pytest.raises(MediaError, match=r"only 16 frames at 10 frames per second, expected 17"):
        read(path, frames=17, fps=10)


def test_resampled_to_a_higher_rate_shows_frames_longer(tmp_path):
    path = write(tmp_path / "a.mp4", frames=20)
    assert indices(read(path, frames=40, fps=50)) == [i // 2 for i in range(40)]
    with pytest.raises(MediaError, match="only 40 frames at 50"):
        read(path, frames=41, fps=50)


@pytest.mark.parametrize("rate", [Fraction(25), Fraction(30), Fraction(30_000, 1001), Fraction(60)])
def test_its_own_rate_by_name_is_no_change(rate, tmp_path):
    """Matroska rounds times to a millisecond; no frame may be doubled or lost for it."""
    for name in ("a.mkv", "a.mp4", "a.avi"):
        path = write(tmp_path / name, fps=rate, frames=100)
        assert indices(read(path, frames=100, fps=float(rate))) == list(range(100)), name


VARIABLE = [*range(0, 500, 25), *range(500, 2500, 100)]  # milliseconds: 40 frames a second, then 10


def test_variable_rate_by_time(tmp_path):
    path = write(tmp_path / "a.mkv", times=VARIABLE, sound={**AAC, "seconds": 2.6, "onset": 1.5})
    clip = read(path, frames=40, fps=20)
    expected = [max(i for i, t in enumerate(VARIABLE) if t <= 50 * k) for k in range(40)]
    assert indices(clip) == expected and expected[30] == 30  # the frame of 1.5 s, where the tone begins
    assert onset(clip.audio) == pytest.approx(1.5, abs=0.002)


def test_variable_rate_as_it_comes(tmp_path):
    path = write(tmp_path / "a.mkv", times=VARIABLE, sound={**AAC, "seconds": 2.6, "onset": 1.5})
    clip = read(path, frames=30)
    assert indices(clip) == list(range(30))
    assert clip.fps == pytest.approx(30 / 1.5, rel=1e-3)  # 30 frames cover 1.5 s ...
    assert clip.audio.shape == (round(30 / clip.fps * RATE),)  # ... and so does their sound, which ends at the onset
    assert (clip.audio.abs() > 0.1).sum() == 0


def test_audio_longer_than_video(tmp_path):
    clip = read(write(tmp_path / "a.mp4", sound={**AAC, "seconds": 6.0}), frames=40)
    check(clip, frames=40)
    assert onset(clip.audio) == pytest.approx(0.5, abs=0.002)


def test_audio_that_ends_early_or_starts_late_is_silent_there(tmp_path):
    for name in ("a.mkv", "a.mp4"):
        clip = read(write(tmp_path / name, sound={**AAC, "seconds": 0.4, "starts": 0.6, "onset": 0.7}), frames=40)
        loud = (clip.audio.abs() > 0.1).nonzero() / RATE
        assert loud.min() == pytest.approx(0.7, abs=0.002) and loud.max() == pytest.approx(1.0, abs=0.002)
        assert clip.audio.shape == (1.6 * RATE,) and not clip.audio[: int(0.55 * RATE)].any()


def test_no_sound_in_the_time_of_the_clip_is_none(tmp_path):
    sound = {"codec": "pcm_s16le", "rate": 16_000, "starts": 2.0, "onset": 2.0}
    path = write(tmp_path / "a.mkv", sound=sound, frames=100)
    assert read(path, frames=40).audio is None
    assert onset(read(path, frames=80).audio) == pytest.approx(2.0, abs=0.001)


def test_video_that_starts_late_is_time_zero(tmp_path):
    path = write(tmp_path / "a.mkv", times=[400 + 40 * i for i in range(40)], sound={**AAC, "onset": 1.0})
    clip = read(path)
    check(clip)
    assert onset(clip.audio) == pytest.approx(0.6, abs=0.002)


def test_times_below_zero(tmp_path):
    path = write(
        tmp_path / "a.ts",
        times=[-200 + 40 * i for i in range(40)],
        sound={**AAC, "codec": "mp2", "onset": 0.5},
        container_options={"avoid_negative_ts": "disabled"},
    )
    clip = read(path)
    check(clip)
    assert onset(clip.audio) == pytest.approx(0.7, abs=0.002)


def test_stereo_is_mixed(tmp_path):
    sound = {"codec": "pcm_s16le", "rate": 48_000, "layout": "stereo"}
    both = read(write(tmp_path / "a.mkv", sound=sound)).audio
    left = read(write(tmp_path / "b.mkv", sound={**sound, "only": 0})).audio
    assert both.abs().max() == pytest.approx(0.5, abs=0.02) and left.abs().max() == pytest.approx(0.25, abs=0.01)


def test_lost_packets_of_sound_do_not_shift_the_rest(tmp_path):
    whole, holed = write(tmp_path / "a.mkv", sound={**AAC, "onset": 1.0}), tmp_path / "b.mkv"
    with av.open(str(whole)) as source, av.open(str(holed), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is not None and not (packet.stream.type == "audio" and 0.2 < packet.pts / 1000 < 0.5):
                packet.stream = streams[packet.stream.index]
                target.mux(packet)
    assert onset(read(holed).audio) == pytest.approx(1.0, abs=0.002)


# Errors: one each, with the file and the reason


def test_fewer_frames_than_asked(tmp_path):
    with pytest.raises(MediaError, match=r"short\.mp4: only 40 frames, expected 64"):
        read(write(tmp_path / "short.mp4", sound=AAC), frames=64)


@pytest.mark.parametrize("name", ["a.avi", "a.mkv", "a.ts", "a.webm"])
def test_truncated_gives_what_is_there(name, tmp_path):
    codec = {"a.webm": "libvpx", "a.ts": "mpeg2video"}.get(name, "mpeg4")
    sound = {**AAC, "codec": {"a.webm": "libopus", "a.ts": "mp2"}.get(name, "aac")}
    data = write(tmp_path / name, codec=codec, frames=100, sound={**sound, "seconds": 4}).read_bytes()
    path = tmp_path / ("cut-" + name)
    path.write_bytes(data[: len(data) * 2 // 3])
    check(read(path, frames=16), frames=16)
    with pytest.raises(MediaError, match=rf"cut-{name}: only (\d+) frames, expected 100") as caught:
        read(path, frames=100)
    there = int(str(caught.value).split("only ")[1].split()[0])
    assert 40 <= there < 90
    check(read(path, frames=there), frames=there)  # each of them is whole


def test_truncated_mp4_without_its_index(tmp_path):
    path = write(tmp_path / "a.mp4", sound=AAC)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=r"a\.mp4: cannot be read as video: Invalid data"):
        read(path)
    path.write_bytes(data[:-2000])
    with pytest.raises(MediaError, match=r"a\.mp4: no video in this file, and no sound; is it damaged\?"):
        read(path)


def test_audio_alone(tmp_path):
    for name in ("song.m4a", "song.mp4"):
        with pytest.raises(MediaError, match=rf"{name}: no video in this file, only sound"):
            read(write(tmp_path / name, frames=0, sound=AAC))


def test_the_cover_of_a_song_is_no_video(tmp_path):
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic.value
        audio = container.add_stream("aac", rate=48_000, layout="stereo")
        container.mux(cover.encode(av.VideoFrame.from_ndarray(pattern(1, 64, 64), "rgb24").reformat(format="yuvj420p")))
        container.mux(cover.encode(None))
        write_sound(container, audio, **AAC)
    with pytest.raises(MediaError, match="only sound"):
        read(path, frames=1)


@pytest.mark.parametrize(
    "text",
    [
        "just some words, and not a video\n" * 100,
        "#EXTM3U\n#EXTINF:1,\nother.ts\n",
        "ffconcat version 1.0\nfile other.ts\n",
        "x",
    ],
)
def test_text_renamed(text, tmp_path):
    path = tmp_path / "words.mp4"
    path.write_text(text)
    write(tmp_path / "other.ts", codec="mpeg2video")  # a playlist must not open it
    with pytest.raises(MediaError, match=r"words\.mp4: cannot be read as video: "):
        read(path)


def test_text_that_ffmpeg_would_play(tmp_path):
    (tmp_path / "words.txt").write_text("just some words\n" * 100)
    with pytest.raises(MediaError, match=r"words\.txt: this is text, not video"):
        read(tmp_path / "words.txt")


def test_names_in_the_file_that_are_not_utf8(tmp_path):
    path = write(tmp_path / "a.avi")
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"L\xe9vf"))
    check(read(path))


def test_absurd_time_stamps(tmp_path):
    path = write(tmp_path / "a.mkv", times=[*range(0, 800, 40), *range(10**7, 10**7 + 800, 40)], sound=AAC)
    with pytest.raises(MediaError, match=r"a\.mkv: its time stamps spread 32 frames over 10,000 seconds"):
        read(path)
    check(read(path, frames=16), frames=16)


def test_unknown_codec(tmp_path):
    path = write(tmp_path / "a.avi", sound={"codec": "pcm_s16le", "rate": 8000})
    data = path.read_bytes()
    path.write_bytes(data.replace(b"FMP4", b"ZZZZ"))
    with pytest.raises(MediaError, match=r"a\.avi: its video cannot be decoded: .* no decoder"):
        read(path)


def test_every_frame_damaged(tmp_path):
    path = write(tmp_path / "a.avi", codec="png", pix_fmt="rgb24")
    path.write_bytes(path.read_bytes().replace(b"\x89PNG", b"\x00\x00\x00\x00"))
    with pytest.raises(MediaError, match=r"a\.avi: no frame that can be decoded, expected 32"):
        read(path)


def test_not_a_file(tmp_path):
    (tmp_path / "empty.mp4").touch()
    with pytest.raises(MediaError, match=r"empty\.mp4: the file is empty"):
        read(tmp_path / "empty.mp4")
    with pytest.raises(FileNotFoundError, match=r"missing\.mp4"):
        read(tmp_path / "missing.mp4")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        read(tmp_path)
    with pytest.raises(MediaError, match="/dev/null: not a regular file"):
        read("/dev/null")


@pytest.mark.parametrize("name", ["with space.mp4", "a:b|c.mp4", "100%03d.mp4", "-i.mp4", "電影.mp4", "no-suffix"])
def test_any_name(name, tmp_path):
    data = write(tmp_path / "a.mp4").read_bytes()
    (tmp_path / name).write_bytes(data)
    for path in (tmp_path / name, str(tmp_path / name), str(tmp_path / name).encode()):
        check(read(path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"frames": 0},
        {"frames": 2.5},
        {"size": -1},
        {"sample_rate": 0},
        {"fps": 0},
        {"fps": float("nan")},
        {"fps": float("inf")},
        {"dtype": torch.float16},
    ],
)
def test_arguments(wrong):
    with pytest.raises(ValueError, match=f"read_clip: {next(iter(wrong))}: expected"):
        read_clip(SAMPLE, **{"frames": 8, "size": 8, "sample_rate": RATE, **wrong})


def test_bytes_are_what_floats_are_made_of():
    bytes_, floats = (
        read_clip(SAMPLE, frames=4, size=24, sample_rate=RATE, dtype=dtype) for dtype in (torch.uint8, torch.float32)
    )
    assert bytes_.video.dtype == torch.uint8 and bytes_.video.is_contiguous()
    assert torch.equal(bytes_.video / 255, floats.video) and torch.equal(bytes_.audio, floats.audio)


def test_without_pyav(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"pip install 'mirasol-kernels\[model\]'"):
        read(SAMPLE)
