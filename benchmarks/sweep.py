"""The model over growing clips: time, frames per second, peak memory and error, per backend. Table, JSON and PNG.

python -m benchmarks.sweep --frames 16 32 64 128 256 512 [--clip PATH] [--preset small] [--train] [--out DIR]
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import mirasol_kernels
from benchmarks import harness
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import PRESETS
from mirasol_model.media import Clip, read_clip

SAMPLE = harness.ROOT / "examples" / "sample.mp4"
FRAMES = (16, 32, 64, 128, 256, 512)
COMBINERS = {
    "all": "a transformer over all snippets so far",
    "current": "a transformer over the current snippet",
    "ttm": "a Token Turing Machine",
    "perceiver": "a Perceiver of the current snippet",
    "token_learner": "a token learner of the current snippet",
}
Results = dict[str, list[torch.Tensor]]
BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
TEXT = b"Which ball hits the wall first, and which one rings the lowest?"
TIMING_SECONDS = 4.0  # per size of clip, over all backends; at least three rounds
EXACT_SECONDS = 45.0  # the float64 reference is left out where it would take longer


class Job(NamedTuple):
    """What one fresh process measures, and all that it needs to know."""

    clip: str
    preset: str
    combiner: str
    frames: int
    backend: str
    train: bool
    device: str


def configure(preset: str, combiner: str) -> MirasolConfig:
    config = MirasolConfig.preset(preset).to_dict()
    kind, context = ("transformer", combiner) if combiner in ("all", "current") else (combiner, "current")
    config["combiner"] |= {"kind": kind, "context": context}
    return MirasolConfig.from_dict(config)


def build(config: MirasolConfig, device: str) -> Mirasol:
    torch.manual_seed(0)
    return Mirasol(config).to(device).eval()


def load(path: str, config: MirasolConfig, frames: int) -> Clip:
    return read_clip(path, frames=frames, size=config.video.size, sample_rate=config.audio.sample_rate)


def first(clip: Clip, frames: int, device: str) -> Clip:
    """The beginning of a clip, its sound cut to the same time."""
    samples = 0 if clip.audio is None else frames * clip.audio.shape[0] // clip.video.shape[1]
    audio = None if clip.audio is None else clip.audio[:samples].to(device)
    return Clip(clip.video[:, :frames].to(device), audio, clip.fps)


def step(model: Mirasol, clip: Clip, backend: str | None, train: bool) -> Results:
    """One pass over the clip and a question about it; with `train` also back. -> what its error is measured on."""
    like = next(model.parameters())
    video = clip.video[None].to(like.dtype)  # (1, 3, frames, size, size)
    audio = None if clip.audio is None else clip.audio[None].to(like.dtype)  # (1, samples)
    text = torch.tensor([[3 + byte for byte in TEXT]], device=like.device)  # (1, L)
    model.zero_grad()
    with mirasol_kernels.use_backend(backend), torch.set_grad_enabled(train):
        out = model(video, audio, text, labels=text if train else None)
        if train:
            out.loss.backward()
    found = {"logits": [out.logits.detach()], "latents": [out.latents.detach()]}
    if train:
        found["gradients"] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return found


def prepare(job: Job) -> Callable[[], int]:
    """In a fresh process: everything but the step, whose memory is watched."""
    config = configure(job.preset, job.combiner)
    model, clip = build(config, job.device), first(load(job.clip, config, job.frames), job.frames, job.device)

    def work() -> int:
        step(model, clip, job.backend, job.train)
        return sum(parameter.numel() for parameter in model.parameters())

    return work


def serving(model: Mirasol, clip: Clip, combiner: str, train: bool, device: str) -> tuple[list[str], list[str]]:
    """-> the backends that run this model here, and why the others do not. Two passes each: they warm up as well."""
    serve, notes = [], []
    for backend in BACKENDS[device]:
        try:
            for _ in range(2):
                step(model, first(clip, min(clip.video.shape[1], 16), device), backend, train)
            serve.append(backend)
        except NotImplementedError as refusal:
            notes.append(f"{combiner}: {refusal}")
    return serve, notes


def measure(
    clip: Clip, models: tuple[Mirasol, Mirasol], jobs: Sequence[Job], bar: tqdm
) -> tuple[list[dict[str, Any]], list[str]]:
    """One size of clip on every backend. models: in float32, and the same weights in float64.

    -> rows of the table, and what could not be measured, with reasons.
    """
    model, exact_model = models
    combiner, frames, train, device = jobs[0].combiner, jobs[0].frames, jobs[0].train, jobs[0].device
    clip, notes = first(clip, frames, device), []
    outputs: dict[str, Results] = {}

    def run(backend: str) -> None:
        outputs[backend] = step(model, clip, backend, train)

    bar.set_description(f"{frames} frames, {combiner}: timing")
    candidates = {job.backend: partial(run, job.backend) for job in jobs}
    timings = harness.interleave(candidates, warmup=0, budget=TIMING_SECONDS, device=device)
    bar.update(frames * len(jobs))

    bar.set_description(f"{frames} frames, {combiner}: float64")
    exact = None
    if (expected := 2 * timings["reference"].median) <= EXACT_SECONDS:  # twice the bytes, half the flop/s
        exact = step(exact_model, clip, "reference", train)
        exact_model.zero_grad()
    else:
        notes.append(f"{combiner}: no error at {frames} frames: float64 would take about {expected:.0f} s")
    bar.update(frames)

    rows = []
    for job in jobs:
        bar.set_description(f"{frames} frames, {job.combiner}: memory of {job.backend}")
        memory, parameters = harness.peak_memory(prepare, job, device=device)
        bar.update(frames)
        error = exact and max(harness.error(outputs[job.backend][name], exact[name]) for name in exact)
        timing = timings[job.backend]
        rows.append(
            {
                "combiner": job.combiner,
                "frames": frames,
                "backend": job.backend,
                "seconds": timing.median,
                "seconds_low": timing.low,
                "seconds_high": timing.high,
                "rounds": timing.rounds,
                "frames_per_second": frames / timing.median,
                "peak_bytes": memory.peak,
                "step_bytes": memory.peak - memory.before,
                "error": error,
                "parameters": parameters,
            }
        )
    return rows, notes


HEADER = (
    f"{'frames':>6}  {'combiner':<13} {'backend':<9} {'ms':>8} {'10 .. 90 %':>17} {'frames/s':>8} "
    f"{'peak MB':>8} {'step MB':>8} {'error':>8} {'parameters':>11}"
)


def line(row: dict[str, Any]) -> str:
    spread = f"{row['seconds_low'] * 1e3:.1f} .. {row['seconds_high'] * 1e3:.1f}"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    return (
        f"{row['frames']:>6}  {row['combiner']:<13} {row['backend']:<9} {row['seconds'] * 1e3:>8.1f} {spread:>17} "
        f"{row['frames_per_second']:>8.1f} {row['peak_bytes'] / 1e6:>8.0f} {row['step_bytes'] / 1e6:>8.0f} "
        f"{error:>8} {row['parameters']:>11,}"
    )


def introduction(report: dict[str, Any], config: MirasolConfig) -> str:
    machine, limits = report["machine"], report["ceilings"]
    where = f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, {machine['isa']}"
    gemm = ", ".join(f"{name} {value / 1e9:,.0f} Gflop/s" for name, value in limits.items() if name != "copy")
    task = "training step (forward and backward)" if report["train"] else "forward pass (no gradients)"
    sound = "with sound" if report["sound"] else "without sound"
    lines = (
        f"Mirasol {report['preset']}, {task}, batch 1, float32, snippets of {config.video.frames} frames",
        f"clip: {report['clip']}, {config.video.size} px, {report['fps']:g} frames/s, {sound}",
        f"{where}, torch {machine['torch']}; {gemm}, copy {limits['copy'] / 1e9:,.0f} GB/s",
        *(f"combiner {name}: {COMBINERS[name]}" for name in report["combiners"]),
        "peak: of a fresh process, step: what the step adds to it; error: against the float64 reference, relative",
    )
    return "\n".join(lines)


def sweep(options: argparse.Namespace, clip: Clip, device: str) -> dict[str, Any]:
    """Measure, and print each row when it is known. -> the report: where it was measured, rows, notes."""
    report: dict[str, Any] = {
        "machine": harness.machine(device),
        "ceilings": harness.ceilings(device),
        "preset": options.preset,
        "combiners": list(dict.fromkeys(options.combiner)),
        "train": options.train,
        "clip": Path(options.clip).name,
        "fps": clip.fps,
        "sound": clip.audio is not None,
        "rows": [],
        "notes": [],
    }
    print(introduction(report, MirasolConfig.preset(options.preset)), HEADER, sep="\n\n", flush=True)
    sizes, known = sorted(set(options.frames)), BACKENDS[device]
    total = sum(sizes) * len(report["combiners"]) * (1 + 2 * len(known))
    form = "{desc:<42} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, bar_format=form, dynamic_ncols=True, disable=None) as bar:  # on a terminal only
        for combiner in report["combiners"]:
            model = build(configure(options.preset, combiner), device)
            models = model, copy.deepcopy(model).double()
            backends, notes = serving(model, clip, combiner, options.train, device)
            report["notes"] += notes
            for frames in sizes:
                job = Job(str(options.clip), options.preset, combiner, frames, "", options.train, device)
                rows, notes = measure(clip, models, [job._replace(backend=name) for name in backends], bar)
                for row in rows:
                    bar.write(line(row), file=sys.stdout)
                report["rows"] += rows
                report["notes"] += notes
                bar.update(2 * frames * (len(known) - len(backends)))
            counts = {row["parameters"] for row in report["rows"] if row["combiner"] == combiner}
            assert len(counts) == 1, f"{combiner}: the parameter count depends on the length of the clip: {counts}"
    return report


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of frames, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=positive, nargs="+", default=list(FRAMES), help="sizes of the clip")
    parser.add_argument("--clip", default=SAMPLE, help="a video file (default: the sample clip)")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument(
        "--combiner",
        choices=COMBINERS,
        nargs="+",
        default=["all"],
        help="; ".join(f"{name}: {meaning}" for name, meaning in COMBINERS.items()) + " (default: all)",
    )
    parser.add_argument("--train", action="store_true", help="a training step instead of a forward pass")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [options.out / "sweep.json", options.out / "sweep.png"]
    try:  # what can be wrong with the arguments is found out before anything is measured
        from benchmarks import plot  # needs matplotlib

        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError(f"{options.out}: no permission to write into this folder")
        clip = load(options.clip, MirasolConfig.preset(options.preset), max(options.frames))
    except (OSError, ValueError, ImportError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    report = sweep(options, clip, device)
    for note in report["notes"]:
        print(f"note: {note}")
    files[0].write_text(json.dumps(report, indent=1) + "\n")
    plot.draw(report, files[1])
    print(f"wrote {files[0]} and {files[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
