"""Where the time of the encoder, of every Combiner and of the whole model goes, by kind of operation. Table and JSON.

python -m benchmarks.breakdown [--preset small] [--frames 64 256] [--combiner current all ttm ...] [--out DIR]

Times are an operation's own, as torch's profiler has them, mean of a few steps after a warm one; the optimizer is left
out.
"Fused" says what one pass each for norm + residual and for bias + GELU could save of a step at the very most: the time
of those operations now, less what the fused ones have to move at the machine's copy rate (below zero: they run in a
cache that is faster than that).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import harness
from benchmarks.combiner import NAMES, sources_of, tokens_of, working
from benchmarks.sweep import positive
from benchmarks.whole import COMBINERS, SAMPLE, build, configure, first, load
from benchmarks.whole import step as whole_step
from mirasol_model import MirasolConfig
from mirasol_model.config import PRESETS
from mirasol_model.media import Clip

KINDS = ("GEMM", "attention", "fused op", "LayerNorm", "GELU", "add", "bias", "copy", "other")
# By the name of an operation; the first that matches counts.
PATTERNS = (
    ("attention", r"scaled_dot_product|block_causal_attention"),
    ("fused op", r"mirasol_\w+::"),
    ("GEMM", r"::(addmm|mm|bmm|baddbmm|addbmm|matmul|linear)$"),
    ("LayerNorm", r"layer_norm"),
    ("GELU", r"gelu"),
    ("add", r"::add_?$"),
    ("copy", r"::(copy_|cat|stack|clone|contiguous|index|index_select|index_copy_?|index_put_?|fill_|zero_)$"),
)
# Passes over a tensor of tokens that nobody can avoid. Norm + residual reads both summands and writes sum and norm,
# backward reads two gradients and the sum and writes one. GELU with its bias reads and writes; backward reads the
# gradient and the product, and writes.
PASSES = {"native_layer_norm": 4, "native_layer_norm_backward": 4, "gelu": 2, "gelu_backward": 3}


FUSED = ("LayerNorm", "GELU")
STEPS = 2


def kind_of(event: Any) -> str:
    """A linear layer's bias is a copy under its product, and backward a sum."""
    parents, at = [], event.cpu_parent
    while at is not None:
        parents.append(at.name)
        at = at.cpu_parent
    if event.name == "aten::copy_" and any(name.endswith("addmm") for name in parents):
        return "bias"
    if event.name == "aten::sum" and any("AddmmBackward" in name for name in parents):
        return "bias"
    return next((kind for kind, pattern in PATTERNS if re.search(pattern, event.name)), "other")


def breakdown(work: Callable[[], Any], device: str) -> dict[str, Any]:
    """Of a step: seconds by kind of operation, the largest others, bytes that the two fused operations would move."""
    work()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device != "cpu")
    with profile(activities=activities, record_shapes=True) as profiler:
        for _ in range(STEPS):
            work()
    seconds: Counter[str] = Counter()
    others: Counter[str] = Counter()
    bytes_fused = dict.fromkeys(FUSED, 0.0)
    for event in profiler.events():
        own = (event.self_cpu_time_total if device == "cpu" else event.self_device_time_total) / 1e6 / STEPS
        kind = kind_of(event)
        seconds[kind] += own
        if kind == "other":
            others[event.name] += own
        passes = PASSES.get(event.name.removeprefix("aten::"))
        if passes and event.input_shapes and event.input_shapes[0]:
            size = torch.Size(event.input_shapes[0]).numel() * 4  # float32
            bytes_fused["GELU" if "gelu" in event.name else "LayerNorm"] += passes * size / STEPS
    return {
        "seconds": {kind: seconds[kind] for kind in KINDS},
        "others": dict(others.most_common(5)),
        "bytes_fused": bytes_fused,
    }


