"""The Combiner by itself: what its last layer saves by computing only what leaves, and its kinds side by side.

python -m benchmarks.combiner pruning [--preset base] [--snippets 4] [--layers 2 4 6 8] [--contexts current all]
python -m benchmarks.combiner kinds [--preset small] [--frames 16 32 64 128 256 512] [--combiner all current ttm ...]

Both print a table and write JSON into --out. `benchmarks.sweep` has the kinds within the whole model.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.sweep import positive
from benchmarks.whole import COMBINERS, FRAMES, configure, tokens_of
from mirasol_model import MirasolConfig
from mirasol_model.combiner import Combiner, TransformerCombiner, build_combiner
from mirasol_model.config import PRESETS, CombinerConfig

# What pruning is shown for: m 32 of n 326, queries included.
VIDEO, AUDIO, LEAVING = 278, 16, 32
TOKENS = VIDEO + AUDIO + LEAVING
TIMING_SECONDS = 4.0  # per comparison, over all candidates; at least three rounds
NAMES = {False: "forward", True: "training step"}


def sources_of(video: int, audio: int, snippets: int, dim: int, device: str) -> list[Tensor]:
    """Random tokens (1, T, n, d) of picture and sound."""
    return [torch.randn(1, snippets, n, dim, device=device) for n in (video, audio)]


def working(combiner: Combiner, sources: Sequence[Tensor], train: bool) -> Callable[[], Any]:
    """A forward pass, or forward and backward to every parameter and to the encoders."""
    if not train:
        return torch.no_grad()(lambda: combiner(*sources))
    leaves = [*(x.requires_grad_() for x in sources), *combiner.parameters()]
    rows, snippets, _, dim = sources[0].shape
    cotangent = torch.randn(rows, snippets, combiner.config.tokens, dim, device=sources[0].device)
    # A Token Turing Machine does not need what it writes after its last snippet.
    return lambda: torch.autograd.grad(combiner(*sources), leaves, cotangent, allow_unused=True)


def times(timing: harness.Timing) -> dict[str, Any]:
    return {
        "seconds": timing.median,
        "seconds_low": timing.low,
        "seconds_high": timing.high,
        "rounds": timing.rounds,
    }


def milliseconds(row: dict[str, Any]) -> str:
    spread = f"{row['seconds_low'] * 1e3:,.1f} .. {row['seconds_high'] * 1e3:,.1f}"
    return f"{row['seconds'] * 1e3:>9,.1f} {spread:>20}"


# --------------------------------------------------------------------------------------------------------- pruning


class Leaving(nn.Module):
    """In the place of a last block: what leaves is picked here, so all blocks before it compute every token."""

    def forward(self, x: Tensor, attend: Callable, leave: Callable[[Tensor], Tensor], recompute: bool) -> Tensor:
        return leave(x)


def unpruned(combiner: TransformerCombiner) -> TransformerCombiner:
    """The same function of the same parameters, without pruning."""
    other = copy.copy(combiner)
    other._modules = {**combiner._modules, "blocks": nn.ModuleList([*combiner.blocks, Leaving()])}
    return other


def flops(config: CombinerConfig, dim: int, snippets: int, tokens: int, *, pruned: bool, train: bool) -> int:
    """Of the matrix products of a transformer over `tokens` tokens a snippet, its queries included.

    Attention by the pairs that see each other: two products forward, five backward; a linear layer has one and two.
    """
    per_query = 2 * dim * (2 * dim + 2 * config.mlp_dim)  # query, out, up, down
    per_key = 2 * dim * 2 * dim
    keys = snippets * (snippets + 1) // 2 if config.context == "all" else snippets  # in snippets, over all that ask
    total = 0
    for layer in range(config.layers):
        asking = config.tokens if pruned and layer == config.layers - 1 else tokens
        linear = snippets * (asking * per_query + tokens * per_key)
        attention = 4 * asking * keys * tokens * dim
        total += 3 * linear + 7 * attention // 2 if train else linear + attention
    return total


def compare_pruning(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    preset = MirasolConfig.preset(options.preset)
    dim = preset.encoder.dim
    sources = sources_of(VIDEO, AUDIO, options.snippets, dim, device)
    for context in options.contexts:
        for layers in options.layers:
            config = replace(preset.combiner, context=context, layers=layers, tokens=LEAVING)
            pruned = TransformerCombiner(dim, config).to(device)
            candidates = {"pruned": pruned, "unpruned": unpruned(pruned)}
            for train in (False, True):
                works = {name: working(each, sources, train) for name, each in candidates.items()}
                timings = harness.interleave(works, warmup=0.01, budget=TIMING_SECONDS, device=device)
                for name, timing in timings.items():
                    is_pruned = name == "pruned"
                    work = flops(config, dim, options.snippets, TOKENS, pruned=is_pruned, train=train)
                    key = {"context": context, "layers": layers, "train": train, "candidate": name}
                    yield key | {"flops": work} | times(timing)


def show_pruning(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print them two by two as they come."""
    print(f"{'':<30} {'Gflop':>9} {'ms':>9} {'10 .. 90 %':>20} {'Gflop/s':>8}")
    done = []
    for pruned, whole in zip(rows, rows, strict=True):
        for row in (pruned, whole):
            what = f"{row['context']}, {row['layers']} layers, {row['candidate']}"
            rate = row["flops"] / row["seconds"] / 1e9
            print(f"{what:<30} {row['flops'] / 1e9:>9,.1f} {milliseconds(row)} {rate:>8,.1f}")
        saved = (1 - pruned[what] / whole[what] for what in ("flops", "seconds"))
        print("  {}: saves {:.1%} of the flops, {:.1%} of the time".format(NAMES[whole["train"]], *saved), flush=True)
        done += [pruned, whole]
    return done


