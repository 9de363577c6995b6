"""Needle in a video: a generated task that needs the past, the sound, and which sound came with which picture.

A clip is moving noise with a grey ball and a faint hiss. Events last a whole snippet, picture and sound each in
snippets of their own but for the square:

- a coloured disc in the first quarter of the clip;               "early?"  its colour, of r g b y        (chance 1/4)
- a chime, one of four pitches of the upper band;                 "sound?"  its pitch, of a b c d         (chance 1/4)
- the four pitches of the lower band, each once, and a white
  square during one of them;                                      "pair?"   the square's pitch, 1 2 3 4   (chance 1/4)
- a cyan cross and a magenta diamond, half the clip apart;        "order?"  what came first, + or x       (chance 1/2)

Chance is exact: every 128 clips hold each combination of answers once. All four low pitches sound in every clip; given
the sound alone each of them is equally likely to be the square's, and so it is given the picture alone. `pair` needs
both, aligned. Everything here is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mirasol_model.data import Example

FRAMES_PER_SECOND = 25
ANSWERS = {"early": "rgby", "sound": "abcd", "pair": "1234", "order": "+x"}
KINDS = tuple(ANSWERS)
CHANCE = {kind: 1 / len(answers) for kind, answers in ANSWERS.items()}
BLOCK = 4 * 4 * 4 * 2  # clips that hold every combination of answers once
FEWEST = 8  # snippets of a clip: four events of each sense, two of them half a clip apart

COLOURS = ((255, 40, 40), (40, 255, 40), (60, 60, 255), (255, 255, 40))
WHITE, CYAN, MAGENTA, GREY = (255, 255, 255), (40, 255, 255), (255, 40, 255), (96, 96, 96)
# Which pixels, given as distances from the centre in thirty-seconds of the picture.
INSIDE: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "ball": lambda y, x: y**2 + x**2 < 3**2,
    "disc": lambda y, x: y**2 + x**2 < 11**2,
    "square": lambda y, x: np.maximum(abs(y), abs(x)) < 10,
    "cross": lambda y, x: (np.minimum(abs(y), abs(x)) < 4) & (np.maximum(abs(y), abs(x)) < 12),
    "diamond": lambda y, x: abs(y) + abs(x) < 13,
}
PAIR_HERTZ, SOUND_HERTZ = (240, 380, 560, 780), (1000, 1250, 1500, 1800)
LOUDNESS, HISS = 0.5, 0.0002
NOISE = 64  # of 256: below it is the noise of every pixel


class Plan(NamedTuple):
    """What happens in which snippet, and the answers as indices into `ANSWERS`."""

    disc: int
    square: int
    chime: int
    tones: dict[int, int]  # the pitches of the lower band that sound, and where
    markers: tuple[int, int]  # where the cross is, and the diamond
    answers: tuple[int, ...]  # in the order of KINDS


def draw_plan(random: np.random.Generator, snippets: int, answers: Sequence[int], lures: int = 3) -> Plan:
    """With all three lures the sounds do not depend on the answer to `pair`, nor does anything but the two markers on
    that to `order`."""
    *slots, chime = random.permutation(snippets)[:5].tolist()
    order = random.permutation(4).tolist()
    order.remove(answers[2])
    tones = {pitch: slots[pitch] for pitch in (answers[2], *order[:lures])}
    square = tones[answers[2]]
    disc = int(random.choice([t for t in range(snippets // 4) if t != square]))
    free = [t for t in range(snippets) if t not in (square, disc)]
    first, second = 0, 0
    while second - first < snippets // 2:
        first, second = sorted(random.choice(free, 2, replace=False).tolist())
    markers = (second, first) if answers[3] else (first, second)
    return Plan(disc, square, chime, tones, markers, tuple(answers))


def several(numbers: object) -> tuple:
    """One number, or what a list of them holds."""
    return tuple(numbers) if isinstance(numbers, Sequence) and not isinstance(numbers, str) else (numbers,)


class Needle(Dataset[Example]):
    """`clips` clips with four questions each: item i is question i % 4 of clip i // 4, a function of (seed, i) alone.

    video (3, frames, size, size) uint8, no two frames alike; audio (frames * sample_rate / 25) float32.
    frames: of a clip; of several numbers each clip takes one. snippet: frames of a snippet, which the model must share.
    lures: low pitches besides the square's, 0 to 3; of several numbers each clip takes one. With fewer than three the
    sound alone says something of the answer to `pair`, a way in for training: the benchmark trains on (0, 1, 2, 3).
    shift: how many snippets too late the sound is (an ablation; it wraps around).
    """

    def __init__(
        self,
        clips: int,
        seed: int = 0,
        *,
        frames: int | Sequence[int] = 32,
        snippet: int = 4,
        size: int = 32,
        sample_rate: int = 4000,
        lures: int | Sequence[int] = 3,
        shift: int = 0,
    ):
        self.lures, self.frames = several(lures), several(frames)
        for name, value, least in (("clips", clips, 1), ("seed", seed, 0), ("snippet", snippet, 1), ("size", size, 16)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"Needle: {name}: expected an integer of at least {least}, got {value!r}")
        if not isinstance(shift, int):
            raise ValueError(f"Needle: shift: expected an integer, got {shift!r}")
        whole = all(isinstance(n, int) and n >= FEWEST * snippet and n % snippet == 0 for n in self.frames)
        if not self.frames or not whole:
            raise ValueError(
                f"Needle: frames: expected multiples of snippet {snippet}, at least {FEWEST * snippet}, got {frames!r}"
            )
        if not self.lures or not all(isinstance(n, int) and 0 <= n <= 3 for n in self.lures):
            raise ValueError(f"Needle: lures: expected 0 .. 3, got {lures!r}")
        low = 2 * SOUND_HERTZ[-1]
        if not isinstance(sample_rate, int) or sample_rate % FRAMES_PER_SECOND or sample_rate <= low:
            raise ValueError(
                f"Needle: sample_rate: expected a multiple of {FRAMES_PER_SECOND} above {low}, got {sample_rate!r}"
            )
        self.clips, self.seed, self.snippet, self.size = clips, seed, snippet, size
        self.sample_rate, self.shift = sample_rate, shift

    def __len__(self) -> int:
        return len(KINDS) * self.clips

    def __getitem__(self, i: int) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"Needle: expected 0 .. {len(self) - 1}, got {i}")
        clip, kind = divmod(i, len(KINDS))
        return self.examples(clip)[kind]

    def examples(self, clip: int) -> list[Example]:
        """All questions of one clip, which they share: encode once, ask often."""
        plan, frames, random = self._plan(clip)
        video, audio = self._video(plan, frames, random), self._audio(plan, frames, random)
        return [
            Example(video, audio, f"{kind}?", ANSWERS[kind][answer], kind)
            for kind, answer in zip(KINDS, plan.answers, strict=True)
        ]

    def plan(self, clip: int) -> Plan:
        return self._plan(clip)[0]

    def _plan(self, clip: int) -> tuple[Plan, int, np.random.Generator]:
        block, place = divmod(clip, BLOCK)
        combination = np.random.default_rng((self.seed, 0, block)).permutation(BLOCK)[place]
        answers = [int(a) for a in np.unravel_index(combination, [len(ANSWERS[kind]) for kind in KINDS])]
        random = np.random.default_rng((self.seed, 1, clip))
        frames = int(random.choice(self.frames))
        lures = int(random.choice(self.lures))
        return draw_plan(random, frames // self.snippet, answers, lures), frames, random

    def _video(self, plan: Plan, frames: int, random: np.random.Generator) -> Tensor:
        noise = np.frombuffer(random.bytes(3 * frames * self.size**2), np.uint8)
        video = noise.reshape(3, frames, self.size, self.size) // (256 // NOISE)
        middle, unit = self.size / 2, self.size / 32

        def paint(begin: int, shape: str, y: np.ndarray, x: np.ndarray, colour: Sequence[int]) -> None:
            """From frame `begin` on, with the centre at y, x (f)."""
            rows, columns = (np.arange(self.size) + 0.5 - middle - at[:, None] for at in (y, x))  # (f, size) each
            inside = INSIDE[shape](rows[:, :, None] / unit, columns[:, None] / unit)  # (f, H, W)
            for plane, value in zip(video[:, begin : begin + len(y)], colour, strict=True):
                np.copyto(plane, np.uint8(value), where=inside)

        turn = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(frames) / random.uniform(20, 40)
        paint(0, "ball", 10 * unit * np.sin(turn), 10 * unit * np.cos(turn), GREY)
        events = (
            (plan.disc, "disc", COLOURS[plan.answers[0]]),
            (plan.square, "square", WHITE),
            (plan.markers[0], "cross", CYAN),
            (plan.markers[1], "diamond", MAGENTA),
        )
        for snippet, shape, colour in events:
            start, speed = unit * random.uniform(-4, 4, 2), unit * random.uniform(-1, 1, 2)
            y, x = start[:, None] + speed[:, None] * np.arange(self.snippet)
            paint(snippet * self.snippet, shape, y, x, colour)
        return torch.from_numpy(video)

    def _audio(self, plan: Plan, frames: int, random: np.random.Generator) -> Tensor:
        length = self.snippet * self.sample_rate // FRAMES_PER_SECOND
        audio = HISS * random.standard_normal((frames // self.snippet, length), np.float32)
        seconds = np.arange(length) / self.sample_rate
        for snippet, hertz in (
            *((slot, PAIR_HERTZ[pitch]) for pitch, slot in plan.tones.items()),
            (plan.chime, SOUND_HERTZ[plan.answers[1]]),
        ):
            audio[snippet] += LOUDNESS * np.sin(2 * np.pi * (hertz * seconds + random.uniform()))
        return torch.from_numpy(np.roll(audio, self.shift, axis=0).ravel())
