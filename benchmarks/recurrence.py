"""What is sequential, what it keeps, and whether a stream stays as it is: time as a dimension.

python -m benchmarks.recurrence hoisting                       what of a Token Turing Machine's step is sequential
python -m benchmarks.recurrence memory [--steps 32 64 ... 512]  memory of forward and backward over growing time
python -m benchmarks.recurrence streaming [--snippets 10000] [--preset tiny] [--combiner ttm all]

Each prints a table and writes JSON (and, but for hoisting, a PNG) into --out.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks import harness
from benchmarks.cases.latent_recurrence import CASES, Case, loop, step_flops
from benchmarks.sweep import positive
from benchmarks.whole import COMBINERS, configure
from mirasol_kernels.latent_recurrence import latent_recurrence
from mirasol_kernels.latent_recurrence.reference import unit
from mirasol_kernels.latent_recurrence.scan import default_segment
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import PRESETS

FLOAT = 4  # bytes

# -------------------------------------------------------------------------------------------------------- hoisting


def sequential_flops(case: Case) -> int:
    """Of the matrix products of a step that sees memory and what it read, but no input."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        none = torch.zeros(1, 0, case.c)
        unit(torch.zeros(1, case.slots, case.c), none, torch.ones(1, 0, dtype=torch.bool), case.template())
    return counter.get_total_flops()


def hoisting() -> Iterator[dict[str, Any]]:
    """Of one step, batch 1: flops of matrix products; bytes of tokens and states that it reads, beside the weights,
    which it always reads; matrix products that wait for one another, which hoisting does not change."""
    for case in CASES.values():
        if case.kind != "machine" or case.batch > 1:
            continue
        seen, small = case.slots + case.n, case.slots + case.read
        yield {
            "case": case.name,
            "sizes": str(case),
            "flops": step_flops(case),
            "flops_sequential": sequential_flops(case),
            # read and write each look at memory and input; then at memory, output and two merged states
            "bytes": FLOAT * case.c * (2 * seen + case.read),
            "bytes_sequential": FLOAT * (case.c * (2 * case.slots + case.read) + small * (case.c + 2)),
            "bytes_weights": FLOAT * sum(x.numel() for x in case.weights(torch.Generator())),
            "dependent": 3 + 6 * case.layers + 3,  # a pool: hidden, logits, sum; a block: qkv, scores, values, 3 linear
        }


