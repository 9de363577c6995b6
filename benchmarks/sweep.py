"""The model over growing clips: time, frames per second, peak memory and error, per backend. Table, JSON and PNG.

python -m benchmarks.sweep --frames 16 32 64 128 256 512 [--clip PATH] [--preset small] [--train] [--out DIR]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, headline, mirasol_pytorch
from benchmarks.bar import tqdm
from benchmarks.contest import first_line
from benchmarks.whole import (
    AUTOMATIC,
    COMBINERS,
    COMPILED,
    DTYPES,
    FRAMES,
    NOISE,
    RECOMPUTING,
    SAMPLE,
    TEXT,
    Job,
    Results,
    build,
    configure,
    first,
    load,
    prepare,
    runner,
    seconds_in_ops,
    step,
    tokens_of,
)
from mirasol_kernels.__main__ import instruction_set
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import PRESETS
from mirasol_model.media import Clip

BACKENDS = {"cpu": ("native", "reference"), "cuda": ("triton", "cuda", "reference")}
TIMING_SECONDS = 4.0  # per size of clip, over all backends; at least three rounds
EXACT_SECONDS = {"cpu": 45.0, "cuda": 5.0}  # the float64 reference is left out where it would take longer
LOOKS = {"cpu": 3, "cuda": 1}  # at memory, of which the least counts: a process has some 7 MB more, or has not
FAILED = "FAILED"  # how a note of --keep-going begins
DOUBLE = {"float32": 2, "bfloat16": 16}  # times as long as in this dtype it takes, about


def serving(
    model: Mirasol, clip: Clip, combiner: str, options: argparse.Namespace, device: str
) -> tuple[list[str], list[str]]:
    """-> the backends that run this model here, and why the others do not. Two passes each: they warm up as well.

    On a GPU the automatic choice stands for `triton` where one op of the model refuses that, as the Token Turing
    Machine's steps do in bfloat16: else there would be no time of what users get.
    """
    serve, notes, known = [], [], list(BACKENDS[device])
    for backend in known:
        call, wanted = runner(model, backend)
        try:
            for _ in range(2):
                step(model, first(clip, min(clip.video.shape[1], 16), device), wanted, options.train, call)
            serve.append(backend)
        except NotImplementedError as refusal:
            notes.append(f"{combiner}: {refusal}")
            if backend == "triton":
                known.insert(1, AUTOMATIC)  # the next one
    recomputing = [backend + RECOMPUTING for backend in serve if options.recompute]
    return serve + recomputing + [COMPILED] * options.compile, notes


def measure(
    clip: Clip, models: tuple[Mirasol, Mirasol], jobs: Sequence[Job], bar: tqdm, there: mirasol_pytorch.There | None
) -> tuple[list[dict[str, Any]], list[str]]:
    """One size of clip on every backend. models: in the dtype of the jobs, and the same weights in float64.

    there: somebody else's model in another process. -> rows of the table, and what could not be measured, with reasons.
    """
    model, exact_model = models
    combiner, frames, _, train, device = jobs[0][2:7]
    clip, notes = first(clip, frames, device), []
    works: dict[str, Any] = {}
    outputs: dict[str, Results] = {}

    def run(name: str, call: Callable[..., Any], backend: str | None) -> None:
        outputs[name] = step(model, clip, backend, train, call)

    bar.set_description(f"{frames} frames, {combiner}: timing")
    for job in jobs:
        work = partial(run, job.backend, *runner(model, job.backend))
        try:
            if device != "cpu" or job.backend == COMPILED:
                work()
            works[job.backend] = work
        except torch.OutOfMemoryError:
            notes.append(f"{combiner}: {job.backend} has too little memory for {frames} frames")
    others = {} if there is None else {mirasol_pytorch.NAME: there}
    timings = harness.interleave(works | others, warmup=0, budget=TIMING_SECONDS, device=device)
    bar.update(frames * len(jobs))

    bar.set_description(f"{frames} frames, {combiner}: float64")
    exact = None
    expected = DOUBLE[jobs[0].dtype] * timings["reference"].median if "reference" in timings else float("inf")
    if expected <= EXACT_SECONDS[device]:
        try:
            exact = step(exact_model, clip, "reference", train)
            exact_model.zero_grad()
        except torch.OutOfMemoryError:
            expected = float("inf")
    if exact is None:
        notes.append(f"{combiner}: no error at {frames} frames: float64 would take about {expected:.0f} s")
    bar.update(frames)

    rows = []
    for job in jobs:
        if job.backend not in timings:
            continue
        bar.set_description(f"{frames} frames, {combiner}: memory of {job.backend}")
        taken = [harness.peak_memory(prepare, job, device=device) for _ in range(LOOKS[device])]
        row = described(job, timings[job.backend], *min(taken, key=step_bytes))
        row["step_bytes_high"] = max(map(step_bytes, taken))
        bar.update(frames)
        work, timing = works[job.backend], timings[job.backend]
        row["snippet"] = model.config.video.frames
        row["joules"] = None if device == "cpu" else harness.energy(work)
        row["error"] = exact and max(harness.error(outputs[job.backend][name], exact[name]) for name in exact)
        if "reference" in timings and not job.backend.startswith(("reference", COMPILED)):
            row["speed_up"] = timings["reference"].median / timing.median
            if spent := seconds_in_ops(work, device):  # 0 where a profiler is not allowed to look at the GPU
                row["limit"] = timings["reference"].median / max(timing.median - spent, timing.median / 1000)
        rows.append(row)
    for name, other in others.items():
        row = described(jobs[0]._replace(backend=name), timings[name], other.memory(), other.parameters)
        rows.append(row | {"snippet": model.config.video.frames})
    return rows, notes


def step_bytes(taken: tuple[harness.Memory, int]) -> int:
    return taken[0].peak - taken[0].before


def described(job: Job, timing: harness.Timing, memory: harness.Memory, parameters: int) -> dict[str, Any]:
    return {
        "combiner": job.combiner,
        "frames": job.frames,
        "backend": job.backend,
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "rounds": timing.rounds,
        "frames_per_second": job.frames / timing.median,
        "peak_bytes": memory.peak,
        "step_bytes": step_bytes((memory, parameters)),
        "error": None,
        "parameters": parameters,
    }


@contextlib.contextmanager
def elsewhere(
    options: argparse.Namespace, config: MirasolConfig, frames: int
) -> Iterator[mirasol_pytorch.There | None]:
    """mirasol-pytorch's model of that size, where it was asked for and is like this one."""
    if options.mirasol_pytorch is None or (config.combiner.kind, config.combiner.context) != ("transformer", "current"):
        yield None
        return
    other = mirasol_pytorch.start(options.mirasol_pytorch, torch.get_num_threads())
    try:
        built = mirasol_pytorch.settings(config, frames, *tokens_of(config))
        yield mirasol_pytorch.There(other, built, frames, len(TEXT), options.train)
    finally:
        other.close()


