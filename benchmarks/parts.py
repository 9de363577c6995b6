"""Where the time of a training step goes, part by part, and what each part needs at least. Table and JSON.

python -m benchmarks.parts [--frames 64 512] [--combiner all current ...] [--preset small] [--clip PATH] [--out DIR]

A step is timed as it runs: wherever another part begins, in forward by the call of its module, in backward by the node
of autograd's graph, a stamp is taken (on a GPU an event), so that the parts are the whole step and nothing twice.
"Overhead" is what no part does: cutting clips into snippets, clearing gradients, what runs between the parts.

The floor of a part is the longer of its flops at the rate of this machine's GEMM and its bytes at the rate of its copy,
forward and backward each. Both are counted in one more step. Bytes are what has to pass between parts, and between
forward and backward of one: everything that a part reads and did not make, and what it makes and another reads, once.
What a part would save for backward it may also compute again, so a floor is of this code's choices, not of the task.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import harness
from benchmarks.flops import counted_ops
from benchmarks.sweep import positive
from benchmarks.whole import COMBINERS, DTYPES, NOISE, SAMPLE, build, configure, first, load
from benchmarks.whole import step as pass_over
from mirasol_model import Mirasol
from mirasol_model.config import PRESETS
from mirasol_model.media import Clip

DECODING, OVERHEAD, OPTIMIZER = "media decoding", "overhead", "optimizer"
PARTS = ("tokens", "encoder", "Combiner", "latent", "text", "losses", OPTIMIZER, OVERHEAD, DECODING)
DIRECTIONS = ("forward", "backward")
SECONDS = 20.0  # of timing a step; at least three rounds
Piece = tuple[str, str]  # part, direction
Switch = Callable[[Piece], None]
NOTHING: Piece = OVERHEAD, "forward"
OURS: Piece = "", "forward"  # what is done for these marks: no part of the step
# What looks at no more of its first tensor than it gives.
GATHERS = ("embedding", "index", "index_select", "gather")


def calls(model: Mirasol) -> Iterator[tuple[str, Any, str]]:
    """-> part, and whose attribute is called for it. A part that another one calls belongs to that one."""
    for part, owner in (("tokens", model.video_tokens), ("tokens", model.audio_tokens), ("encoder", model.encoder)):
        yield part, owner, "forward"
    yield "tokens", model, "_spectrogram"
    yield "Combiner", model.combiner, "step"
    yield "latent", model.latent, "forward"
    yield "text", model.text, "forward"
    yield "text", model.text, "remember"
    yield "losses", model, "_predict_next"
    yield "losses", sys.modules[Mirasol.__module__], "text_loss"
    yield "losses", model, "_total"


@contextmanager
def marked(model: Mirasol, switch: Switch) -> Iterator[Callable[..., Any]]:
    """-> the model as it is called, which says to `switch` which part begins, in forward and then in backward."""
    spans: list[tuple[int, int, str]] = []  # of numbers that autograd gives its nodes as they are made
    busy = False

    def within(part: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal busy
        if busy:
            return function(*args, **kwargs)
        busy, begin = True, torch.autograd._get_sequence_nr()
        switch((part, "forward"))
        try:
            return function(*args, **kwargs)
        finally:
            busy = False
            spans.append((begin, torch.autograd._get_sequence_nr(), part))
            switch(NOTHING)

    def call(*args: Any, **kwargs: Any) -> Any:
        spans.clear()
        out = model(*args, **kwargs)
        switch(OURS)
        for node in graph(out.loss):
            number = node._sequence_nr()
            part = next((part for begin, end, part in spans if begin <= number < end), OVERHEAD)
            if type(node).__name__ != "AccumulateGrad":  # it comes right after who made the gradient, as part of that
                node.register_prehook(lambda _, piece=(part, "backward"): switch(piece))
        switch(NOTHING)
        return out

    with ExitStack() as patches:
        for part, owner, name in calls(model):
            patches.enter_context(patch.object(owner, name, partial(within, part, getattr(owner, name))))
        yield call


def graph(loss: Tensor) -> Iterator[Any]:
    """All nodes that backward comes through."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [below for below, _ in node.next_functions]
            yield node


def train(model: Mirasol, clip: Clip, optimizer: torch.optim.Optimizer, switch: Switch, call: Any = None) -> None:
    """One step of training."""
    switch(NOTHING)
    pass_over(model, clip, None, True, call)
    switch((OPTIMIZER, "forward"))
    optimizer.step()
    switch(NOTHING)


