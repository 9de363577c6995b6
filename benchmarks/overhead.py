"""What a small call costs beside scaled_dot_product_attention: Python, dispatch and autograd, in microseconds.

    python -m benchmarks.overhead [--out out]

SDPA runs without a mask, which is less than what block_causal_attention computes, and with the mask that a layout
replaces.  A timing is a burst of calls, so that a clock of 50 ns does not show.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import harness
from mirasol_kernels import SnippetLayout, block_causal_attention

SNIPPETS, TOKENS, HEADS, DIM = 2, 8, 2, 16  # so small that no arithmetic shows
BURST = 100
PEERS = ("sdpa", "sdpa with the mask")

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def attentions() -> dict[str, Attention]:
    """SDPA with and without the layout's mask, and the op on whatever it chooses here."""
    layout = SnippetLayout.uniform(SNIPPETS, TOKENS)
    mask = layout.dense_mask()[:, None].contiguous()
    return {
        "block_causal_attention": lambda q, k, v: block_causal_attention(q, k, v, layout),
        PEERS[0]: scaled_dot_product_attention,
        PEERS[1]: lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask),
    }


def works(attend: Attention) -> dict[str, Callable[[], Any]]:
    """What is timed of one attention."""
    plain = [torch.randn(1, HEADS, SNIPPETS * TOKENS, DIM) for _ in range(3)]
    leaves = [x.clone().requires_grad_() for x in plain]
    dout = torch.randn(plain[0].shape)

    def without_grad() -> None:
        with torch.no_grad():
            for _ in range(BURST):
                attend(*plain)

    def forward() -> None:
        for _ in range(BURST):
            attend(*leaves)

    def both() -> None:
        for _ in range(BURST):
            torch.autograd.grad(attend(*leaves), leaves, dout)

    return {"no_grad": without_grad, "forward, to be differentiated": forward, "forward + backward": both}


def measure() -> dict[str, dict[str, harness.Timing]]:
    """Of every work, seconds per call of every attention."""
    found: dict[str, dict[str, harness.Timing]] = {}
    of = {name: works(attend) for name, attend in attentions().items()}
    for work in next(iter(of.values())):
        bursts = harness.interleave({name: each[work] for name, each in of.items()}, rounds=60)
        found[work] = {
            name: harness.Timing(t.median / BURST, t.low / BURST, t.high / BURST, t.rounds)
            for name, t in bursts.items()
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for overhead.json (default: out)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = []
    print(f"B1 H{HEADS} N{SNIPPETS * TOKENS} D{DIM} float32, median microseconds per call (10 % .. 90 %)")
    for work, timings in measure().items():
        ours = next(iter(timings.values())).median
        for name, t in timings.items():
            ratio = f"  ours is {ours / t.median:.2f}x" if name in PEERS else ""
            print(f"{work:30} {name:24} {t.median * 1e6:7.1f} ({t.low * 1e6:.1f} .. {t.high * 1e6:.1f}){ratio}")
            rows.append({"work": work, "candidate": name, **t._asdict()})
    shape = {"batch": 1, "heads": HEADS, "tokens": SNIPPETS * TOKENS, "dim": DIM, "dtype": "float32"}
    file = options.out / "overhead.json"
    file.write_text(json.dumps({"machine": harness.machine(), "shape": shape, "rows": rows}, indent=1) + "\n")
    print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