HEADER = (
    f"{'frames':>6}  {'combiner':<13} {'backend':<22} {'ms':>8} {'10 .. 90 %':>17} {'frames/s':>8} "
    f"{'peak MB':>8} {'step MB':>8} {'error':>8} {'parameters':>11} {'speed-up':>8} {'limit':>6} {'joule':>7}"
)


def line(row: dict[str, Any]) -> str:
    spread = f"{row['seconds_low'] * 1e3:.1f} .. {row['seconds_high'] * 1e3:.1f}"
    error = "-" if row["error"] is None else f"{row['error']:.1e}"
    ratio, limit = (f"{row[key]:.2f}" if row.get(key) else "" for key in ("speed_up", "limit"))
    joule = f"{row['joules']:.2f}" if row.get("joules") else ""
    said = (
        f"{row['frames']:>6}  {row['combiner']:<13} {row['backend']:<22} {row['seconds'] * 1e3:>8.1f} {spread:>17} "
        f"{row['frames_per_second']:>8.1f} {row['peak_bytes'] / 1e6:>8.0f} {row['step_bytes'] / 1e6:>8.0f} "
        f"{error:>8} {row['parameters']:>11,} {ratio:>8} {limit:>6} {joule:>7}"
    )
    return said.rstrip()


def introduction(report: dict[str, Any], config: MirasolConfig) -> str:
    machine, limits = report["machine"], report["ceilings"]
    where = f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, {machine['isa']}"
    gemm = ", ".join(f"{name} {value / 1e9:,.0f} Gflop/s" for name, value in limits.items() if name != "copy")
    task = "training step (forward and backward)" if report["train"] else "forward pass (no gradients)"
    sound = "with sound" if report["sound"] else "without sound"
    lines = (
        f"Mirasol {report['preset']}, {task}, batch 1, {report['dtype']}, snippets of {config.video.frames} frames",
        f"clip: {report['clip']}, {config.video.size} px, {report['fps']:g} frames/s, {sound}",
        f"{where}, torch {machine['torch']}; {gemm}, copy {limits['copy'] / 1e9:,.0f} GB/s",
        *(f"combiner {name}: {COMBINERS[name]}" for name in report["combiners"]),
        "peak: of a fresh process, step: what the step adds to it; error: against the float64 reference, relative",
        "speed-up: over the reference; limit: what it would be if our ops took no time",
    )
    return "\n".join(lines)


