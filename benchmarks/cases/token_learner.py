"""Shapes that people have, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import DIRECTIONS, Truth
from mirasol_kernels import token_learner

WEIGHTS = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")
# Not db2: it is 0, since b2 adds the same to every token of a softmax.
RESULTS = ("out", *(f"d{name}" for name in WEIGHTS[:-1]))


@dataclass(frozen=True)
class Case:
    """Sizes of one call; n: tokens of each source.  placed: every source has positions."""

    name: str
    who: str
    n: tuple[int, ...]
    c: int
    k: int
    h: int = 64
    batch: int = 16
    placed: bool = False
    kind: str = "pooling"
    devices: tuple[str, ...] = ("cpu",)
    directions: tuple[str, ...] = DIRECTIONS
    memory: tuple[str, ...] = ()

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
        """The six weights, the gradient of out, the sources, their positions: normal numbers, logits of deviation 1."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
            return (mean + std * torch.randn(*sizes, generator=generator, device=device)).to(dtype)

        c, h, k = self.c, self.h, self.k
        weights = draw(c, std=0.1, mean=1), draw(c, std=0.1), draw(h, c, std=c**-0.5), draw(h, std=0.1)
        weights = *weights, draw(k, h, std=1.7 * h**-0.5), draw(k, std=0.1)
        tables = [draw(n, c, std=0.5) for n in self.n] if self.placed else []
        return *weights, draw(self.batch, k, c), *(draw(self.batch, n, c) for n in self.n), *tables

    def truth(self, inputs: Sequence[Tensor], direction: str) -> Truth:
        def run(dtype: torch.dtype) -> dict[str, Tensor]:
            cast = [x.detach().to(dtype) for x in inputs]
            dout = cast.pop(6)
            leaves = [x.requires_grad_(direction == "backward") for x in cast]
            with torch.enable_grad():
                sources, *rest = self.split(leaves)
                out = token_learner(sources, *rest[:6], positions=rest[6:] or None, backend="reference")
            grads = torch.autograd.grad(out, leaves, dout) if direction == "backward" else ()
            return self.named((out.detach(), *grads))

        return Truth(run(torch.float64), run(inputs[0].dtype), "all of it", self.named)

    def split(self, leaves: Sequence[Tensor]) -> tuple:
        """(six weights, sources, positions) -> list of sources, the weights, the positions."""
        sources = leaves[6 : 6 + len(self.n)]
        return list(sources), *leaves[:6], *leaves[6 + len(self.n) :]

    def named(self, got: Sequence[Tensor]) -> dict[str, Tensor]:
        """Out and gradients in the order of (six weights, sources, positions)."""
        names = [f"d{kind}{i}" for kind in ("source", "position") for i in range(len(self.n))]
        return dict(zip(RESULTS, got, strict=False)) | dict(zip(names, got[7:], strict=False))

    def flops(self, direction: str) -> int:
        """Logits and the sum; backward makes logits again, and has two products for each product of forward."""
        c, h, k = self.c, self.h, self.k
        forward = c * h + h * k + k * c
        each = forward if direction == "forward" else 2 * forward + 2 * (c * h + h * k) + k * c
        return 2 * self.batch * sum(self.n) * each

    def bytes(self, direction: str, dtype: torch.dtype) -> int:
        """Of tokens and results, each once; backward reads tokens again, and dout and out, and writes as many."""
        tokens, out = self.batch * sum(self.n) * self.c, self.batch * self.k * self.c
        return dtype.itemsize * (tokens + out if direction == "forward" else 3 * tokens + 3 * out)

    def __str__(self) -> str:
        return f"B{self.batch} n{'+'.join(map(str, self.n))} c{self.c} h{self.h} k{self.k}" + " placed" * self.placed


GPU, BOTH = ("cuda",), ("cpu", "cuda")
CASES = {
    case.name: case
    for case in (
        Case("vit_s", "TokenLearner in a small ViT", (196,), 192, 8, memory=DIRECTIONS),
        Case("snippet", "a snippet of Mirasol, base", (326,), 768, 32, memory=DIRECTIONS),
        Case("snippet_1280", "a snippet of a wider Mirasol", (326,), 1280, 32),
        Case("write", "the write of a Token Turing Machine", (422,), 768, 96, memory=DIRECTIONS),
        Case("video", "eight frames of 196 tokens at once", (1568,), 1024, 16),
        Case("ttm_read", "read of a Token Turing Machine", (96, 326), 768, 16, placed=True, kind="sources"),
        Case("ttm_write", "its write", (96, 326, 16), 768, 96, placed=True, kind="sources"),
        Case("ttm_step", "its write, one step of one video", (96, 16), 768, 96, batch=1, placed=True, kind="step"),
        Case("snippets", "a batch of long videos", (326,), 768, 32, batch=1024, devices=GPU, memory=DIRECTIONS),
        Case("snippets_1280", "the same, wider", (326,), 1280, 32, batch=512, devices=GPU),
        Case("writes", "writes of as many", (422,), 768, 96, batch=768, devices=GPU),
        Case("quick", "does it work?", (20, 9), 48, 12, 16, 3, True, "quick", BOTH, memory=("forward",)),
    )
}
