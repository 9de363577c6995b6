"""Training runs for tests: a data set that costs nothing to make, and runs that are killed.

As a program, `python -m tests.model.runs CONFIG MOMENT ...`: the run is begun, or gone on with, once for each moment,
in a process of its own that is killed then; and once more to its end. A moment is "<what>:<n>", at the n-th call of one
of `CALLS`. torch is imported once for all of them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimiser imports it: once here, not in each process
from torch.utils.data import Dataset

from mirasol_model import data, train
from mirasol_model.data import BadExample, Example
from mirasol_model.run_log import RunLog

COLOURS = ("red", "green", "blue")


class Colours(Dataset[Example]):
    """Clips of one colour each, of two lengths, some without sound, with answers of different lengths, unless they are
    to be `alike` in that; every `bad`-th cannot be used."""

    def __init__(self, seed: int = 0, length: int = 12, bad: int = 0, alike: bool = False):
        self.seed, self.length, self.bad, self.alike = seed, length, bad, alike

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Example:
        if self.bad and index % self.bad == self.bad - 1:
            raise BadExample(f"clip-{index}: no good")
        generator = torch.Generator().manual_seed(1000 * self.seed + index)
        frames, colour = 8 if self.alike or index % 2 == 0 else 6, index % 3
        video = torch.randint(0, 60, (3, frames, 32, 32), generator=generator, dtype=torch.uint8)
        video[colour] += 180
        audio = 0.1 * torch.randn(frames * 640, generator=generator) if self.alike or index % 4 else None
        answer = COLOURS[colour][: 3 if self.alike else None]
        return Example(video, audio, "which colour?", answer, "early" if index % 2 else "late")


data.SOURCES["colours"] = lambda options, model: Colours(**options)


def write_config(folder: Path, **changes: Any) -> Path:
    """`changes` go one level deep: data={"workers": 1}."""
    values: dict[str, Any] = {
        "out": str(folder / "run"),
        "phase": "finetune",
        "model": {"preset": "tiny"},
        "data": {"kind": "colours", "train": {}, "evaluate": {"seed": 1, "length": 5}, "workers": 0},
        "optimizer": {"warmup": 2, "rate": 1e-3},
        "steps": 10,
        "batch": 2,
        "evaluate_every": 5,
        "save_every": 3,
        "keep": 2,
    }
    for name, value in changes.items():
        values[name] = values[name] | value if isinstance(value, dict) and name in values else value
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The log, but for what a clock said."""
    rows = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


# ------------------------------------------------------------------------------------------------------ killed runs


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def torn_row(log: RunLog, rows: Any) -> None:
    log.file.write(json.dumps(rows[0])[:40])
    log.file.flush()
    die()


def half_removed(path: Path, *_: Any, **__: Any) -> None:
    if Path(path).exists():
        next(Path(path).iterdir()).unlink()
        die()


# What is called in a run: owner, name, what happens instead the n-th time, and how it ends before the process does.
CALLS: dict[str, tuple[Any, str, Callable]] = {
    "step": (torch.optim.AdamW, "step", die),
    "backward": (torch.Tensor, "backward", die),
    "answers": (train.Trainer, "answers", die),
    "write": (RunLog, "write", torn_row),
    "fsync": (os, "fsync", die),
    "rename": (Path, "rename", die),
    "rmtree": (shutil, "rmtree", half_removed),
    "export": (train.Trainer, "export", die),
}


def kill_at(what: str, number: int) -> None:
    owner, name, end = CALLS[what]
    real, calls = getattr(owner, name), iter(range(1, 10**6))

    def counted(*args: Any, **kwargs: Any) -> Any:
        return end(*args, **kwargs) if next(calls) >= number else real(*args, **kwargs)

    setattr(owner, name, counted)


def once(config: str, moment: str | None) -> int:
    """-> how the process ended: 0, or minus the signal."""
    child = os.fork()
    if child == 0:
        if moment:
            what, number = moment.split(":")
            kill_at(what, int(number))
        os._exit(train.main(["--config", config]))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(config: str, *moments: str) -> None:
    checkpoints = Path(json.loads(Path(config).read_text())["out"]) / "checkpoints"
    for moment in (*moments, None):
        code = once(config, moment)
        there = sorted(path.name for path in checkpoints.iterdir()) if checkpoints.exists() else []
        print(json.dumps({"moment": moment, "code": code, "checkpoints": there}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