SAME = ("machine", "kernels", "preset", "dtype", "train", "clip", "fps", "sound", "snippet")


def begun(options: argparse.Namespace, clip: Clip, device: str, path: Path) -> dict[str, Any]:
    """The report before anything is measured; with --resume, that of `path` where there is one.

    Raises ValueError where that is of something else: rows of one report must be comparable.
    """
    report: dict[str, Any] = {
        "machine": harness.machine(device),
        "kernels": instruction_set(),
        "preset": options.preset,
        "dtype": options.dtype,
        "combiners": list(dict.fromkeys(options.combiner)),
        "train": options.train,
        "clip": Path(options.clip).name,
        "fps": clip.fps,
        "sound": clip.audio is not None,
        "snippet": configure(options.preset, "all", options.snippet).video.frames,
        "rows": [],
        "notes": [],
    }
    if not (options.resume and path.exists()):
        return report | {"ceilings": harness.ceilings(device)}
    before = json.loads(path.read_text())
    for key in SAME:
        now = json.loads(json.dumps(report[key]))
        if before.get(key) != now:
            raise ValueError(f"--resume: {path}: expected {key} {now!r}, got {before.get(key)!r}")
    return before | {"combiners": list(dict.fromkeys(before["combiners"] + report["combiners"]))}


def missing(report: dict[str, Any], combiner: str, frames: int, candidates: Sequence[str]) -> bool:
    """Whether there are not rows of all of them yet; what there is of this size goes, since they take turns."""
    mine = [row for row in report["rows"] if (row["combiner"], row["frames"]) == (combiner, frames)]
    if set(candidates) <= {row["backend"] for row in mine}:
        return False
    report["rows"] = [row for row in report["rows"] if row not in mine]
    return True