def at_most(row: dict[str, Any], copy_rate: float) -> dict[str, float]:
    """Share of the step that each fused operation saves if it runs at the copy rate, and nothing else got slower."""
    seconds, whole = row["seconds"], sum(row["seconds"].values())
    now = {"LayerNorm": seconds["LayerNorm"] + seconds["add"], "GELU": seconds["GELU"] + seconds["bias"]}
    return {kind: (now[kind] - row["bytes_fused"][kind] / copy_rate) / whole for kind in FUSED}


def parts(preset: str, combiner: str, clip: Clip, device: str, train: bool) -> Iterator[tuple[str, Callable[[], Any]]]:
    """What is profiled for a Combiner: itself on tokens as many as the clip has, and the model with it."""
    config = configure(preset, combiner)
    model = build(config, device)
    snippets = -(-clip.video.shape[1] // config.video.frames)
    sources = sources_of(*tokens_of(config), snippets, config.encoder.dim, device)
    yield f"Combiner {combiner}", working(model.combiner, sources, train)
    yield f"model, {combiner}", lambda: whole_step(model, clip, None, train)


def encoder(preset: str, clip: Clip, device: str, train: bool) -> Callable[[], Any]:
    """Pictures and sound of the clip, as the model encodes them."""
    config = MirasolConfig.preset(preset)
    vit = build(config, device).encoder
    snippets = -(-clip.video.shape[1] // config.video.frames)
    tokens = [x[0] for x in sources_of(*tokens_of(config), snippets, config.encoder.dim, device)]
    if not train:
        return torch.no_grad()(lambda: [vit(x) for x in tokens])
    leaves = [*(x.requires_grad_() for x in tokens), *vit.parameters()]
    cotangents = [torch.randn_like(x) for x in tokens]
    return lambda: torch.autograd.grad([vit(x) for x in tokens], leaves, cotangents)


def measure(options: argparse.Namespace, clip: Clip, device: str, copy_rate: float) -> Iterator[dict[str, Any]]:
    for frames in sorted(set(options.frames)):
        begin = first(clip, frames, device)
        for train in (False, True):
            works = [("encoder", encoder(options.preset, begin, device, train))]
            for combiner in dict.fromkeys(options.combiner):
                works += parts(options.preset, combiner, begin, device, train)
            for part, work in works:
                row = {"part": part, "frames": frames, "train": train} | breakdown(work, device)
                yield row | {"saved_at_most": at_most(row, copy_rate)}


def line(row: dict[str, Any]) -> str:
    whole = sum(row["seconds"].values())
    shares = " ".join(f"{row['seconds'][kind] / whole:>9.1%}" for kind in KINDS)
    saved = " ".join(f"{row['saved_at_most'][kind]:>7.1%}" for kind in FUSED)
    what = f"{row['frames']:>6}  {row['part']:<22} {NAMES[row['train']]:<13}"
    return f"{what} {whole * 1e3:>9,.1f} {shares} {saved}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breakdown", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--frames", type=positive, nargs="+", default=[64, 256], help="sizes of the clip")
    parser.add_argument("--combiner", choices=COMBINERS, nargs="+", default=list(COMBINERS))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for breakdown.json (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    machine, limits = harness.machine(device), harness.ceilings(device)
    clip = load(str(SAMPLE), MirasolConfig.preset(options.preset), max(options.frames))
    where = f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, {machine['isa']}"
    print(
        f"{options.preset}, batch 1, float32, {where}, torch {machine['torch']}, copy {limits['copy'] / 1e9:,.0f} GB/s"
    )
    kinds = " ".join(f"{kind:>9}" for kind in KINDS)
    print(f"{'frames':>6}  {'part':<22} {'':<13} {'ms':>9} {kinds}   fused: norm, GELU")
    rows = []
    for row in measure(options, clip, device, limits["copy"]):
        print(line(row), flush=True)
        rows.append(row)
    file = options.out / "breakdown.json"
    report = {"machine": machine, "ceilings": limits, "preset": options.preset, "rows": rows}
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
