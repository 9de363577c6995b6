"""Memory of a training step over growing clips: what recompute="snippet" leaves of it.

python -m benchmarks.recompute [--frames 64 128 256 512] [--combiner all current ...] [--preset small] [--out DIR]

A step is forward and backward through all losses, batch 1, float32. Its memory is the peak of a fresh process beyond
what was there before it: parameters, their gradients and the inputs. Prints a table, writes JSON into --out. Its last
column is the growth of what is not keys and values, for which context "all" is allowed their size once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from benchmarks import harness
from benchmarks.sweep import positive
from benchmarks.whole import COMBINERS, NOISE_FPS, TEXT, build, configure, tokens_of
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import PRESETS

FRAMES = (64, 128, 256, 512)
FLOAT = 4  # bytes
HOW: tuple[Literal["none", "snippet"], ...] = ("none", "snippet")


class Job(NamedTuple):
    """What one fresh process measures, and all that it needs to know."""

    preset: str
    combiner: str
    recompute: Literal["none", "snippet"]
    frames: int
    device: str


def step_of(model: Mirasol, frames: int, device: str) -> Callable[[], Any]:
    """Forward and backward over a clip of noise."""
    video, rate = model.config.video, model.config.audio.sample_rate
    pixels = torch.randint(0, 256, (1, 3, frames, video.size, video.size), dtype=torch.uint8, device=device)
    sound = torch.rand(1, int(frames * rate / NOISE_FPS), device=device) - 0.5
    text = torch.tensor([[3 + byte for byte in TEXT]], device=device)  # (1, L)
    return lambda: model(pixels, sound, text, labels=text).loss.backward()


def prepare(job: Job) -> Callable[[], None]:
    """In a fresh process: everything but the step, whose memory is watched."""
    harness.return_freed()
    config = replace(configure(job.preset, job.combiner), recompute=job.recompute)
    model = build(config, job.device).train()
    step_of(model, 2 * config.video.frames, job.device)()  # gradients, and what libraries keep for good
    return step_of(model, job.frames, job.device)


def compact_bytes(config: MirasolConfig, frames: int) -> int:
    """The tokens x_t of all snippets, once."""
    return FLOAT * -(-frames // config.video.frames) * config.combiner.tokens * config.encoder.dim


def past_bytes(config: MirasolConfig, frames: int) -> int:
    """Keys and values of all snippets in all layers, which context "all" looks at; of whole snippets."""
    if config.combiner.context != "all":
        return 0
    tokens = sum(tokens_of(config)) + config.combiner.tokens
    return FLOAT * frames // config.video.frames * tokens * config.encoder.dim * 2 * config.combiner.layers


def memory(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    for combiner in options.combiner:
        for recompute in HOW:
            for frames in options.frames:
                job = Job(options.preset, combiner, recompute, frames, device)
                taken, _ = harness.peak_memory(prepare, job, device=device)
                config = configure(options.preset, combiner)
                yield {
                    "combiner": combiner,
                    "recompute": recompute,
                    "frames": frames,
                    "step_bytes": taken.peak - taken.before,
                    "compact_bytes": compact_bytes(config, frames),
                    "past_bytes": past_bytes(config, frames),
                }


def beyond(row: dict[str, Any]) -> int:
    """Bytes of a step beyond keys and values."""
    return row["step_bytes"] - row["past_bytes"]


def show(rows: Iterator[dict[str, Any]], frames: Sequence[int]) -> list[dict[str, Any]]:
    """Print them as they come; each line ends with what the longest clip takes over the shortest."""
    heads = "".join(f"{n:>8}" for n in frames) + f"{'growth':>9}{'beyond k, v':>13}"
    print(f"{'MB of a step':<14}{'recompute':<10}{heads}")
    done: list[dict[str, Any]] = []
    for row in rows:
        if row["frames"] == frames[0]:
            print(f"{row['combiner']:<14}{row['recompute']:<10}", end="")
            first = row
        print(f"{row['step_bytes'] / 1e6:>8,.0f}", end="", flush=True)
        if row["frames"] == frames[-1]:
            print(f"{row['step_bytes'] / first['step_bytes']:>9.2f}{beyond(row) / beyond(first):>13.2f}", flush=True)
        done.append(row)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recompute", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--frames", type=positive, nargs="+", default=list(FRAMES))
    parser.add_argument("--combiner", choices=COMBINERS, nargs="+", default=list(COMBINERS))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    rows = show(memory(options, device), options.frames)
    file = options.out / "recompute.json"
    file.write_text(
        json.dumps({"machine": harness.machine(device), "preset": options.preset, "rows": rows}, indent=1) + "\n"
    )
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
