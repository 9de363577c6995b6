"""How fast layers of each part of the model run here, in real training steps: for `benchmarks.scale --measure`.

The model at the widths of its preset, one layer deep in every part, takes a step on a clip; then the layer of one part
runs `MORE` times more. The difference is layers, forward, computed again, and backward, as they run in a step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import nn

from benchmarks import harness
from mirasol_model import Mirasol, MirasolConfig

PARTS = ("encoder", "combiner", "latent", "text")
BASE = "base"
MORE = 4


def shallow(config: MirasolConfig) -> dict[str, MirasolConfig]:
    """BASE: one layer in every part; and for each part, with MORE there."""
    one = replace(config, **{part: replace(getattr(config, part), layers=1) for part in PARTS})
    return {BASE: one} | {part: replace(one, **{part: replace(getattr(one, part), layers=1 + MORE)}) for part in PARTS}


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name() -> str:
    facts = harness.machine(device())
    return facts.get("gpu") or f"{facts['cpu']}, {harness.threads(facts)}"


def seconds(config: MirasolConfig, snippets: int, words: int, fps: int) -> dict[str, float]:
    """Of a training step of one clip, without the optimiser, of each of `shallow`; bfloat16 autocast."""
    torch.manual_seed(0)
    with torch.device(device()):
        model = Mirasol(shallow(config)[BASE])
        frames, size = snippets * config.video.frames, config.video.size
        video = torch.randint(256, (1, 3, frames, size, size), dtype=torch.uint8)
        audio = torch.randn(1, frames * config.audio.sample_rate // fps)
        text = torch.full((1, words), config.text.eos + 1)
    blocks = {part: getattr(model, part).blocks for part in PARTS}

    def step(deeper: str) -> None:
        for part in PARTS:  # one layer many times: as much to compute as many, but for the optimiser
            getattr(model, part).blocks = nn.ModuleList(list(blocks[part]) * (1 + MORE * (part == deeper)))
        with torch.autocast(device(), torch.bfloat16):
            loss = model(video, audio, text, labels=text).loss
        assert loss is not None
        loss.backward()

    steps = {name: partial(step, name) for name in (BASE, *PARTS)}
    times = harness.interleave(steps, rounds=9, budget=15.0, device=device())
    return {name: timing.median for name, timing in times.items()}


def rates(flops: Mapping[str, int], seconds: Mapping[str, float]) -> dict[str, float]:
    """Flops a second of each part, and of the "rest" of the model; both arguments of each of `shallow`.

    Raises ValueError where layers took no time, as on a machine that is not quiet.
    """
    found, rest = {}, (float(flops[BASE]), seconds[BASE])
    for part in PARTS:
        found[part] = work, time = float(flops[part] - flops[BASE]), seconds[part] - seconds[BASE]
        rest = rest[0] - work / MORE, rest[1] - time / MORE
    found["rest"] = rest
    for part, (_, time) in found.items():
        if time <= 0:
            raise ValueError(f"--measure: expected {part} to take time, got {time:.2g} s: is the machine quiet?")
    return {part: work / time for part, (work, time) in found.items()}
