"""How long the layers of a preset take here, one by one: `benchmarks.scale --layers` makes training steps of them.

python -m benchmarks.layer_times [--preset 3b] [--combiner current all] [--frames 4096] [--gpus 1 2 4 8 ...]
    [--most SNIPPETS] [--whole] [--out DIR]

A model with one layer of each kind, at the widths of its preset, is all that is in memory. What a step is made of (its
`parts`) runs as it does there, with recompute="snippet" in bfloat16 autocast: forward, again, and backward, on the GPU
if there is one. A step of a rank takes the sum of its parts times how often it calls them. Left out are the optimiser
and what only a whole step has to do: cutting the clip, joining the pieces. --whole times that as well, on one rank, for
models that fit: it shows how much of a step the parts explain. --most bounds the snippets of a call where a step's own
call would take too long: from there seconds grow as flops do. That is for what is linear in its tokens, or for
attention in its pairs; the text decoder, which is neither, is always given the whole clip.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import set_checkpoint_early_stop

from benchmarks import harness
from benchmarks.flops import counted_ops
from benchmarks.rank_step import FPS, WORDS, Live, fake_model
from benchmarks.sweep import positive
from benchmarks.whole import configure
from mirasol_kernels import SnippetLayout, block_causal_attention, explain
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import PRESETS
from mirasol_model.layers import Rotary, recomputed, rotary, rotate
from mirasol_model.losses import Reconstruction
from mirasol_model.model import AT_A_TIME
from mirasol_model.packing import last_tokens, look_back
from mirasol_model.text import Memory

COMBINERS = ("current", "all")  # those whose flops are all matmuls and attention
GPUS = (1, 2, 4, 8, 16, 32, 64)
WHOLE = "whole step"
WARMUP = 0.05  # seconds, for each of some 65 calls
NOT_LINEAR = ("text",)  # in its snippets: a call is never made smaller
Work = Callable[[], None]


class Part(NamedTuple):
    name: str
    snippets: int  # of one call
    calls: float  # of that size in a step; a fraction where it is a share of what all ranks do


def parts(config: MirasolConfig, snippets: int, gpus: int) -> list[Part]:
    """What rank 0 of so many does in a training step of one clip of so many snippets."""
    own = -(-snippets // gpus)
    few = min(own, 2 * AT_A_TIME)  # what runs in pieces of AT_A_TIME snippets
    each, predicted = own / few, (own - 1) / few
    context, layers = config.combiner.context, config.combiner.layers - 1  # the last one is another
    found = [Part("tokens", few, each), Part("encoder", few, each * config.encoder.layers)]
    if context == "current":
        found += [Part("combiner current", few, each * layers), Part("combiner current last", few, each)]
    else:
        found += [Part("combiner all", own, layers), Part("combiner all last", own, 1)]
        found += [Part("attention all", snippets, layers / gpus), Part("attention all last", snippets, 1 / gpus)]
    latent = config.latent.layers
    found += [Part("latent", own, latent), Part("latent ends", own, 1), Part("latent loss", few, predicted)]
    found += [Part("attention latent", snippets, latent / gpus)]
    if gpus > 1:  # where keys go round in a ring backward computes forward by itself once more
        rings = [part for part in found if part.name.startswith("attention")]
        found += [part._replace(name=f"{part.name} forward") for part in rings]
    found += [Part("video loss", few, predicted), Part("audio loss", few, predicted)]
    found += [Part("text", snippets, config.text.layers), Part("text ends", snippets, 1)]
    return [part for part in found if part.calls]


def shallow(config: MirasolConfig) -> MirasolConfig:
    """One layer of each kind; the reconstructions, which are small, are whole."""
    depths = {"encoder": 1, "combiner": 2, "latent": 1, "text": 1}
    return replace(config, **{part: replace(getattr(config, part), layers=n) for part, n in depths.items()})


class Layers:
    """The parts of one preset, to be called. fake: within FakeTensorMode, to be counted."""

    def __init__(self, config: MirasolConfig, device: str, fake: bool = False) -> None:
        self.config, self.device, self.dim = config, device, config.encoder.dim
        torch.manual_seed(0)
        with torch.device(device):
            self.model = fake_model(shallow(config)) if fake else Mirasol(shallow(config))
        self.first, self.last = list(self.model.combiner.blocks)  # type: ignore[arg-type]
        ends = self.model.encoder, self.model.latent, self.model.text
        self.encoder, self.latent, self.text = (module.blocks[0] for module in ends)
        for module in ends:  # what is left of them is all but the layers
            module.blocks = nn.ModuleList()

    def work(self, name: str, snippets: int) -> Work:
        """One call of a part on so many snippets: forward, again, and backward."""
        kind, _, more = name.partition(" ")
        inputs, call = getattr(self, f"_{kind}")(more, snippets)

        def run() -> None:
            with torch.autocast(self.device, torch.bfloat16):
                outs = call()
            if outs:
                torch.autograd.backward(outs, [torch.ones_like(out) for out in outs])
            for x in inputs:
                x.grad = None

        return run

    def _made(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=dtype).requires_grad_()

    def _clips(self, snippets: int) -> Any:
        frames, size = snippets * self.config.video.frames, self.config.video.size
        video = torch.zeros(1, 3, frames, size, size, dtype=torch.uint8, device=self.device)
        return self.model.read(video, self._made(1, frames * self.config.audio.sample_rate // FPS).detach())

    def _counts(self) -> list[int]:
        return [int(count[0, 0]) for count in self.model.counts(self._clips(1))]  # type: ignore[index]

    def _tokens(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        clips = self._clips(snippets)
        pieces = [clips.part(i, min(i + AT_A_TIME, snippets)) for i in range(0, snippets, AT_A_TIME)]
        return [], lambda: [x for piece in pieces for x in again(self.model._sense, piece)]

    def _encoder(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        each = [self._made(rows, n, self.dim) for rows in pieces_of(snippets) for n in self._counts()]
        return each, lambda: [again(self.encoder, x, None) for x in each]

    def _combiner(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        heads, m = self.config.combiner.heads, self.config.combiner.tokens
        n = sum(self._counts()) + m
        block, asking = (self.last, m) if more.endswith("last") else (self.first, n)
        every = self.config.combiner.context == "all"
        # (rows, tokens, d): as one row all snippets, or as rows those of a piece
        shapes = [(1, snippets * n)] if every else [(rows, n) for rows in pieces_of(snippets)]
        calls = []
        for rows, tokens in shapes:
            lengths = np.full((rows, tokens // n), n)
            leave = last_tokens(lengths, np.full_like(lengths, asking), True)
            x = self._made(rows, tokens, self.dim)
            if every:
                attend = self._turned(heads, snippets, asking, n)
                calls.append((partial(block, recompute=True), x, attend, leave))
            else:
                layout = look_back(lengths[:, :0], lengths, np.full_like(lengths, asking), 1, True)
                calls.append((partial(again, block), x, partial(attention, layout=layout), leave))
        return [x for _, x, _, _ in calls], lambda: [call(*args) for call, *args in calls]

    def _attention(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        whose, *rest = more.split()
        if whose == "latent":
            heads, m, window = self.config.latent.heads, self.config.combiner.tokens, self.config.latent.window
            n, layout = m, SnippetLayout.uniform(snippets, m, window=window, sink=self.config.latent.sink)
        else:
            heads, n = self.config.combiner.heads, sum(self._counts()) + self.config.combiner.tokens
            m = self.config.combiner.tokens if "last" in rest else n
            lengths = np.full((1, snippets), n)
            asking = np.full_like(lengths, m)
            layout = look_back(lengths[:, :0], lengths, asking, self.config.combiner.window, True)
        halves = [self._made(1, snippets * c, heads, self.dim // heads, dtype=torch.bfloat16) for c in (m, n, n)]

        def call() -> list[Tensor]:
            q, k, v = (x.transpose(1, 2) for x in halves)  # (B, H, N, D)
            if "forward" not in rest:
                return [again(attention, q, k, v, layout)]
            with torch.no_grad():
                attention(q, k, v, layout)
            return []

        return halves, call

    def _latent(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        m = self.config.combiner.tokens
        x = self._made(1, snippets, m, self.dim)
        if more == "loss":
            return [x], lambda: [self.model.latent_loss(x, x.detach())]
        if more == "ends":
            return [x], lambda: [self.model.latent(x)]
        y, attend = self._made(1, snippets * m, self.dim), self._turned(self.config.latent.heads, snippets, m, m)
        return [y], lambda: [self.latent(y, attend, recompute=True)]

    def _turned(self, heads: int, snippets: int, asking: int, tokens: int) -> Callable:
        """In the place of attention over snippets: all of it but attention; the last `asking` of their tokens ask."""

        def angles(each: int) -> Rotary:
            positions = torch.arange(snippets, device=self.device).repeat_interleave(each)
            return rotary(positions, self.dim // heads, torch.float32)

        far, near = angles(tokens), angles(asking)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            both = (rotate(k, far) + v).unflatten(2, (snippets, tokens))  # (B, H, T, n, D)
            return rotate(q, near) + both[:, :, :, -asking:].flatten(2, 3)  # a gradient for each, next to no work

        return attend

    def _video(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        return self._reconstruction(self.model.video_loss, self.model._picture, snippets)

    def _audio(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        return self._reconstruction(self.model.audio_loss, self.model._sound, snippets)

    def _reconstruction(self, loss: Reconstruction, sense: Callable, snippets: int) -> tuple[list[Tensor], Callable]:
        clips, pieces = self._clips(snippets), np.array_split(np.arange(snippets), len(pieces_of(snippets)))
        each = [self._made(len(rows), self.config.combiner.tokens, self.dim) for rows in pieces]

        def errors(h: Tensor, rows: np.ndarray) -> Tensor:
            return loss(h, loss.target(sense(clips, rows)))

        return each, lambda: [again(errors, *pair) for pair in zip(each, pieces, strict=True)]

    def _text(self, more: str, snippets: int) -> tuple[list[Tensor], Callable]:
        decoder, config = self.model.text, self.config.text
        words = torch.full((1, WORDS), config.eos + 1, device=self.device)
        if more == "ends":

            def ends() -> list[Tensor]:
                logits = decoder(words, Memory([], None))
                return [F.cross_entropy(logits.float().flatten(0, 1), words.flatten())]

            return [], ends
        h, x = self._made(1, snippets * self.config.combiner.tokens, self.dim), self._made(1, WORDS, config.dim)
        far, near = (
            rotary(torch.arange(y.shape[1], device=self.device), config.dim // config.heads, torch.float32)
            for y in (h, x)
        )
        block: Any = self.text
        return [h, x], lambda: [block(x, near, block.remember(h, far), None, lambda k, v: (k, v))]


def attention(q: Tensor, k: Tensor, v: Tensor, layout: SnippetLayout) -> Tensor:
    return block_causal_attention(q, k, v, layout)


def pieces_of(snippets: int) -> list[int]:
    return [min(AT_A_TIME, snippets - i) for i in range(0, snippets, AT_A_TIME)]


def again(function: Callable[..., Any], *args: Any) -> Any:
    """As `recomputed`, in the middle of what is recomputed together: all of it runs again."""
    with set_checkpoint_early_stop(False):
        return recomputed(function, *args)


def countable() -> bool:
    """Whether flops can be counted here: by the operators of the CPU's kernels, whatever runs on the GPU."""
    return explain("block_causal_attention")["native"] == "runs"


