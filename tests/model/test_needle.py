"""Needle in a video: what the generated task promises, and that a model learns it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from benchmarks import needle as benchmark
from mirasol_model.needle import ANSWERS, BLOCK, CHANCE, KINDS, PAIR_HERTZ, SOUND_HERTZ, Needle, draw_plan

PLANS, SNIPPETS = 4096, 8


def same(a, b):
    return torch.equal(a.video, b.video) and torch.equal(a.audio, b.audio) and a[2:] == b[2:]


def test_an_item_is_a_function_of_seed_and_index_alone():
    one, other = Needle(50, 3, frames=(32, 64)), Needle(200, 3, frames=(32, 64))
    for i in (7, 199, 0, 7):
        assert same(one[i], other[i])
    assert not torch.equal(one[0].video, Needle(50, 4, frames=(32, 64))[0].video)
    assert len(one) == 200 and {one[4 * clip].video.shape[1] for clip in range(50)} == {32, 64}


def test_the_four_questions_of_a_clip_share_it():
    data = Needle(2)
    items = [data[i] for i in range(4, 8)]
    assert [item.kind for item in items] == list(KINDS)
    assert all(same(item, example) for item, example in zip(items, data.examples(1), strict=True))
    assert all(item.answer in ANSWERS[item.kind] and len(item.answer) == 1 for item in items)
    assert all(torch.equal(item.video, items[0].video) for item in items)


def test_512_frames_are_512_frames():
    data = Needle(1, frames=512)
    video, audio = data[0][:2]
    assert video.shape == (3, 512, 32, 32) and video.dtype == torch.uint8
    assert audio.shape == (512 * 4000 // 25,) and audio.dtype == torch.float32 and audio.abs().max() <= 1
    assert len({video[:, f].numpy().tobytes() for f in range(512)}) == 512
    assert len({piece.numpy().tobytes() for piece in audio.view(512, -1)}) == 512


def test_what_was_planned_is_seen_and_heard():
    data = Needle(40, frames=48, snippet=4)
    for clip in range(40):
        plan, example = data.plan(clip), data.examples(clip)[0]
        brightest = example.video.unflatten(1, (-1, 4)).float().mean((2, 3, 4)).T  # (T, 3)
        for snippet in set(range(12)) - {plan.disc, plan.square, *plan.markers}:
            assert brightest[snippet].max() < 50
        assert (brightest[plan.square] > 100).all()  # white
        cross, diamond = (brightest[snippet] for snippet in plan.markers)
        assert cross.argmin() == 0 and diamond.argmin() == 1  # cyan and magenta
        assert (plan.markers[0] < plan.markers[1]) == (plan.answers[3] == 0)
        assert abs(plan.markers[0] - plan.markers[1]) >= 6 and plan.disc < 3
        assert plan.tones[plan.answers[2]] == plan.square
        sounding = {slot: PAIR_HERTZ[pitch] for pitch, slot in plan.tones.items()}
        sounding[plan.chime] = SOUND_HERTZ[plan.answers[1]]
        spectrum = torch.fft.rfft(example.audio.view(12, -1)).abs()  # (T, 4000 / 640 Hz)
        for snippet in range(12):
            if snippet in sounding:
                assert abs(spectrum[snippet].argmax().item() * 4000 / 640 - sounding[snippet]) < 5
            else:
                assert spectrum[snippet].max() < 1


def test_every_combination_of_answers_once_in_128_clips():
    """So whatever one answer says of another, and any constant guess, is worth chance exactly."""
    everything = sorted(itertools.product(*(range(len(ANSWERS[kind])) for kind in KINDS)))
    data = Needle(2 * BLOCK, 5)
    for block in range(2):
        assert sorted(data.plan(block * BLOCK + clip).answers for clip in range(BLOCK)) == everything
    assert CHANCE == {"early": 0.25, "sound": 0.25, "pair": 0.25, "order": 0.5}


def test_the_sound_is_the_same_whatever_the_answer_to_pair():
    """The same draws, another answer: the sound alone cannot tell."""
    for seed in range(100):
        plans = [draw_plan(np.random.default_rng(seed), 12, (0, 1, pair, 0)) for pair in range(4)]
        assert all(plan.tones == plans[0].tones and plan.chime == plans[0].chime for plan in plans)
        assert [plan.square for plan in plans] == [plans[0].tones[pair] for pair in range(4)]


def one_hot(slots):
    return np.eye(SNIPPETS)[np.asarray(slots)]  # (N, T)


@pytest.fixture(scope="module")
def plans():
    data = Needle(2 * PLANS, 11)
    return [data.plan(clip) for clip in range(2 * PLANS)]


def accuracy(features, plans, kind):
    """Of the best linear rule on half of the plans, on the other half."""
    answers = np.array([plan.answers[KINDS.index(kind)] for plan in plans])
    features = np.concatenate([np.ones((len(plans), 1)), features], axis=1)
    rule = np.linalg.lstsq(features[:PLANS], np.eye(len(ANSWERS[kind]))[answers[:PLANS]], rcond=None)[0]
    return ((features[PLANS:] @ rule).argmax(1) == answers[PLANS:]).mean()


def seen_and_heard(plans):
    """All that a modality alone says of when its events are: each one's snippet, and which of two comes first."""
    both = []
    for slots in (
        np.array([(p.disc, p.square, *p.markers) for p in plans]),
        np.array([(*(p.tones[pitch] for pitch in range(4)), p.chime) for p in plans]),
    ):
        pairs = itertools.combinations(range(slots.shape[1]), 2)
        before = np.stack([slots[:, i] < slots[:, j] for i, j in pairs], axis=1)
        both.append(np.concatenate([*(one_hot(column) for column in slots.T), before], axis=1))
    return both


