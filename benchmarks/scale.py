"""What a training step of one long clip costs on 1 to 64 GPUs, without a GPU: bytes moved, flops, memory of a rank.

python -m benchmarks.scale [--preset 3b] [--combiner current] [--frames 4096] [--gpus 1 2 4 8 ...] [--largest 80 141]
    [--layers FILE | --tflops 400] [--gbps 200]

Flops, bytes and messages are counted (`benchmarks.rank_step`). Time is not: that of arithmetic is the sum of the layers
of a step as `benchmarks.layer_times` has measured them, on whatever device (--layers, its file or that of a
`gpu_check`), or flops over a rate; that of messages is bytes over a rate. --tflops and --gbps are assumptions, and are
printed and written down as such. Without any there are no times. The optimiser, which computes next to nothing, is not
in them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks import harness, results
from benchmarks.layer_times import COMBINERS, GPUS, composed, device_name, flops_of, parts
from benchmarks.rank_step import APART, NEAR, far, near, step
from benchmarks.sweep import positive
from benchmarks.whole import configure
from mirasol_model import MirasolConfig
from mirasol_model.config import PRESETS

GB = 1e9
MEMORIES = (80, 141)  # GB of an H100 and of an H200


def count(config: MirasolConfig, frames: int, gpus: int, counted: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """`step`, or where that takes long `far`. counted: `near` of each number of GPUs, which is added to."""
    snippets, rest = divmod(frames, gpus * config.video.frames)
    if rest or snippets % APART or snippets <= 2 * NEAR[-1]:
        return step(config, frames, gpus)
    if gpus not in counted:
        counted[gpus] = near(config, gpus)
    row = far(counted[gpus], snippets)
    if config.combiner.context == "all":
        row["flops"] = flops_of(config, parts(config, row["snippets"], gpus))
    return row


class Rates(NamedTuple):
    """Seconds of the arithmetic of a row, bytes a second that a GPU receives, and where they come from."""

    seconds: Callable[[dict[str, Any]], float]
    received: float | None
    source: str

    def times(self, row: dict[str, Any]) -> dict[str, float]:
        """Seconds of a step: of arithmetic, of messages, and between all hidden behind the arithmetic and none."""
        times = {"compute_seconds": self.seconds(row)}
        if self.received is not None or row["gpus"] == 1:
            moved = row["tokens_received"] + row["parameters_received"]
            times["network_seconds"] = moved / self.received if self.received else 0.0
            times["least_seconds"] = max(times.values())
            times["most_seconds"] = times["compute_seconds"] + times["network_seconds"]
        return times


def read_rates(options: argparse.Namespace, config: MirasolConfig) -> Rates | None:
    """Of layers as they were measured, or assumed; None where nothing is known."""
    received = None if options.gbps is None else options.gbps * GB
    network = "" if received is None else f"; {options.gbps:g} GB/s ASSUMED"
    if options.layers is not None:
        found = [part for _, part in results.parts(json.loads(options.layers.read_text())) if "layers_of" in part]
        if [part["layers_of"] for part in found] != [options.preset]:
            raise ValueError(f"--layers: expected layer times of {options.preset!r}, got {options.layers}")
        (report,) = found
        rows = [row for row in report["rows"] if row["combiner"] == options.combiner]

        def summed(row: dict[str, Any]) -> float:
            return composed(config, row["snippets"], row["gpus"], rows)

        summed({"snippets": -(-options.frames // config.video.frames), "gpus": 1})  # refuses before all is counted
        return Rates(summed, received, f"layers MEASURED on {device_name(report['machine'])}{network}")
    if options.tflops is None:
        return None
    rate = options.tflops * 1e12
    return Rates(lambda row: row["flops"] / rate, received, f"{options.tflops:g} TFLOP/s ASSUMED{network}")


def largest(rows: Sequence[dict[str, Any]], limits: Sequence[float]) -> dict[str, Any]:
    """The longest clip, in steps of APART snippets, whose training step stays below each limit in GB on one GPU.

    rows: `near` of one GPU.
    """
    each = rows[0]["frames"] // rows[0]["snippets"]
    lines = [(row, rows[2]["peaks"][where]) for where, row in rows[1]["peaks"].items()]  # at the last two of NEAR
    steepest = max(high - low for low, high in lines)

    def steps(limit: float) -> int:
        if any(high <= low and low > limit for low, high in lines):
            return 0
        return min(NEAR[-1] // APART + int((limit - high) // (high - low)) for low, high in lines if high > low)

    return {
        "bytes_per_snippet": steepest / APART,
        "frames": {f"{limit:g}": max(0, APART * each * steps(limit * GB)) for limit in limits},
    }


def fits(peak: int) -> str:
    """The smallest GPU that has so much memory; it needs some more, which is not counted."""
    return next((f"{size} GB" for size in MEMORIES if peak <= size * GB), "none")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """One line per number of GPUs."""
    heads = ["GPUs", "snippets", "TFLOP", "at rest GB", "peak GB", "fits", "tokens GB", "parameters GB"]
    columns = ("compute_seconds", "network_seconds", "least_seconds", "most_seconds")
    timed = [key for key in columns if any(key in row for row in rows)]  # without --gbps one GPU alone has them all
    lines = [heads + [key.replace("_seconds", " s") for key in timed]]
    for row in rows:
        numbers = [row["flops"] / 1e12, *(row[f"{key}_bytes"] / GB for key in ("resting", "peak"))]
        cells = [*(f"{x:.4g}" for x in numbers), fits(row["peak_bytes"])]
        cells += [f"{row[f'{key}_received'] / GB:.4g}" for key in ("tokens", "parameters")]
        cells += [f"{row[key]:.4g}" if key in row else "" for key in timed]
        lines.append([str(row["gpus"]), str(-(-row["snippets"] // row["gpus"])), *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(x.rjust(w) for x, w in zip(line, widths, strict=True)) for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="3b")
    parser.add_argument("--combiner", choices=COMBINERS, default="current")
    parser.add_argument("--frames", type=positive, default=4096)
    parser.add_argument("--gpus", type=positive, nargs="+", default=list(GPUS))
    parser.add_argument("--largest", type=float, nargs="*", default=[], help="GB of one GPU: 80 141")
    parser.add_argument("--layers", type=Path, help="results file of benchmarks.layer_times, or of a gpu_check")
    parser.add_argument("--tflops", type=float, help="assumed rate of matmuls, in bfloat16")
    parser.add_argument("--gbps", type=float, help="assumed GB/s that a GPU receives")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON (default: out)")
    options = parser.parse_args(arguments)
    config = replace(configure(options.preset, options.combiner), recompute="snippet")
    if max(options.gpus) * config.video.frames > options.frames:
        parser.error(f"--gpus: expected a snippet of {config.video.frames} frames for each, got {max(options.gpus)}")
    try:
        rates = read_rates(options, config)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    shorter: dict[int, list[dict[str, Any]]] = {}
    rows = []
    for gpus in tqdm(options.gpus, disable=None):
        row = count(config, options.frames, gpus, shorter)
        row = {"times": rates.source if rates else "none"} | row | (rates.times(row) if rates else {})
        rows.append({key: x for key, x in row.items() if key != "peaks"})
    report: dict[str, Any] = {"machine": harness.machine(), "preset": options.preset, "combiner": options.combiner}
    text = [part for part in parts(config, rows[0]["snippets"], 1) if part.name.startswith("text")]
    report |= {"rows": rows, "text_flops": flops_of(config, text)}
    print(f"{options.preset}, Combiner {options.combiner}: a training step of one clip of {options.frames} frames,")
    print(f"{rows[0]['parameters'] / 1e9:.3g} billion parameters, bfloat16 autocast, AdamW; numbers of one rank")
    print(table(rows))
    shares = ", ".join(f"{report['text_flops'] / row['flops']:.0%} on {row['gpus']}" for row in (rows[0], rows[-1]))
    print(f"of that the text decoder, on every rank alike: {report['text_flops'] / 1e12:.4g} TFLOP, {shares}")
    print(
        f"times: {rates.source}" if rates else "no times: no layer is measured (--layers), no rate assumed (--tflops)"
    )
    if bends := [row["bend"] for row in rows if "bend" in row]:
        print(
            f"long clips: on lines through {', '.join(map(str, NEAR))} snippets a rank, off by {max(bends):.2g} there"
        )
    if options.largest:
        report["largest"] = longest = largest(shorter.get(1) or near(config, 1), options.largest)
        for limit, frames in longest["frames"].items():
            print(f"longest clip on one GPU of {limit} GB: {frames} frames")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"scale-{options.preset}-{options.combiner}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