def counted(config: MirasolConfig, wanted: Sequence[tuple[str, int]]) -> list[int]:
    """Flops of calls of parts, by name and snippets."""
    with counted_ops() as formulas, FakeTensorMode(allow_non_fake_inputs=True):
        layers, found = Layers(config, "cpu", fake=True), []
        for call in wanted:
            work = layers.work(*call)
            with Live(formulas) as live:
                work()
            found.append(live.flops)
        return found


def sizes(config: MirasolConfig, snippets: int, gpus: Sequence[int], most: int | None) -> list[tuple[str, int]]:
    """The calls that have to be timed."""
    found = [part for n in gpus for part in parts(config, snippets, n)]
    most = snippets if most is None else most
    calls = [(x.name, x.snippets if x.name in NOT_LINEAR else min(x.snippets, most)) for x in found]
    return list(dict.fromkeys(calls))


def whole_step(config: MirasolConfig, snippets: int, device: str) -> Work:
    """Forward and backward of the model itself."""
    frames, size = snippets * config.video.frames, config.video.size
    torch.manual_seed(0)
    with torch.device(device):
        model = Mirasol(config)
        video = torch.randint(256, (1, 3, frames, size, size), dtype=torch.uint8)
        audio = torch.randn(1, frames * config.audio.sample_rate // FPS)
        text = torch.full((1, WORDS), config.text.eos + 1)

    def work() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = model(video, audio, text, labels=text).loss
        assert loss is not None
        loss.backward()

    return work


def measure(
    config: MirasolConfig, snippets: int, gpus: Sequence[int], most: int | None, whole: bool, seconds: float
) -> list[dict[str, Any]]:
    """A row for each call, all of them interleaved; the step itself is one where `whole` says so."""
    where, calls = device(), sizes(config, snippets, gpus, most)
    flops: dict[Any, int | None] = dict.fromkeys(calls)
    if countable():
        flops |= dict(zip(calls, counted(config, calls), strict=True))
    layers = Layers(config, where)
    works = {call: layers.work(*call) for call in calls}
    if whole:
        works[WHOLE, snippets] = whole_step(config, snippets, where)
        flops[WHOLE, snippets] = flops_of(config, parts(config, snippets, 1)) if countable() else None
    named = {f"{name}, {n}": work for (name, n), work in works.items()}
    times = harness.interleave(named, rounds=9, warmup=WARMUP, budget=seconds, device=where)
    return [
        {"combiner": config.combiner.context, "part": name, "snippets": n, "seconds": took.median,
         "seconds_low": took.low, "seconds_high": took.high, "rounds": took.rounds, "flops": flops[name, n]}
        for (name, n), took in zip(works, times.values(), strict=True)
    ]  # fmt: skip


def flops_of(config: MirasolConfig, made: Sequence[Part]) -> int:
    """Of all their calls; of `parts` what a step is counted to have, to the last flop (a test)."""
    each = counted(config, [(part.name, part.snippets) for part in made])
    return round(sum(part.calls * flops for part, flops in zip(made, each, strict=True)))


def composed(config: MirasolConfig, snippets: int, gpus: int, rows: Sequence[dict[str, Any]]) -> float:
    """Seconds of a step of a rank, from `measure`d rows. A call of another size takes as much longer as it has flops.

    Raises ValueError naming the part of which there is no time.
    """
    exact, scaled = 0.0, []
    for part in parts(config, snippets, gpus):
        mine = {row["snippets"]: row for row in rows if row["part"] == part.name}
        if part.snippets in mine:
            exact += part.calls * mine[part.snippets]["seconds"]
            continue
        if not mine or part.name in NOT_LINEAR:
            raise ValueError(
                f"--layers: expected a time of {part.name!r} of {part.snippets} snippets, got those of {list(mine)}"
            )
        near = max((n for n in mine if n < part.snippets), default=min(mine))
        scaled.append((part, mine[near]))
    if scaled and not (countable() and all(row["flops"] is not None for _, row in scaled)):
        name, size, _ = scaled[0][0]
        raise ValueError(f"--layers: expected a time of {name!r} of {size} snippets, or flops to scale by, got none")
    flops = counted(config, [(part.name, part.snippets) for part, _ in scaled]) if scaled else []
    return exact + sum(
        part.calls * row["seconds"] * (work / row["flops"] if work else part.snippets / row["snippets"])
        for (part, row), work in zip(scaled, flops, strict=True)
    )


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def device_name(machine: dict[str, Any]) -> str:
    return machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}, {harness.threads(machine)}"


