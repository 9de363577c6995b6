"""Everything that can be chosen about a training run, in one file: JSON or TOML, read by `TrainConfig.load`.

    {"out": "runs/first", "phase": "finetune", "steps": 2000,
     "model": {"preset": "tiny", "change": {"combiner": {"kind": "ttm"}}},
     "data": {"kind": "folder", "train": {"prompts": "clips/train.jsonl", "frames": 32}}}

All defaults are ours, but for the two phases' weights of the losses (second-hand, as in `config.LossConfig`). Paths are
relative to the current directory.
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mirasol_model.config import PRESETS, MirasolConfig
from mirasol_model.fields import build, expect, positive, typed

# What the weight of the text loss is, and whether the prompt is predicted as well as the answer.
PHASES = {"pretrain": {"text": 1.0}, "finetune": {"text": 10.0}}


@dataclass(frozen=True)
class ModelChoice:
    """A model from a preset, or one that was trained before."""

    preset: str | None = None
    start: str | None = None  # a folder of `save_pretrained`, as a run leaves it in <out>/model
    change: dict[str, Any] = field(default_factory=dict)  # fields of MirasolConfig, {"combiner": {"kind": "ttm"}}
    tokenizer: str | None = None  # a tokenizer.json; None is that of `start`, or else one token per byte of UTF-8

    def __post_init__(self) -> None:
        typed("model", self)
        expect((self.preset is None) != (self.start is None), "model.preset", "either it or model.start", self.preset)
        if self.preset is not None:
            expect(self.preset in PRESETS, "model.preset", f"one of {', '.join(PRESETS)}", self.preset)
        elif self.tokenizer is None and (file := Path(str(self.start)) / "tokenizer.json").is_file():
            # Here and not where it is read, so that a run's config.json says what its words were.
            object.__setattr__(self, "tokenizer", str(file))

    def config(self, phase: str) -> MirasolConfig:
        """What is begun with, the phase's weights of the losses, and the changes, the later over the earlier."""
        if self.start is not None:
            file = Path(self.start) / "config.json"
            expect(file.is_file(), "model.start", "a folder with a config.json", self.start)
            values = json.loads(file.read_text())
        else:
            values = MirasolConfig.preset(str(self.preset)).to_dict()
        values["losses"] = values.get("losses", {}) | PHASES[phase]
        for part, changed in self.change.items():
            mapping = isinstance(changed, dict) and isinstance(values.get(part), dict)
            values[part] = values[part] | changed if mapping else changed
        return MirasolConfig.from_dict(values)


@dataclass(frozen=True)
class DataConfig:
    """What is learned and what is asked afterwards; `mirasol_model.data.SOURCES` has the kinds and their options."""

    kind: str
    train: dict[str, Any]
    evaluate: dict[str, Any] | None = None
    workers: int = 2  # processes that decode; 0 decodes in the training process
    timeout: float = 300.0  # seconds that a batch may take them, then the run stops with an error
    bad: Literal["skip", "stop"] = "skip"  # what to do about a clip that cannot be read or has no answer

    def __post_init__(self) -> None:
        typed("data", self)
        expect(self.workers >= 0, "data.workers", "0 or more", self.workers)
        expect(self.timeout > 0, "data.timeout", "seconds, more than 0", self.timeout)


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW: the rate rises linearly over `warmup` steps and falls as a cosine to `final` of its peak."""

    rate: float = 3e-4
    warmup: int = 100
    final: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.05  # of matrices; vectors (norms, biases, single tokens) do not decay
    clip: float = 1.0  # the norm that all gradients together are cut to

    def __post_init__(self) -> None:
        typed("optimizer", self)
        for name in ("rate", "clip"):
            expect(getattr(self, name) > 0, f"optimizer.{name}", "more than 0", getattr(self, name))
        for name in ("warmup", "weight_decay"):
            expect(getattr(self, name) >= 0, f"optimizer.{name}", "0 or more", getattr(self, name))
        expect(0 <= self.final <= 1, "optimizer.final", "a share in [0, 1]", self.final)
        expect(all(0 <= beta < 1 for beta in self.betas), "optimizer.betas", "two shares in [0, 1)", self.betas)


@dataclass(frozen=True)
class TrainConfig:
    """One run. Its folder `out` has config.json, log.jsonl, tensorboard/, checkpoints/, curves.png and model/."""

    out: str
    model: ModelChoice
    data: DataConfig
    phase: Literal["pretrain", "finetune"] = "pretrain"  # finetune: text weighs 10, and only answers are predicted
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int = 1000  # of the optimiser
    batch: int = 8  # clips in a forward pass, of each process
    accumulation: int = 1  # forward passes in a step; each counts as much, however many labels it has, as processes do
    shard: Literal["ddp", "fsdp"] = "ddp"  # of several processes, each has all parameters, or a share of them
    bfloat16: bool | None = None  # autocast; None is: where there is a GPU
    seed: int = 0
    evaluate_every: int = 500  # steps; and after the last
    save_every: int = 500  # steps; and after the last
    keep: int = 3  # checkpoints

    def __post_init__(self) -> None:
        typed("the whole", self)
        positive("train", self, "steps", "batch", "accumulation", "evaluate_every", "save_every", "keep")
        expect(self.seed >= 0, "seed", "0 or more", self.seed)

    @staticmethod
    def load(path: str | Path) -> TrainConfig:
        """Raises ValueError or TypeError naming the field."""
        text = Path(path).read_text()
        try:
            values = tomllib.loads(text) if Path(path).suffix == ".toml" else json.loads(text)
        except ValueError as error:
            kind = "TOML" if Path(path).suffix == ".toml" else "JSON (TOML is read from a file named *.toml)"
            raise ValueError(f"config: {path}: expected {kind}, got: {error}") from error
        return build(TrainConfig, values, "")

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


# What a run may be resumed with another value of: it changes who does the work and what is reported, or how much of
# the data a step sees, which another number of processes does as well.
FREE = (
    "out",
    "data.workers",
    "data.timeout",
    "data.bad",
    "batch",
    "accumulation",
    "shard",
    "evaluate_every",
    "save_every",
    "keep",
)


def differences(begun: dict[str, Any], now: dict[str, Any], path: str = "") -> list[str]:
    """The fields in which a run would go on otherwise than it began, as "optimizer.rate 0.1 (not 0.2)"."""
    found: list[str] = []
    for name in sorted({*begun, *now}):
        place, was, is_ = path + name, begun.get(name), now.get(name)
        if isinstance(was, dict) and isinstance(is_, dict):
            found += differences(was, is_, f"{place}.")
        elif was != is_ and place not in FREE:
            found.append(f"{place} {is_!r} (not {was!r})")
    return found
