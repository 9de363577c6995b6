"""Who finds the needle in a video: every Combiner, what ablations lose, and mirasol-pytorch on the same clips.

python -m benchmarks.needle [--variants transformer-current ttm ...] [--minutes 1] [--frames 32 64 128] [--out out]
python -m benchmarks.needle --report out/needle.json

Each variant is trained for the same CPU time of one thread on clips of mixed lengths, all four questions of a clip at
once, and then answers fresh ones, also longer than any it was trained on. JSON is written after each. The variants
mirasol-pytorch* need an interpreter that has it, with x-transformers 1.26 (`pip install mirasol-kernels[peers]`).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks import harness
from benchmarks.sweep import positive
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import AudioConfig
from mirasol_model.data import Example
from mirasol_model.needle import CHANCE, KINDS, Needle

PROMPT = 6  # tokens of the longest prompt
FRAMES = 512  # of a training step: more short clips, or fewer long ones
SHORT = 0.35  # the first part of training, on the shortest clips alone
LEARNING_RATE, BETAS, WEIGHT_DECAY, WARMUP, CLIP = 1e-3, (0.9, 0.98), 0.01, 50, 1.0
DECAY = 0.4  # the last part of the time, in which the learning rate falls to a twentieth
TRAIN_SEED, TEST_SEED = 1, 2
RUN = ("variant", "seed", "minutes")  # what tells a row of the report from others
LURES = (0, 1, 2, 3)  # in training; fresh clips have all three
REPORT_SECONDS = 5.0  # of training, between points of the curve


class Batch(NamedTuple):
    video: Tensor  # (B, 3, frames, H, W) uint8
    audio: Tensor  # (B, samples)
    text: Tensor  # (B, K, L) int64: the prompts of the K questions, padded behind
    lengths: Tensor  # (B, K)
    answers: Tensor  # (B, K)


def tokens(text: str) -> list[int]:
    return [3 + byte for byte in text.encode()]


def collate(clips: Sequence[Sequence[Example]]) -> Batch:
    """Clips of one length with all their questions."""
    prompts = [[tokens(e.prompt) for e in clip] for clip in clips]
    text = torch.tensor([[p + [0] * (PROMPT - len(p)) for p in each] for each in prompts])
    lengths = torch.tensor([[len(p) for p in each] for each in prompts])
    answers = torch.tensor([[tokens(e.answer)[0] for e in clip] for clip in clips])
    video, audio = (torch.stack(x) for x in zip(*((clip[0].video, clip[0].audio) for clip in clips), strict=True))
    return Batch(video, audio, text, lengths, answers)


class Reader(nn.Module):
    """A Mirasol that encodes clips once and reads what it is asked."""

    def __init__(self, config: MirasolConfig, *, latent: bool = True, sound: bool = True):
        super().__init__()
        self.model, self.sound = Mirasol(config), sound
        if not latent:
            self.model.latent.forward = lambda x, *_, **__: x  # type: ignore[method-assign]  # h_t is x_t

    def forward(self, batch: Batch) -> Tensor:
        """-> logits of the answers (B, K, vocabulary)"""
        encoded = self.model.encode(batch.video, batch.audio if self.sound else None)
        memory = self.model.text.remember(encoded.latents, encoded.age)
        times = batch.text.shape[1]
        layers = [(k.repeat_interleave(times, 0), v.repeat_interleave(times, 0)) for k, v in memory.layers]
        logits = self.model.text(batch.text.flatten(0, 1), memory._replace(layers=layers))  # (B*K, L, vocabulary)
        return at_last(logits, batch.lengths)


def at_last(logits: Tensor, lengths: Tensor) -> Tensor:
    """logits (B*K, L, V), lengths (B, K) -> those after the prompts (B, K, V)"""
    return logits[torch.arange(len(logits)), lengths.flatten() - 1].unflatten(0, lengths.shape)


class Variant(NamedTuple):
    what: str
    build: Callable[[], nn.Module]
    shift: int = 0
    lengths: tuple[int, ...] | None = None  # of the clips that it can read; None: all


def configure(**combiner: Any) -> MirasolConfig:
    """`tiny`, with sound at 4 kHz and tubes that read every pixel once; only text is learned (no auxiliary losses)."""
    config = MirasolConfig.preset("tiny")
    return replace(
        config,
        video=replace(config.video, tubes=(((4, 16, 16), (4, 16, 16), (0, 0, 0)),)),
        audio=AudioConfig(sample_rate=4000, mel_bins=16, patch=8),
        combiner=replace(config.combiner, **combiner),
        latent=replace(config.latent, mask_ratio=0.0),
        losses=replace(config.losses, latent=0.0, reconstruction=0.0),
    )


def peer(*, mended: bool) -> nn.Module:
    from benchmarks.needle_peer import Peer

    return Peer(mended=mended)


VARIANTS = {
    "transformer-current": Variant("a transformer over the current snippet", lambda: Reader(configure())),
    "transformer-all": Variant("a transformer over all so far", lambda: Reader(configure(context="all"))),
    "ttm": Variant("a Token Turing Machine", lambda: Reader(configure(kind="ttm"))),
    "perceiver": Variant("a Perceiver of the current snippet", lambda: Reader(configure(kind="perceiver"))),
    "token_learner": Variant("a token learner of it", lambda: Reader(configure(kind="token_learner"))),
    "no-audio": Variant("transformer-current, deaf", lambda: Reader(configure(), sound=False)),
    "no-latent": Variant("transformer-current, h_t = x_t", lambda: Reader(configure(), latent=False)),
    "shifted": Variant("transformer-current, sound a snippet late", lambda: Reader(configure()), shift=1),
    "mirasol-pytorch": Variant("as published: clips of 8 snippets only", lambda: peer(mended=False), lengths=(32,)),
    "mirasol-pytorch-mended": Variant("its sound put in order: clips of any length", lambda: peer(mended=True)),
}


def train(
    variant: Variant, frames: Sequence[int], *, seconds: float = math.inf, steps: float = math.inf, seed: int = 0
) -> tuple[nn.Module, dict[str, Any]]:
    """For so many seconds of CPU time, or so many steps -> the model, and what happened."""
    torch.manual_seed(seed)
    model = variant.build()
    lengths = sorted(n for n in frames if variant.lengths is None or n in variant.lengths)
    if not lengths:
        raise ValueError(f"train: frames: expected one of {variant.lengths}, got {list(frames)}")
    data = {n: stream(Needle(2**40, TRAIN_SEED, frames=n, lures=LURES, shift=variant.shift)) for n in lengths}
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    begin, step, average = time.process_time(), 0, torch.zeros(len(KINDS))
    curve: list[dict[str, float]] = []
    with tqdm(total=100, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}") as bar:
        while (done := max((spent := time.process_time() - begin) / seconds, step / steps)) < 1:
            rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * max(0.05, min(1.0, (1 - done) / DECAY))
            for group in optimizer.param_groups:
                group["lr"] = rate
            n = lengths[0] if done < SHORT else lengths[int(torch.randint(len(lengths), ()))]
            batch = collate([next(data[n]) for _ in range(max(1, FRAMES // n))])
            losses = F.cross_entropy(model(batch).movedim(2, 1), batch.answers, reduction="none").mean(0)  # (K,)
            optimizer.zero_grad()
            losses.mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            step += 1
            average = average.lerp(losses.detach(), max(0.05, 1 / step))
            if not curve or spent - curve[-1]["seconds"] > REPORT_SECONDS:
                now = {kind: round(loss, 4) for kind, loss in zip(KINDS, average.tolist(), strict=True)}
                curve.append({"seconds": round(spent, 2), "step": step} | now)
                bar.set_postfix(now)
            bar.update(100 * done - bar.n)
    spent = time.process_time() - begin
    parameters = sum(p.numel() for p in model.parameters() if p.grad is not None)
    row = {"parameters": parameters, "steps": step, "seconds": spent, "seconds_per_step": spent / step}
    return model, row | {"trained_on": lengths, "curve": curve}


def stream(data: Needle) -> Iterator[list[Example]]:
    return (data.examples(clip) for clip in range(data.clips))


@torch.no_grad()
def exact_match(model: nn.Module, frames: int, clips: int, shift: int = 0, seed: int = TEST_SEED) -> dict[str, float]:
    """Share of right answers per kind, on fresh clips with every lure."""
    data = Needle(clips, seed, frames=frames, shift=shift)
    at_once = max(1, 512 // frames)
    right = []
    model.eval()
    for begin in range(0, clips, at_once):
        batch = collate([data.examples(i) for i in range(begin, min(begin + at_once, clips))])
        right.append(model(batch).argmax(-1) == batch.answers)
    model.train()
    return dict(zip(KINDS, torch.cat(right).double().mean(0).tolist(), strict=True))


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    variant = VARIANTS[name]
    model, row = train(variant, options.frames, seconds=60 * options.minutes, seed=options.seed)
    exact, refused, fresh = {}, {}, TEST_SEED + options.seed
    for frames in options.test:
        try:
            exact[str(frames)] = exact_match(model, frames, options.clips, variant.shift, fresh)
        except AssertionError as error:  # how mirasol-pytorch refuses
            refused[str(frames)] = f"AssertionError {error}".strip()
    row = {"variant": name, "what": variant.what, **row, "exact": exact, "refused": refused}
    if variant.shift == 0:  # what it makes of sound that comes a snippet late, not having learned to
        frames = min(row["trained_on"])
        row["exact_shifted"] = {str(frames): exact_match(model, frames, options.clips, 1, fresh)}
    return row


def table(report: dict[str, Any]) -> str:
    """A line per run and length of clip."""
    heading = "  ".join(f"{kind:>6}" for kind in KINDS)
    lines = [f"{'':<24} {'seed':>4} {'min':>4} {'parameters':>10} {'s/step':>7} {'steps':>6} {'frames':>6}  {heading}"]
    lines.append(f"{'chance':<69}" + "  ".join(f"{CHANCE[kind]:>6.1%}" for kind in KINDS))
    for row in report["rows"]:
        head = f"{row['variant']:<24} {row['seed']:>4} {row['minutes']:>4g} {row['parameters']:>10,} "
        head += f"{row['seconds_per_step']:>7.3f} {row['steps']:>6}"
        for frames, exact in row["exact"].items():
            lines.append(f"{head:<60} {frames:>6}  " + "  ".join(f"{exact[kind]:>6.1%}" for kind in KINDS))
            head = ""
        for frames, why in row["refused"].items():
            lines.append(f"{head:<60} {frames:>6}  {why}")
            head = ""
        for frames, exact in row.get("exact_shifted", {}).items():
            shares = "  ".join(f"{exact[kind]:>6.1%}" for kind in KINDS)
            lines.append(f"{'  sound a snippet late':<60} {frames:>6}  {shares}")
    return "\n".join(lines)


def show(file: Path) -> None:
    from benchmarks.plot import draw_needle

    report = json.loads(file.read_text())
    print(table(report))
    draw_needle(report, file.with_suffix(".png"))
    print(f"drew {file.with_suffix('.png')}")


def length(text: str) -> int:
    """Of clips that can be made."""
    frames = positive(text)
    try:
        Needle(1, frames=frames)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return frames


def minutes(text: str) -> float:
    if not 0 < (value := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text!r}")
    return value


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an integer of at least 0, got {text!r}")
    return int(text)


def read(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.needle", description=__doc__.splitlines()[0])
    ours = [name for name in VARIANTS if not name.startswith("mirasol-pytorch")]
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=ours)
    parser.add_argument("--minutes", type=minutes, default=1.0, help="CPU time of each (default: 1)")
    parser.add_argument("--frames", type=length, nargs="+", default=[32, 64, 128], help="trained on (32 64 128)")
    parser.add_argument("--test", type=length, nargs="+", default=[32, 128, 512], help="tested on (32 128 512)")
    parser.add_argument("--clips", type=positive, default=256, help="fresh ones, with four questions each (256)")
    parser.add_argument("--seed", type=seed, default=0, help="of parameters, lengths and fresh clips (0)")
    parser.add_argument("--note", default="", help="kept with the results: what else the machine did")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for JSON and PNG (out)")
    parser.add_argument("--report", type=Path, help="only show this JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = read(arguments)
    if options.report:
        show(options.report)
        return 0
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "needle.json"
    report = json.loads(file.read_text()) if file.exists() else {"rows": []}
    names = ("minutes", "frames", "test", "clips", "seed", "note")
    how = {name: getattr(options, name) for name in names} | {"machine": harness.machine()}
    for name in options.variants:
        print(f"{name}: {VARIANTS[name].what}", flush=True)
        row = run(name, options) | how
        report["rows"] = [other for other in report["rows"] if any(other[x] != row[x] for x in RUN)] + [row]
        file.write_text(json.dumps(report, indent=1) + "\n")
    show(file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