def at_most_chance(kind):
    """Three standard deviations above it."""
    return CHANCE[kind] + 3 * math.sqrt(CHANCE[kind] * (1 - CHANCE[kind]) / PLANS)


@pytest.mark.parametrize("kind", ["sound", "pair"])
def test_either_modality_alone_is_worth_no_more_than_chance(plans, kind):
    seen, heard = seen_and_heard(plans)
    colours = np.eye(4)[[p.answers[0] for p in plans]]
    pitches = np.eye(4)[[p.answers[1] for p in plans]]
    assert accuracy(np.concatenate([seen, colours], axis=1), plans, kind) <= at_most_chance(kind)
    if kind == "pair":
        heard = np.concatenate([heard, pitches], axis=1)
        assert accuracy(heard, plans, kind) <= at_most_chance(kind)
        assert all(set(p.tones) == {0, 1, 2, 3} for p in plans)  # what sounds, without when, is always the same
    else:
        assert accuracy(pitches, plans, kind) == 1


def test_sound_and_picture_together_answer_pair(plans):
    square = one_hot([p.square for p in plans])
    aligned = [(square * one_hot([p.tones[pitch] for p in plans])).sum(1) for pitch in range(4)]
    assert accuracy(np.stack(aligned, axis=1), plans, "pair") == 1


def test_fewer_lures_and_a_shift():
    data = Needle(100, 2, lures=(0, 2))
    counts = {len(data.plan(clip).tones) for clip in range(100)}
    assert counts == {1, 3} and all(p.answers[2] in p.tones for p in map(data.plan, range(100)))
    late, true = Needle(1, 2, shift=1)[0], Needle(1, 2)[0]
    assert torch.equal(late.video, true.video)
    assert torch.equal(late.audio, true.audio.roll(4 * 160))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clips": 0}, "clips: expected an integer of at least 1, got 0"),
        ({"clips": "3"}, "clips: expected an integer of at least 1, got '3'"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"snippet": 0}, "snippet: expected an integer of at least 1, got 0"),
        ({"shift": 0.5}, "shift: expected an integer, got 0.5"),
        ({"frames": 28}, "frames: expected multiples of snippet 4, at least 32, got 28"),
        ({"frames": (32, 34)}, "frames: expected multiples of snippet 4"),
        ({"frames": ()}, "frames: expected multiples of snippet 4"),
        ({"frames": "32"}, "frames: expected multiples of snippet 4, at least 32, got '32'"),
        ({"frames": None}, "frames: expected multiples of snippet 4, at least 32, got None"),
        ({"frames": [32.0]}, "frames: expected multiples of snippet 4, at least 32, got [32.0]"),
        ({"size": 15}, "size: expected an integer of at least 16, got 15"),
        ({"sample_rate": 3600}, "sample_rate: expected a multiple of 25 above 3600, got 3600"),
        ({"sample_rate": 4001}, "sample_rate: expected a multiple of 25 above 3600, got 4001"),
        ({"sample_rate": "4000"}, "sample_rate: expected a multiple of 25 above 3600, got '4000'"),
        ({"lures": 4}, "lures: expected 0 .. 3, got 4"),
        ({"lures": "3"}, "lures: expected 0 .. 3, got '3'"),
        ({"lures": ()}, "lures: expected 0 .. 3"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ValueError) as caught:
        Needle(**{"clips": 1} | arguments)
    assert f"Needle: {message}" in str(caught.value)


@pytest.mark.parametrize("i", [-1, 8])
def test_items_past_the_end(i):
    with pytest.raises(IndexError, match=r"0 \.\. 7"):
        Needle(2)[i]


@pytest.mark.slow
def test_a_model_learns_all_four():
    """`transformer-current`, clips of 32 frames, 600 steps (40 s of one core): fresh clips with every lure."""
    model, row = benchmark.train(benchmark.VARIANTS["transformer-current"], [32], steps=600)
    exact = benchmark.exact_match(model, 32, BLOCK)
    assert row["steps"] == 600 and min(exact.values()) >= 0.9, exact