def show_hoisting(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    done = []
    for row in rows:
        flops, data = ([row[key], row[f"{key}_sequential"]] for key in ("flops", "bytes"))
        print(f"{row['case']}: {row['sizes']}")
        print(
            f"  sequential per step: {flops[0] / 1e6:,.0f} -> {flops[1] / 1e6:,.0f} Mflop ({flops[0] / flops[1]:.1f}x "
            f"fewer), {data[0] / 1e3:,.0f} -> {data[1] / 1e3:,.0f} kB of tokens and states ({data[0] / data[1]:.1f}x), "
            f"{row['bytes_weights'] / 1e6:.1f} MB of weights; {row['dependent']} dependent products before and after"
        )
        done.append(row)
    return done


# ---------------------------------------------------------------------------------------------------------- memory


def per_step(step: Callable, state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return loop(partial(checkpoint, step, use_reentrant=False), state, x)


RUNS: dict[str, Callable] = {
    "loop": loop,
    "checkpoint per step": per_step,
    "ours, K = 1": partial(latent_recurrence, checkpoint_every=1),
    "ours": latent_recurrence,
}


def training(name: str, steps: int) -> Callable[[], None]:
    """Forward and backward of a memory that attends to itself and its input, eight at a time."""
    harness.return_freed()
    case = CASES["block_batch"]
    weights, state, x = case.weights(torch.Generator().manual_seed(0)), *(
        torch.randn(case.batch, *sizes, case.c) for sizes in ((case.slots,), (steps, case.n))
    )  # fmt: skip
    for leaf in (*weights, state, x):
        leaf.requires_grad_()

    def work() -> None:
        end, y = RUNS[name](case.step(weights), state, x)
        (end.sum() + y.sum()).backward()  # their gradients take no memory

    short = x[:, :2].detach().requires_grad_()
    RUNS[name](case.step(weights), state, short)[0].sum().backward()  # what libraries keep for good
    for leaf in (*weights, state, x):
        leaf.grad = None
    return work


def memory(steps: Sequence[int]) -> Iterator[dict[str, Any]]:
    case = CASES["block_batch"]
    each = FLOAT * case.batch * case.c  # bytes of a token of every row
    for length in steps:
        for name in RUNS:
            taken, _ = harness.peak_memory(training, name, length)
            every = {"loop": None, "ours": default_segment(length)}.get(name, 1)
            kept = 0 if every is None else -(-length // every) * case.slots * each
            results = length * (case.read + case.n) * each  # the outputs, and the gradient of the inputs
            total = taken.peak - taken.before
            yield {
                "steps": length, "run": name, "bytes": total, "kept": kept, "results": results,
                "activations": total - kept - results,
            }  # fmt: skip


def show_memory(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    print("MB of forward and backward beyond parameters and inputs; activations: without kept states, outputs and the")
    print("gradient of the inputs")
    print(f"{'steps':>6}  {'':<22}{'all':>8}{'states':>8}{'activations':>13}")
    done: list[dict[str, Any]] = []
    for row in rows:
        all_, kept, rest = (f"{row[key] / 1e6:.1f}" for key in ("bytes", "kept", "activations"))
        print(f"{row['steps']:>6}  {row['run']:<22}{all_:>8}{kept:>8}{rest:>13}", flush=True)
        done.append(row)
    return done


# ------------------------------------------------------------------------------------------------------- streaming


def streaming(preset: str, combiners: Sequence[str], snippets: int) -> Iterator[dict[str, Any]]:
    """Seconds of a push, median of a hundredth of the snippets at a time, and resident memory after them."""
    torch.manual_seed(0)
    base = MirasolConfig.preset(preset)
    for combiner in combiners:
        model = Mirasol(configure(preset, combiner)).eval()
        stream = model.stream(window=16, sink=1)
        size, frames = base.video.size, base.video.frames
        video, audio = torch.rand(1, 3, frames, size, size), torch.rand(1, frames * base.audio.sample_rate // 25) - 0.5
        part = max(1, snippets // 100)
        for begin in tqdm(range(0, snippets, part), desc=combiner, leave=False):
            times = []
            for _ in range(min(part, snippets - begin)):
                start = time.perf_counter()
                stream.push(video, audio)
                times.append(time.perf_counter() - start)
            kept = sum(x.numel() * x.element_size() for x in stream.state_dict().values())
            timing = harness.summary(times)
            yield {
                "combiner": combiner, "snippets": stream.seen, "seconds": timing.median, "seconds_low": timing.low,
                "seconds_high": timing.high, "state_bytes": kept, "resident_bytes": _resident(),
            }  # fmt: skip


def _resident() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("VmRSS:"))


def show_streaming(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    done = list(rows)
    for combiner in dict.fromkeys(row["combiner"] for row in done):
        mine = [row for row in done if row["combiner"] == combiner]
        tenth = max(1, len(mine) // 10)
        for name, some in (("first tenth", mine[:tenth]), ("last tenth", mine[-tenth:])):
            middle = sorted(row["seconds"] for row in some)[len(some) // 2]
            last = some[-1]
            print(
                f"{combiner:<14} {name:<12} to snippet {last['snippets']:>6,}: {middle * 1e3:6.2f} ms a push, state "
                f"{last['state_bytes'] / 1e3:,.0f} kB, process {last['resident_bytes'] / 1e6:,.1f} MB"
            )
    return done


def draw(what: str, rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib import pyplot as plt

    from benchmarks.plot import PAGE

    by, x = ("run", "steps") if what == "memory" else ("combiner", "snippets")
    values = {"memory": {"bytes": ("all, MB", 1e-6), "activations": ("activations, MB", 1e-6)}}.get(
        what, {"seconds": ("a push, ms", 1e3), "resident_bytes": ("memory of the process, MB", 1e-6)}
    )
    with plt.rc_context(PAGE):
        figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
        for axes, (key, (label, scale)) in zip(panels, values.items(), strict=True):
            for name in dict.fromkeys(row[by] for row in rows):
                mine = [row for row in rows if row[by] == name]
                axes.plot([row[x] for row in mine], [row[key] * scale for row in mine], label=name)
            axes.set_xlabel(x)
            axes.set_ylabel(label)
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrence", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name in ("hoisting", "memory", "streaming"):
        command = commands.add_parser(name)
        command.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    commands.choices["memory"].add_argument("--steps", type=positive, nargs="+", default=[32, 64, 128, 256, 512])
    stream = commands.choices["streaming"]
    stream.add_argument("--snippets", type=positive, default=10_000)
    stream.add_argument("--preset", choices=PRESETS, default="tiny")
    stream.add_argument("--combiner", choices=COMBINERS, nargs="+", default=["ttm", "current"])
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.what == "hoisting":
        rows = show_hoisting(hoisting())
    elif options.what == "memory":
        rows = show_memory(memory(options.steps))
    else:
        rows = show_streaming(streaming(options.preset, options.combiner, options.snippets))
    file = options.out / f"recurrence-{options.what}.json"
    file.write_text(json.dumps({"machine": harness.machine(), "rows": rows}, indent=1) + "\n")
    if options.what != "hoisting":
        draw(options.what, rows, file.with_suffix(".png"))
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