class Stamps:
    """A `Switch` that takes the time, on a GPU that of its own stream."""

    def __init__(self, device: str) -> None:
        self.device, self.taken = device, list[tuple[Piece, Any]]()

    def __call__(self, piece: Piece) -> None:
        if self.taken and self.taken[-1][0] == piece:
            return
        stamp: Any = time.perf_counter()
        if self.device != "cpu":
            stamp = torch.cuda.Event(enable_timing=True)
            stamp.record()
        self.taken.append((piece, stamp))

    def seconds(self) -> dict[Piece, float]:
        """Of each piece, all times that it came; from the first stamp to the last."""
        if self.device != "cpu":
            torch.cuda.synchronize()
        found: dict[Piece, float] = defaultdict(float)
        for (piece, begin), (_, end) in itertools.pairwise(self.taken):
            if piece == OURS:
                continue
            found[piece] += end - begin if self.device == "cpu" else begin.elapsed_time(end) / 1e3
        return found


class Storage:
    """What is known of a storage: who made it, how many bytes of it were read by whom, whether anybody else did."""

    def __init__(self, maker: Piece | None) -> None:
        self.maker, self.shared = maker, False
        self.read: dict[Piece, int] = defaultdict(int)
        self.views: set[tuple] = set()


class Counts(TorchDispatchMode):
    """A `Switch` that counts flops and bytes of the pieces. Within a FlopCounterMode, which it asks."""

    def __init__(self, flops: FlopCounterMode) -> None:
        super().__init__()
        self.counter, self.piece = flops, NOTHING
        self.flops: dict[Piece, int] = defaultdict(int)
        self.bytes: dict[Piece, int] = defaultdict(int)
        self.so_far = 0
        self.known: dict[int, Storage] = {}

    def __call__(self, piece: Piece) -> None:
        total = self.counter.get_total_flops()
        self.flops[self.piece] += total - self.so_far
        self.so_far, self.piece = total, piece

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        name = func._opname
        if not (func.is_view or name.startswith("new_") or name.endswith("_like")):
            most = sum(x.nbytes for x in made) if name in GATHERS else None
            arguments = func._schema.arguments
            for argument, value in [*zip(arguments, args, strict=False), *((a, kwargs.get(a.name)) for a in arguments)]:
                for x in tree_iter(value):
                    if isinstance(x, Tensor):
                        self.move(x, most)
                        if argument.alias_info is not None and argument.alias_info.is_write:
                            self.move(x, None, written=True)
        for x in made:
            self.of(x, self.piece)
        return out

    def of(self, x: Tensor, maker: Piece | None) -> Storage:
        storage = x.untyped_storage()
        found = self.known.get(storage._cdata)
        if found is None:
            found = self.known[storage._cdata] = Storage(maker)
            weakref.finalize(storage, self.known.pop, storage._cdata, None)
        return found

    def move(self, x: Tensor, most: int | None, written: bool = False) -> None:
        """Count x as read or written by this piece, where it is not its own. most: bytes of it that are looked at."""
        found, whole = self.of(x, None), x.untyped_storage().nbytes()
        if found.maker == self.piece:
            return
        if not found.shared and found.maker is not None:
            found.shared = True
            self.bytes[found.maker] += whole
        view = self.piece, written, x.storage_offset(), x.shape, x.stride()
        if view not in found.views:
            found.views.add(view)
            size = min(x.nbytes if most is None else most, (1 + written) * whole - found.read[self.piece])
            found.read[self.piece] += size
            self.bytes[self.piece] += size


def count(model: Mirasol, clip: Clip, optimizer: torch.optim.Optimizer) -> Counts:
    with (
        counted_ops() as formulas,
        FlopCounterMode(display=False, custom_mapping=formulas) as flops,
        Counts(flops) as counts,
        marked(model, counts) as call,
    ):
        train(model, clip, optimizer, counts, call)
    return counts


def decoding(path: str, config: Any, frames: int, rounds: int = 3) -> tuple[list[float], int] | None:
    """Seconds of reading the clip from its file, and the bytes that are written then; None for a clip of noise."""
    if path == NOISE:
        return None
    seconds = [harness.clock(partial(load, path, config, frames)) for _ in range(rounds)]
    clip = load(path, config, frames)
    return seconds, sum(x.nbytes for x in (clip.video, clip.audio) if x is not None)


