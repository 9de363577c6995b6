"""What a model is trained on: clips with a prompt and its answer, one by one and in batches.

A data set is a map-style `torch.utils.data.Dataset` of `Example`, and a function of the index alone: then a run that is
resumed sees what it would have seen. What cannot be used raises `BadExample`, MediaError or OSError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from mirasol_model.config import MirasolConfig
from mirasol_model.fields import expect
from mirasol_model.media import MediaError, read_clip
from mirasol_model.tokens import Text

# So many bad examples one after the other are no accident.
MOST_BAD = 16


class Example(NamedTuple):
    """One clip and one question about it."""

    video: Tensor | None  # (3, frames, H, W), uint8 or float in [0, 1]
    audio: Tensor | None  # (samples,) in [-1, 1], the same time span
    prompt: str
    answer: str
    kind: str = ""  # the type of question; evaluation reports each on its own


class BadExample(ValueError):
    """An example that cannot be used. The message names the file and the reason."""


class ClipFolder(Dataset[Example]):
    """Clips beside a JSONL file: a line is {"clip": "a.mp4", "prompt": ..., "answer": ..., "kind": ...}, kind optional.

    prompts: the JSONL; names of clips are relative to its folder. frames: how many are read at `fps` from the beginning
    of a clip; one that has fewer is taken if it has `least`, by default all. size: of the square picture in pixels.
    sample_rate: of the sound. Videos come as uint8, a quarter of what a worker would otherwise send.
    """

    def __init__(
        self,
        prompts: str | Path,
        *,
        frames: int = 32,
        least: int | None = None,
        fps: float = 25.0,
        size: int,
        sample_rate: int,
    ):
        self.file = Path(prompts)
        _check(isinstance(frames, int) and frames >= 1, "frames", "an integer of at least 1", frames)
        some = least is None or (isinstance(least, int) and 1 <= least <= frames)
        _check(some, "least", f"None or 1 .. {frames}", least)
        _check(isinstance(fps, int | float) and 0 < fps < float("inf"), "fps", "a positive number", fps)
        _check(self.file.is_file(), "prompts", "a JSONL file", str(prompts))
        self.wanted: dict[str, Any] = {"frames": frames, "least": least, "fps": fps, "dtype": torch.uint8}
        self.wanted |= {"size": size, "sample_rate": sample_rate}
        try:
            lines = self.file.read_text("utf-8").split("\n")  # not at U+2028, which JSON leaves as it is
        except UnicodeDecodeError as error:
            raise ValueError(f"ClipFolder: prompts: expected UTF-8 in {prompts}, got: {error}") from error
        self.lines = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        _check(bool(self.lines), "prompts", "at least one line", str(prompts))

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Example:
        number, line = self.lines[index]
        place = f"{self.file}:{number}"
        try:
            values = json.loads(line)
        except ValueError as error:
            raise BadExample(f"{place}: expected JSON, got: {error}") from error
        if not isinstance(values, dict):
            raise BadExample(f"{place}: expected a mapping, got {type(values).__name__}")
        fields = {**values, "kind": "" if values.get("kind") is None else values["kind"]}
        for name in ("clip", "prompt", "answer", "kind"):
            if not isinstance(fields.get(name), str):
                raise BadExample(f"{place}: {name}: expected text, got {fields.get(name)!r}")
            try:  # JSON can write half a character, which neither a tokenizer nor the file system takes
                os.fsencode(fields[name]) if name == "clip" else fields[name].encode()
            except UnicodeEncodeError as error:
                raise BadExample(f"{place}: {name}: expected whole characters, got {fields[name]!r}") from error
        if "\0" in fields["clip"]:  # the system would refuse it with an error that is none of a clip
            raise BadExample(f"{place}: clip: expected the name of a file, got {fields['clip']!r}")
        if not fields["answer"].strip():
            raise BadExample(f"{place}: answer: expected some text, got none, for clip {fields['clip']}")
        clip = read_clip(self.file.parent / fields["clip"], **self.wanted)
        return Example(clip.video, clip.audio, fields["prompt"], fields["answer"], fields["kind"])


def _check(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"ClipFolder: {name}: expected {expected}, got {got!r}")


def _only(kind: str, options: dict[str, Any], *known: str) -> None:
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"expected only {', '.join(known)} for kind {kind!r}, got {', '.join(unknown)}")


def open_folder(options: dict[str, Any], model: MirasolConfig) -> ClipFolder:
    _only("folder", options, "prompts", "frames", "least", "fps")
    prompts = options.get("prompts")
    _check(isinstance(prompts, str), "prompts", "the name of a JSONL file", prompts)
    return ClipFolder(**options, size=model.video.size, sample_rate=model.audio.sample_rate)


def open_needle(options: dict[str, Any], model: MirasolConfig) -> Dataset:
    from mirasol_model.needle import Needle  # which needs what is here

    _only("needle", options, "clips", "seed", "frames", "lures", "shift")
    if "clips" not in options:
        raise ValueError("Needle: clips: expected how many to make, got None")
    video = model.video
    return Needle(**options, snippet=video.frames, size=video.size, sample_rate=model.audio.sample_rate)


# What `data.kind` may say: (options of data.train or data.evaluate, configuration of the model) -> the data set.
SOURCES: dict[str, Callable[[dict[str, Any], MirasolConfig], Dataset]] = {"folder": open_folder, "needle": open_needle}


def open_data(kind: str, options: dict[str, Any], model: MirasolConfig, part: str = "train") -> Dataset:
    """part: where the options stand, data.train or data.evaluate, for errors."""
    expect(kind in SOURCES, "data.kind", f"one of {', '.join(SOURCES)}", kind)
    try:
        return SOURCES[kind](options, model)
    except ValueError as error:
        raise ValueError(f"config: data.{part}: {error}") from error


# ---------------------------------------------------------------------------------------------- what cannot be used


class Attempt(NamedTuple):
    example: Example | None
    skipped: tuple[str, ...]  # why others were not used


class Attempts(Dataset[Attempt]):
    """Examples, or the reason why there is none: workers raise nothing, what is to be done is decided by who trains.

    replace: a good example stands in for a bad one. Then batches keep their size, processes that train together keep
    step, and what stands in depends on the index alone. It comes from anywhere: neighbours often ask of the same clip.
    """

    def __init__(self, examples: Dataset, replace: bool):
        self.examples, self.replace, self.length = examples, replace, len(examples)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Attempt:
        skipped: list[str] = []
        for other in self.candidates(index):
            try:
                return Attempt(self.examples[other], tuple(skipped))
            except (BadExample, MediaError, OSError) as error:
                # It will be printed, and names of files may hold bytes that are no text.
                skipped.append(str(error).encode(errors="backslashreplace").decode())
        return Attempt(None, tuple(skipped))

    def candidates(self, index: int) -> Iterator[int]:
        """What is tried in turn, no example twice."""
        yield index
        if self.replace:
            others = min(MOST_BAD, self.length) - 1
            for step in np.random.default_rng(index).choice(self.length - 1, others, replace=False).tolist():
                yield (index + 1 + step) % self.length


# ----------------------------------------------------------------------------------------------------------- batches


class Order(Sampler[list[int]]):
    """Batches without end: every example once in each pass over the data, shuffled by (seed, pass).

    Of the examples in a row, each process (`rank` of `ranks`) takes its `batch` in turn. start: how many examples have
    been taken by all, which is all there is to know to go on.
    """

    def __init__(self, examples: int, batch: int, seed: int, *, rank: int = 0, ranks: int = 1, start: int = 0):
        self.examples, self.batch, self.seed = examples, batch, seed
        self.rank, self.ranks, self.start = rank, ranks, start

    def __iter__(self) -> Iterator[list[int]]:
        shuffled: dict[int, np.ndarray] = {}
        position = self.start + self.rank * self.batch
        while True:
            batch = []
            for place in range(position, position + self.batch):
                turn, index = divmod(place, self.examples)
                if turn not in shuffled:
                    shuffled = {turn: np.random.default_rng([self.seed, turn]).permutation(self.examples)}
                batch.append(int(shuffled[turn][index]))
            yield batch
            position += self.batch * self.ranks


class Batch(NamedTuple):
    """B examples as `Mirasol.forward` takes them, padded to the longest; and as `generate` asks."""

    video: Tensor  # (B, 3, frames, H, W)
    audio: Tensor | None  # (B, samples)
    frames: list[int]
    has_audio: list[bool] | None
    text: Tensor  # (B, L) prompt and answer
    labels: Tensor  # (B, L), -100 past the end, and for prompts that are not to be learned
    prompt: Tensor  # (B, P)
    prompt_lengths: list[int]
    answers: list[str]
    kinds: list[str]

    def to(self, device: torch.device) -> Batch:
        moved = [x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in self]
        return Batch(*moved)  # type: ignore[arg-type]


class Collate:
    """Attempts -> a batch of those that succeeded (None where none did), and the reasons of the others.

    predict_prompts: whether prompts are learned like answers (pretraining).
    """

    def __init__(self, text: Text, predict_prompts: bool):
        self.text, self.predict_prompts = text, predict_prompts

    def __call__(self, attempts: Sequence[Attempt]) -> tuple[Batch | None, list[str]]:
        examples = [attempt.example for attempt in attempts if attempt.example is not None]
        skipped = [reason for attempt in attempts for reason in attempt.skipped]
        return (self.batch(examples) if examples else None), skipped

    def batch(self, examples: Sequence[Example]) -> Batch:
        video, frames = stack_video([example.video for example in examples])
        audio, has_audio = stack_audio([example.audio for example in examples], frames)
        prompts = [self.text.prompt(example.prompt) for example in examples]
        answers = [self.text.answer(example.answer) for example in examples]
        both = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        hidden = [[-100] * len(prompt) + answer for prompt, answer in zip(prompts, answers, strict=True)]
        pad = self.text.config.pad
        return Batch(
            video,
            audio,
            frames,
            has_audio,
            pad_rows(both, pad),
            pad_rows(both if self.predict_prompts else hidden, -100),
            pad_rows(prompts, pad),
            [len(prompt) for prompt in prompts],
            [example.answer for example in examples],
            [example.kind for example in examples],
        )


def pad_rows(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """-> (B, L) int64, padded behind."""
    padded = torch.full((len(rows), max(map(len, rows))), value)
    for row, tokens in zip(padded, rows, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    return padded


def stack_video(videos: Sequence[Tensor | None]) -> tuple[Tensor, list[int]]:
    """(3, n, H, W) each -> (B, 3, longest, H, W), n of each."""
    given = [video for video in videos if video is not None]
    kinds = {(video.dtype, *video.shape[:1], *video.shape[2:]) for video in given}
    if len(given) < len(videos) or len(kinds) > 1:
        raise ValueError(f"collate: video: expected every example to have one of one dtype and size, got {kinds}")
    frames = [video.shape[1] for video in given]
    dtype, channels, height, width = kinds.pop()
    stacked = torch.zeros(len(given), channels, max(frames), height, width, dtype=dtype)
    for row, video in zip(stacked, given, strict=True):
        row[:, : video.shape[1]] = video
    return stacked, frames


def stack_audio(sounds: Sequence[Tensor | None], frames: Sequence[int]) -> tuple[Tensor | None, list[bool] | None]:
    """(samples,) each, over the time of so many frames -> (B, samples) over that of the longest, who has any.

    Sound and frames grow at one rate in all rows, to a sample: else a row would not be cut where it is by itself. Where
    the longest is silent, to one and a half: the length that its sound would have is rounded as well.
    """
    heard = [(sound, n) for sound, n in zip(sounds, frames, strict=True) if sound is not None]
    if not heard:
        return None, None
    longest, over = max(heard, key=lambda pair: pair[1])
    samples = round(len(longest) * max(frames) / over)
    rounded = max(frames) * (1.0 if over == max(frames) else 1.5)  # half a sample for each that was rounded
    stacked = torch.zeros(len(sounds), samples, dtype=longest.dtype)
    for row, sound, n in zip(stacked, sounds, frames, strict=True):
        if sound is None:
            continue
        if abs(len(sound) * max(frames) - n * samples) > rounded:
            raise ValueError(
                f"collate: audio: expected {samples / max(frames):.1f} samples a frame in every example of the batch, "
                f"got {len(sound) / n:.1f}"
            )
        row[: len(sound)] = sound[:samples]
    return stacked, [sound is not None for sound in sounds]
