"""Configurations: presets, JSON round trip, and an error for everything that does not fit."""

import json
from dataclasses import replace

import pytest

from mirasol_model.config import (
    AudioConfig,
    CombinerConfig,
    EncoderConfig,
    LatentConfig,
    LossConfig,
    MirasolConfig,
    TextConfig,
    VideoConfig,
)

PRESETS = ("tiny", "small", "base", "3b")


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = MirasolConfig.preset(name)
    assert MirasolConfig.from_json(config.to_json()) == config
    assert MirasolConfig.from_dict(config.to_dict()) == config


def test_tubes_survive_the_round_trip():
    tubes = (((4, 8, 8), (8, 32, 32), (0, 8, 8)), ((1, 16, 16), (8, 16, 16), (0, 0, 0)))
    config = replace(MirasolConfig.preset("tiny"), video=VideoConfig(frames=4, tubes=tubes))
    again = MirasolConfig.from_json(config.to_json())
    assert again == config and hash(again) == hash(config)


def test_lists_become_tuples():
    """A configuration that is made with lists, as JSON has them, is the one with tuples."""
    tube = ((1, 8, 8), (1, 8, 8), (0, 0, 0))
    lists = VideoConfig(tubes=[[list(part) for part in tube]]), LossConfig(video_size=[4, 32, 32])
    tuples = VideoConfig(tubes=(tube,)), LossConfig(video_size=(4, 32, 32))
    assert lists == tuples and hash(lists) == hash(tuples)


def test_what_is_left_out_keeps_its_default():
    config = MirasolConfig.from_dict({"combiner": {"kind": "ttm"}, "losses": {"text": 10}})
    assert config == replace(MirasolConfig(), combiner=CombinerConfig(kind="ttm"), losses=LossConfig(text=10.0))


def test_defaults_are_the_3b_preset():
    assert MirasolConfig() == MirasolConfig.preset("3b")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MirasolConfig.preset("huge"), "config: preset: expected one of tiny, small, base, 3b, got 'huge'"),
        (lambda: VideoConfig(frames=0), "video.frames: expected an integer of at least 1, got 0"),
        (lambda: VideoConfig(tubes=()), "video.tubes: expected None or at least one tube"),
        (
            lambda: VideoConfig(tubes=(((1, 2, 3), (1, 0, 3), (0, 0, 0)),)),
            "video.tubes: expected kernels and strides of at least 1",
        ),
        (lambda: AudioConfig(hop_ms=30.0), "audio.hop_ms: expected 0 < hop <= window, got 30.0"),
        (lambda: AudioConfig(mel_bins=100), "audio.mel_bins: expected a multiple of patch 16, got 100"),
        (lambda: EncoderConfig(heads=7), "encoder.heads: expected a divisor of the width 1280, got 7"),
        (lambda: EncoderConfig(dim=30, heads=2), "encoder.heads: expected an even head width"),
        (lambda: CombinerConfig(tokens=0), "combiner.tokens: expected an integer of at least 1, got 0"),
        (lambda: CombinerConfig(kind="ttm", context="all"), "combiner.context: expected 'current' for kind 'ttm'"),
        (lambda: CombinerConfig(window=4), "combiner.window: expected None, or at least 1 together with context 'all'"),
        (lambda: LatentConfig(window=0), "latent.window: expected None or at least 1, got 0"),
        (lambda: LatentConfig(sink=2), "latent.sink: expected 0 where there is no window, got 2"),
        (lambda: LatentConfig(window=2, sink=-1), "latent.sink: expected 0 or more, got -1"),
        (lambda: LatentConfig(mask_ratio=1.0), "latent.mask_ratio: expected a share in .0, 1., got 1.0"),
        (lambda: TextConfig(eos=40_000), "text.eos: expected a token below 32128, got 40000"),
        (lambda: LossConfig(text=-1.0), "losses.text: expected a weight of at least 0, got -1.0"),
        (lambda: LossConfig(video_patch=(3, 8, 8)), "losses.video_patch: expected divisors of video_size"),
        (
            lambda: replace(MirasolConfig(), losses=LossConfig(heads=3)),
            "losses.heads: expected a divisor of the width 1280",
        ),
        (
            lambda: replace(MirasolConfig(), video=VideoConfig(frames=2)),
            "losses.video_size: expected at most video.frames 2",
        ),
        (
            lambda: replace(MirasolConfig(), audio=AudioConfig(mel_bins=32)),
            "losses.audio_size: expected at most audio.mel_bins",
        ),
        (lambda: MirasolConfig.from_dict({"speed": 1}), "config: the whole: expected only video, .*, got speed"),
        (
            lambda: MirasolConfig.from_dict({"video": {"fps": 1}}),
            "config: video: expected only frames, size, tubes, got fps",
        ),
    ],
)
def test_what_does_not_fit_is_an_error(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1], "config: the whole: expected a mapping, got list"),
        ({"video": 3}, "config: video: expected a mapping, got int"),
        ({"video": {"frames": "8"}}, "config: video.frames: expected int, got '8'"),
        ({"video": {"frames": True}}, "config: video.frames: expected int, got True"),
        ({"losses": {"text": "1"}}, "config: losses.text: expected float, got '1'"),
        ({"losses": {"video_size": [4, 32]}}, "config: losses.video_size: expected"),
        ({"combiner": {"kind": "lstm"}}, "config: combiner.kind: expected .*transformer.*, got 'lstm'"),
    ],
)
def test_a_value_of_the_wrong_type_is_an_error(values, message):
    with pytest.raises(TypeError, match=message):
        MirasolConfig.from_json(json.dumps(values))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CombinerConfig(kind="lstm"), "combiner.kind: expected one of .'transformer', .*, got 'lstm'"),
        (lambda: VideoConfig(frames=8.0), "video.frames: expected int, got 8.0"),
        (lambda: VideoConfig(tubes=(((1, 2, 3), (1, 2, 3)),)), "video.tubes: expected tuple"),
    ],
)
def test_the_types_are_checked_in_python_too(build, message):
    with pytest.raises(TypeError, match=message):
        build()


def test_recompute_is_checked():
    with pytest.raises(ValueError, match="recompute: expected 'none' or 'snippet', got 'all'"):
        replace(MirasolConfig(), recompute="all")
