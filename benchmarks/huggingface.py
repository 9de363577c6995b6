"""A model of transformers whose image tokens see each other, by the attention it runs on: time and memory of a step.

python -m benchmarks.huggingface [--tokens 1024 2048 4096] [--attention sdpa mirasol] [--out DIR]

Two layers of Gemma 3, one with a window of 1,024 and one without: 8/4 heads of 256, width 512; images of 256 tokens
between texts of 256; random weights, float32, batch 1; forward, and forward and backward to all parameters.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import harness
from benchmarks.combiner import NAMES, milliseconds, times
from benchmarks.sweep import positive

IMAGE, TEXT, WINDOW = 256, 256, 1024
TIMING_SECONDS = 10.0  # per comparison, over all candidates; at least three rounds


class Job(NamedTuple):
    """What one fresh process measures, and all that it needs to know."""

    attention: str
    tokens: int
    train: bool
    device: str


def prepare(job: Job) -> Callable[[], None]:
    """All but the step; a short one is taken, so that nothing is loaded in the one that is watched."""
    import transformers

    from mirasol_kernels.integrations.transformers import register

    register()
    text = {"vocab_size": 256, "hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"]}  # fmt: skip
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 1, "image_size": 8, "patch_size": 4, "vision_use_head": False}  # fmt: skip
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=255
    )
    model = transformers.Gemma3ForConditionalGeneration(config).to(job.device).eval()
    model.set_attn_implementation(job.attention)
    ids = torch.randint(3, 255, (1, job.tokens), device=job.device)
    types = (torch.arange(job.tokens, device=job.device)[None] % (TEXT + IMAGE) >= TEXT).long()

    def step(tokens: int = job.tokens) -> None:
        with torch.set_grad_enabled(job.train):
            loss = model(ids[:, :tokens], token_type_ids=types[:, :tokens]).logits.square().mean()
        if job.train:
            model.zero_grad()
            loss.backward()

    step(TEXT + 8)
    return step


def compare(options: argparse.Namespace, device: str) -> Iterator[dict[str, Any]]:
    for tokens in sorted(set(options.tokens)):
        for train in (False, True):
            jobs = [Job(name, tokens, train, device) for name in dict.fromkeys(options.attention)]
            works = {job.attention: prepare(job) for job in jobs}
            timings = harness.interleave(works, warmup=0.0, budget=TIMING_SECONDS, device=device)
            del works
            for job in jobs:
                memory, _ = harness.peak_memory(prepare, job, device=device)
                yield {
                    "attention": job.attention,
                    "tokens": tokens,
                    "train": train,
                    **times(timings[job.attention]),
                    "step_bytes": memory.peak - memory.before,
                }


def show(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print them as they come."""
    print(f"{'':<32} {'ms':>9} {'10 .. 90 %':>20} {'step MB':>8}")
    done = []
    for row in rows:
        what = f"{row['tokens']:,} tokens, {NAMES[row['train']]}, {row['attention']}"
        print(f"{what:<38} {milliseconds(row)} {row['step_bytes'] / 1e6:>8,.0f}", flush=True)
        done.append(row)
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.huggingface", description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=positive, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "mirasol"], help="names that transformers knows")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the JSON (default: out)")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    import transformers

    machine = harness.machine(device)
    print(__doc__.split("\n\n")[2])
    print(
        f"{machine.get('gpu', machine['cpu'])}, {harness.threads(machine)}, torch {machine['torch']}, "
        f"transformers {transformers.__version__}\n"
    )
    report = {"machine": machine, "transformers": transformers.__version__, "rows": show(compare(options, device))}
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "huggingface.json"
    file.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