# ----------------------------------------------------------------------------------------------------------- kinds


class Job(NamedTuple):
    """What one fresh process measures, and all that it needs to know."""

    preset: str
    combiner: str
    frames: int
    train: bool
    device: str


def prepare(job: Job) -> Callable[[], Any]:
    """All but the step, whose time is taken and, in a fresh process, its memory."""
    config = configure(job.preset, job.combiner)
    dim, snippets = config.encoder.dim, math.ceil(job.frames / config.video.frames)
    torch.manual_seed(0)
    combiner = build_combiner(dim, config.combiner).to(job.device)
    return working(combiner, sources_of(*tokens_of(config), snippets, dim, job.device), job.train)


def prepare_for_memory(job: Job) -> Callable[[], None]:
    """With nothing to send back from the process."""
    work = prepare(job)

    def watched() -> None:
        work()

    return watched


def parameters_of(preset: str, combiner: str) -> int:
    config = configure(preset, combiner)
    with torch.device("meta"):
        return sum(p.numel() for p in build_combiner(config.encoder.dim, config.combiner).parameters())


def compare_kinds(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    for frames in sorted(set(options.frames)):
        for train in (False, True):
            jobs = [Job(options.preset, name, frames, train, device) for name in dict.fromkeys(options.combiner)]
            works = {job.combiner: prepare(job) for job in jobs}
            timings = harness.interleave(works, warmup=0.01, budget=TIMING_SECONDS, device=device)
            del works
            for job in jobs:
                memory, _ = harness.peak_memory(prepare_for_memory, job, device=device)
                yield {
                    "combiner": job.combiner,
                    "frames": frames,
                    "train": train,
                    **times(timings[job.combiner]),
                    "peak_bytes": memory.peak,
                    "step_bytes": memory.peak - memory.before,
                    "parameters": parameters_of(job.preset, job.combiner),
                }


def show_kinds(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print them as they come."""
    print(
        f"{'frames':>6}  {'combiner':<13} {'':<13} {'ms':>9} {'10 .. 90 %':>20} {'step MB':>8} {'peak MB':>8} "
        f"{'parameters':>11}"
    )
    done = []
    for row in rows:
        print(
            f"{row['frames']:>6}  {row['combiner']:<13} {NAMES[row['train']]:<13} {milliseconds(row)} "
            f"{row['step_bytes'] / 1e6:>8,.1f} {row['peak_bytes'] / 1e6:>8,.0f} {row['parameters']:>11,}",
            flush=True,
        )
        done.append(row)
    return done


# ------------------------------------------------------------------------------------------------------------ both


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.combiner", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    pruning = commands.add_parser("pruning", help=f"the transformer with and without, m {LEAVING} of n {TOKENS}")
    pruning.add_argument("--preset", choices=PRESETS, default="base", help="widths and heads (default: base)")
    pruning.add_argument("--snippets", type=positive, default=4)
    pruning.add_argument("--layers", type=positive, nargs="+", default=[2, 4, 6, 8])
    pruning.add_argument("--contexts", choices=("current", "all"), nargs="+", default=["current", "all"])
    kinds = commands.add_parser("kinds", help="every kind over the length of the clip: time, memory, parameters")
    kinds.add_argument("--preset", choices=PRESETS, default="small")
    kinds.add_argument("--frames", type=positive, nargs="+", default=list(FRAMES), help="sizes of the clip")
    kinds.add_argument("--combiner", choices=COMBINERS, nargs="+", default=list(COMBINERS))
    for command in (pruning, kinds):
        command.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON (default: out)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    machine, limits = harness.machine(device), harness.ceilings(device)
    config = MirasolConfig.preset(options.preset)
    m = LEAVING if options.command == "pruning" else config.combiner.tokens
    print(f"Combiner of {options.preset}, width {config.encoder.dim}, m {m}, batch 1, float32, medians in turns")
    print(
        f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, {machine['isa']}, torch {machine['torch']};"
        f" gemm float32 {limits['gemm float32'] / 1e9:,.0f} Gflop/s, copy {limits['copy'] / 1e9:,.0f} GB/s\n"
    )
    report = {"machine": machine, "ceilings": limits, "preset": options.preset, "tokens": m}
    if options.command == "pruning":
        print(f"{VIDEO} tokens of picture, {AUDIO} of sound and {m} queries a snippet, {options.snippets} snippets")
        report |= {"n": TOKENS, "snippets": options.snippets, "rows": show_pruning(compare_pruning(options, device))}
    else:
        video, audio = tokens_of(config)
        print(f"{video} tokens of picture and {audio} of sound a snippet; step: memory that it adds in a fresh process")
        print(*(f"{name}: {COMBINERS[name]}" for name in options.combiner), sep="\n")
        report |= {"sources": [video, audio], "rows": show_kinds(compare_kinds(options, device))}
    file = options.out / f"combiner-{options.command}.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