def lines(config: MirasolConfig, snippets: int, gpus: Sequence[int], rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """What was measured, and what it makes of a step."""
    yield f"{'part':<28}{'snippets':>9}{'ms':>11}{'10 .. 90 %':>23}{'TFLOP/s':>9}"
    for row in rows:
        low, mid, high = (f"{row[key] * 1e3:,.2f}" for key in ("seconds_low", "seconds", "seconds_high"))
        rate = f"{row['flops'] / row['seconds'] / 1e12:.3f}" if row["flops"] else ""
        yield f"{row['part']:<28}{row['snippets']:>9}{mid:>11}{f'{low} .. {high}':>23}{rate:>9}"
    for n in gpus:
        yield f"{n} GPUs: a step of {snippets} snippets takes {composed(config, snippets, n, rows):.4g} s of a rank"
    for row in rows:
        if row["part"] == WHOLE:
            share = composed(config, snippets, 1, rows) / row["seconds"]
            yield f"on one: the parts add up to {share:.1%} of the whole step, {row['seconds']:.4g} s"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layer_times", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS, default="3b")
    parser.add_argument("--combiner", choices=COMBINERS, nargs="+", default=list(COMBINERS))
    parser.add_argument("--frames", type=positive, default=4096, help="of the clip")
    parser.add_argument("--gpus", type=positive, nargs="+", default=list(GPUS), help="among which it is shared out")
    parser.add_argument("--most", type=positive, help="snippets of a call; by default as many as in a step")
    parser.add_argument("--whole", action="store_true", help="time the step itself as well")
    parser.add_argument("--seconds", type=float, default=15.0, help="of timing, per Combiner; three rounds at least")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON (default: out)")
    options = parser.parse_args(arguments)
    where = harness.machine(device())
    report: dict[str, Any] = {"machine": where, "layers_of": options.preset, "frames": options.frames, "rows": []}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"layers-{options.preset}.json"
    for name in options.combiner:
        config = replace(configure(options.preset, name), recompute="snippet")
        snippets = -(-options.frames // config.video.frames)
        if max(options.gpus) > snippets:
            parser.error(f"--gpus: expected at most {snippets}, a snippet for each, got {max(options.gpus)}")
        rows = measure(config, snippets, options.gpus, options.most, options.whole, options.seconds)
        report["rows"] += rows
        harness.write(report, file)
        print(f"{options.preset}, Combiner {name}, clip of {options.frames} frames, {device_name(where)}:")
        print(*lines(config, snippets, options.gpus, rows), sep="\n", flush=True)
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