def measure(
    model: Mirasol, clip: Clip, device: str, dtype: str, limits: dict[str, float], seconds: float, read: Any
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """One size of clip -> a row for each part and direction, and the whole step with and without stamps.

    read: of `decoding`.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    train(model, clip, optimizer, lambda piece: None)  # the first makes the optimizer's state
    counts = count(model, clip, optimizer)
    took: dict[Piece, list[float]] = defaultdict(list)
    steps: dict[str, list[float]] = {"seconds": [], "without_stamps": []}
    start = time.perf_counter()
    while len(steps["seconds"]) < harness.LEAST_ROUNDS or time.perf_counter() - start < seconds:
        plain = partial(train, model, clip, optimizer, lambda piece: None)
        steps["without_stamps"].append(harness.clock(plain, device))
        stamps = Stamps(device)
        with marked(model, stamps) as call:
            train(model, clip, optimizer, stamps, call)
        found = stamps.seconds()
        steps["seconds"].append(sum(found.values()))
        for piece, spent in found.items():
            took[piece].append(spent)
    if read is not None:
        took[DECODING, "forward"], counts.bytes[DECODING, "forward"] = read
    gemm = max(limits[f"gemm {name}"] for name in {dtype, "float32"})  # halves may be widened
    rows = []
    for part in PARTS:
        for direction in DIRECTIONS:
            if (piece := (part, direction)) in took:
                times = harness.summary(took[piece])
                moved, flops = counts.bytes[piece], counts.flops[piece]
                floor = max(flops / gemm, moved / limits["copy"])
                rows.append(
                    {"part": part, "direction": direction, "seconds": times.median, "seconds_low": times.low,
                     "seconds_high": times.high, "rounds": times.rounds, "flops": flops, "bytes": moved, "floor": floor}
                )  # fmt: skip
    return rows, {name: statistics.median(each) for name, each in steps.items()}


def summarise(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Part -> its times of forward and backward, their sum, its share of the step, its floor, and how many times as
    fast the step would be if it took no more than that.

    Decoding is beside the step, since others can do it meanwhile, and nobody has counted what it needs.
    """
    total = sum(row["seconds"] for row in rows if row["part"] != DECODING)
    found: dict[str, dict[str, Any]] = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        mine = {row["direction"]: row for row in rows if row["part"] == part}
        seconds = sum(row["seconds"] for row in mine.values())
        found[part] = {direction: row["seconds"] for direction, row in mine.items()}
        found[part] |= {"seconds": seconds, "share": seconds / total}
        if part != DECODING:
            floor, flops, moved = (sum(row[key] for row in mine.values()) for key in ("floor", "flops", "bytes"))
            saved = sum(max(0.0, row["seconds"] - row["floor"]) for row in mine.values())
            found[part] |= {"flops": flops, "bytes": moved, "floor": floor, "of_floor": floor / seconds}
            found[part]["factor"] = total / (total - saved)
    return found


def next_factor(rows: Sequence[dict[str, Any]]) -> str:
    """Which part promises the most."""
    factors = {part: row["factor"] for part, row in summarise(rows).items() if "factor" in row}
    part = max(factors, key=factors.__getitem__)
    return f"next: {part}; at its floor the step would be {factors[part]:.2f} times as fast"


HEAD = ("part", "forward, ms", "backward, ms", "share", "Gflop", "MB", "floor, ms", "of floor", "factor")


def cells(rows: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """A line of `HEAD` for each part."""
    for part, row in summarise(rows).items():
        times = [f"{row[name] * 1e3:,.1f}" if name in row else "" for name in DIRECTIONS]
        needs = ["", "", "", "", ""]
        if "floor" in row:
            needs = [f"{row['flops'] / 1e9:,.1f}", f"{row['bytes'] / 1e6:,.0f}", f"{row['floor'] * 1e3:,.1f}"]
            needs += [f"{row['of_floor']:.0%}", f"{row['factor']:.2f}"]
        yield [part, *times, f"{row['share']:.1%}", *needs]


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [HEAD, *cells(rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    made = [
        "  ".join([line[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    ]
    return "\n".join(f"  {line}".rstrip() for line in [*made, next_factor(rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parts", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--frames", type=positive, nargs="+", default=[64, 512], help="sizes of the clip")
    parser.add_argument("--combiner", choices=COMBINERS, nargs="+", default=["all", "current"])
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--clip", default=str(SAMPLE), help=f"a video file, or {NOISE!r}, which nothing decodes")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of timing, per size and Combiner")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for parts.json (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = configure(options.preset, "all")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        clip = load(options.clip, config, max(options.frames))
    except (OSError, ValueError, ImportError) as error:
        print(f"parts: {error}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {
        "machine": harness.machine(device), "ceilings": harness.ceilings(device), "preset": options.preset,
        "dtype": options.dtype, "clip": Path(options.clip).name, "steps": [],
    }  # fmt: skip
    machine, limits, file = report["machine"], report["ceilings"], options.out / "parts.json"
    where = f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, {machine['isa']}"
    print(f"a training step of {options.preset}, batch 1, {options.dtype}, {where}, torch {machine['torch']}")
    for frames in dict.fromkeys(options.frames):
        read = decoding(options.clip, config, frames)
        for combiner in dict.fromkeys(options.combiner):
            model = build(configure(options.preset, combiner), device, options.dtype)
            rows, steps = measure(
                model, first(clip, frames, device), device, options.dtype, limits, options.seconds, read
            )
            spent, plain = (f"{steps[name] * 1e3:,.1f}" for name in ("seconds", "without_stamps"))
            print(
                f"{frames} frames, Combiner {combiner}: {spent} ms, without stamps {plain}",
                table(rows),
                sep="\n",
                flush=True,
            )
            report["steps"].append({"combiner": combiner, "frames": frames, **steps, "rows": rows})
            harness.write(report, file)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
