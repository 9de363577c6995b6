"""Recurrences that people have: a memory that attends to itself and a snippet, and Token Turing Machines."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import DIRECTIONS, Truth
from benchmarks.flops import DENSE
from mirasol_kernels.latent_recurrence import TokenTuringParameters, latent_recurrence, token_turing_recurrence
from mirasol_kernels.latent_recurrence.reference import unit

Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
HEADS, HIDDEN = 8, 64
EXACT_FLOPS = 2e10  # float64 is asked for no more than this; past it for the first of the batch alone


@dataclass(frozen=True)
class Case:
    """Sizes of one call: `slots` tokens of memory, n of input and `read` of output in each of T steps, all c wide."""

    name: str
    who: str
    steps: int
    n: int
    c: int
    slots: int
    read: int
    batch: int = 1
    layers: int = 1
    mlp: int = 512
    kind: str = "machine"
    devices: tuple[str, ...] = ("cpu", "cuda")
    directions: tuple[str, ...] = DIRECTIONS
    memory: tuple[str, ...] = ("backward",)

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
        """The weights, the state, the inputs of all steps, and the gradients of last state and outputs."""
        generator = torch.Generator(device).manual_seed(seed)

        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator, device=device).to(dtype)

        weights = tuple(x.detach().to(device, dtype) for x in self.weights(torch.Generator().manual_seed(seed)))
        batch, c = self.batch, self.c
        state, x = draw(batch, self.slots, c), draw(batch, self.steps, self.n, c)
        return *weights, state, x, draw(batch, self.slots, c), draw(batch, self.steps, self.read, c)

    def weights(self, generator: torch.Generator) -> list[Tensor]:
        return [x for _, x in self.template(generator).named_tensors()]

    def template(self, generator: torch.Generator | None = None, device: str = "cpu") -> TokenTuringParameters:
        sizes: dict[str, Any] = {"layers": self.layers, "mlp": self.mlp, "heads": HEADS, "hidden": HIDDEN}
        return TokenTuringParameters.init(self.c, self.slots, self.read, generator=generator, device=device, **sizes)

    def bound(self, weights: Sequence[Tensor]) -> TokenTuringParameters:
        """Within what is timed: it draws nothing."""
        template = empty(self)
        return template.replace(dict(zip(dict(template.named_tensors()), weights, strict=True)))

    def step(self, weights: Sequence[Tensor]) -> Step:
        """One step as it is written without this library."""
        bound = self.bound(weights)
        return lambda state, x: unit(state, x, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device), bound)

    def ours(self, weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return token_turing_recurrence(state, x, self.bound(weights))

    def truth(self, inputs: Sequence[Tensor], direction: str) -> Truth:
        *weights, state, x, dstate, dout = inputs
        rows = self.batch if self.flops(direction) <= EXACT_FLOPS else 1

        def run(dtype: torch.dtype) -> dict[str, Tensor]:
            leaves = [v.detach().to(dtype) for v in (*weights, state[:rows], x[:rows])]
            leaves = [v.requires_grad_(direction == "backward") for v in leaves]
            with torch.enable_grad():
                results = loop(self.step(leaves[:-2]), *leaves[-2:])
            cotangents = [dstate[:rows].to(dtype), dout[:rows].to(dtype)]
            grads = torch.autograd.grad(results, leaves, cotangents) if direction == "backward" else ()
            return cut([r.detach() for r in (*results, *grads)])

        def cut(got: Sequence[Tensor]) -> dict[str, Tensor]:
            found = {"state": got[0][:rows], "outputs": got[1][:rows]}
            if direction == "forward":
                return found
            found |= {"dstate": got[-2][:rows], "dinputs": got[-1][:rows]}
            if rows == self.batch:  # they sum over the batch
                found["dweights"] = torch.cat([g.flatten() for g in got[2:-2]])
            return found

        part = "all of it" if rows == self.batch else "the first of the batch"
        return Truth(run(torch.float64), run(inputs[0].dtype), part, cut)

    def flops(self, direction: str) -> int:
        """Of the matrix products of the loop as it is written, and as many again for each of two gradients."""
        return step_flops(self) * self.steps * self.batch * (1 if direction == "forward" else 3)

    def bytes(self, direction: str, dtype: torch.dtype) -> int:
        """Inputs and outputs, each once; backward reads inputs again, and doutputs, and writes dinputs."""
        each = self.batch * self.steps * self.c * dtype.itemsize
        return each * ((self.n + self.read) if direction == "forward" else 3 * self.n + 2 * self.read)

    def __str__(self) -> str:
        sizes = f"T{self.steps} B{self.batch} n{self.n} c{self.c} memory{self.slots} read{self.read}"
        return f"{sizes} mlp{self.mlp} layers{self.layers}"


@dataclass(frozen=True)
class Block(Case):
    """For the generic scan: memory attends to [memory | input] and passes an MLP, as in block-recurrent models."""

    kind: str = "scan"

    def weights(self, generator: torch.Generator) -> list[Tensor]:
        c, mlp = self.c, self.mlp
        shapes = [(c, c)] * 4 + [(mlp, c), (c, mlp)]
        return [torch.randn(*shape, generator=generator) * shape[1] ** -0.5 for shape in shapes]

    def step(self, weights: Sequence[Tensor]) -> Step:
        q, k, v, o, up, down = weights

        def heads(x: Tensor, w: Tensor) -> Tensor:
            return F.linear(x, w).unflatten(-1, (HEADS, -1)).transpose(1, 2)

        def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
            seen = torch.cat([state, x], 1)
            attended = F.scaled_dot_product_attention(heads(state, q), heads(seen, k), heads(seen, v))
            state = F.layer_norm(state + F.linear(attended.transpose(1, 2).flatten(2), o), (self.c,))
            state = F.layer_norm(state + F.linear(F.gelu(F.linear(state, up), approximate="tanh"), down), (self.c,))
            return state, state[:, : self.read]

        return step

    def ours(self, weights: Sequence[Tensor], state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return latent_recurrence(self.step(weights), state, x)


@functools.cache
def empty(case: Case) -> TokenTuringParameters:
    """Names and shapes without numbers."""
    return case.template(device="meta")


def loop(step: Step, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """How it is written without this library."""
    outputs = []
    for now in x.unbind(1):
        state, output = step(state, now)
        outputs.append(output)
    return state, torch.stack(outputs, 1)


@functools.cache
def step_flops(case: Case) -> int:
    """Of one step of one row of the batch."""
    with torch.no_grad():
        weights = [torch.zeros(1).expand(w.shape) for w in case.weights(torch.Generator().manual_seed(0))]
        state, x = torch.zeros(1, case.slots, case.c), torch.zeros(1, case.n, case.c)
        with FlopCounterMode(display=False, custom_mapping=DENSE) as counter:
            case.step(weights)(state, x)
    return counter.get_total_flops()


SIZES: tuple[dict[str, Any], ...] = (
    {"n": 326, "c": 512, "slots": 64, "read": 8},
    {"n": 1568, "c": 384, "slots": 96, "read": 16},
    {"n": 326, "c": 768, "slots": 96, "read": 32, "layers": 2},
)
CASES = {
    case.name: case
    for case in (
        Block("block", "a memory of 64 tokens reads 16 a step", 64, 16, 256, 64, 8),
        Block("block_long", "the same for eight times as long", 512, 16, 256, 64, 8),
        Block("block_batch", "the same, eight at a time", 64, 16, 256, 64, 8, batch=8),
        Case("machine_512", "a Token Turing Machine on snippets of Mirasol", 64, **SIZES[0]),
        Case("machine_384", "one on eight frames at once", 64, **SIZES[1]),
        Case("machine_768", "one of two layers", 64, **SIZES[2]),
        Case("machine_512_batch", "eight videos", 64, batch=8, **SIZES[0]),
        Case("machine_384_batch", "eight videos", 64, batch=8, **SIZES[1]),
        Case("machine_768_batch", "eight videos", 64, batch=8, **SIZES[2]),
        Case("quick", "does it work?", 5, 7, 32, 6, 3, 2, mlp=16, kind="quick", memory=("forward",)),
        Block("quick_scan", "does it work?", 5, 7, 32, 6, 3, 2, mlp=16, kind="quick", memory=("forward",)),
    )
}