def sweep(
    options: argparse.Namespace,
    report: dict[str, Any],
    clip: Clip,
    device: str,
    save: Callable[[dict[str, Any]], None] = lambda report: None,
) -> None:
    """Measure what is not in the report yet, and print each row when it is known.

    report: of `begun`. save: gets it whenever it has grown.
    """
    configs = {name: configure(options.preset, name, options.snippet) for name in dict.fromkeys(options.combiner)}
    print(introduction(report, configs[options.combiner[0]]), HEADER, sep="\n\n", flush=True)
    sizes, known = (
        list(dict.fromkeys(options.frames)),
        len(BACKENDS[device]) * (1 + options.recompute) + options.compile,
    )
    total = sum(sizes) * len(configs) * (1 + 2 * known)
    form = "{desc:<42} {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left"
    with tqdm(total=total, bar_format=form, dynamic_ncols=True, disable=None) as bar:  # on a terminal only
        for combiner, config in configs.items():
            model = build(config, device, options.dtype)
            models = model, copy.deepcopy(model).double()
            try:
                backends, notes = serving(model, clip, combiner, options, device)
            except Exception as failure:
                if not options.keep_going:
                    raise
                report["notes"].append(f"{FAILED} {combiner}: {first_line(failure)}")
                save(report)
                continue
            report["notes"] += [note for note in notes if note not in report["notes"]]
            theirs = [mirasol_pytorch.NAME] * (options.mirasol_pytorch is not None and combiner == "current")
            for frames in sizes:
                if not missing(report, combiner, frames, [*backends, *theirs]):
                    bar.update(frames * (1 + 2 * known))
                    continue
                job = Job(
                    str(options.clip), options.preset, combiner, frames, "", options.train, device, options.dtype,
                    options.snippet,
                )  # fmt: skip
                try:
                    with elsewhere(options, config, frames) as there:
                        every = [job._replace(backend=name) for name in backends]
                        rows, notes = measure(clip, models, every, bar, there)
                except Exception as failure:  # Triton's errors have no common class
                    if not options.keep_going:
                        raise
                    rows, notes = [], [f"{FAILED} {combiner}, {frames} frames: {first_line(failure)}"]
                for row in rows:
                    bar.write(line(row), file=sys.stdout)
                sys.stdout.flush()
                report["rows"] += rows
                report["notes"] += [note for note in notes if note not in report["notes"]]
                save(report)
                bar.update(2 * frames * (known - len(backends)))
            mine = [row for row in report["rows"] if row["combiner"] == combiner]
            counts = {row["parameters"] for row in mine if row["backend"] != mirasol_pytorch.NAME}
            assert len(counts) <= 1, f"{combiner}: the parameter count depends on the length of the clip: {counts}"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number of frames, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--frames", type=positive, nargs="+", default=list(FRAMES), help="sizes of the clip, in this order"
    )
    parser.add_argument("--clip", default=SAMPLE, help=f"a video file, or {NOISE!r} (default: the sample clip)")
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--snippet", type=positive, help="frames of a snippet (default: the preset's)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument(
        "--compile", action="store_true", help="the reference with its blocks through torch.compile as well"
    )
    parser.add_argument(
        "--recompute", action="store_true", help='with --train: each backend with recompute="snippet" as well'
    )
    parser.add_argument(
        "--combiner",
        choices=COMBINERS,
        nargs="+",
        default=["all"],
        help="; ".join(f"{name}: {meaning}" for name, meaning in COMBINERS.items()) + " (default: all)",
    )
    parser.add_argument(
        "--mirasol-pytorch",
        metavar="PYTHON",
        help="that package's model beside Combiner current, run by this Python (on a CPU)",
    )
    parser.add_argument("--train", action="store_true", help="a training step instead of a forward pass")
    parser.add_argument("--keep-going", action="store_true", help="when a size fails, note it and go on with the next")
    parser.add_argument(
        "--resume", action="store_true", help="add to the sweep.json in --out what it does not have yet"
    )
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    files = [options.out / "sweep.json", options.out / "sweep.png"]
    try:  # what can be wrong with the arguments is found out before anything is measured
        if options.mirasol_pytorch and device != "cpu":
            raise ValueError("--mirasol-pytorch runs on a CPU, and this sweep on a GPU")
        if options.recompute and not options.train:
            raise ValueError("--recompute: expected with --train: a forward pass keeps nothing for backward")
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError(f"{options.out}: no permission to write into this folder")
        clip = load(str(options.clip), configure(options.preset, "all", options.snippet), max(options.frames))
        report = begun(options, clip, device, files[0])
    except (OSError, ValueError, ImportError) as error:
        print(f"sweep: {error}", file=sys.stderr)
        return 2
    sweep(options, report, clip, device, lambda now: harness.write(now, files[0]))
    harness.write(report, files[0])
    for note in report["notes"]:
        print(f"note: {note}")
    if verdicts := headline.said(report):
        print(verdicts)
    if importlib.util.find_spec("matplotlib") is None:
        print(f"wrote {files[0]}; no picture, since matplotlib is not installed")
        return 0
    from benchmarks import plot

    plot.draw(report, files[1])
    print(f"wrote {files[0]} and {files[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
