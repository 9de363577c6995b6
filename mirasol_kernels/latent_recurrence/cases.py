"""Named sample inputs that tests, benchmarks and `python -m mirasol_kernels --check` share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mirasol_kernels._check import Case
from mirasol_kernels.latent_recurrence.api import token_turing_recurrence
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters


@dataclass(frozen=True)
class Problem:
    """Sizes of one call: n input tokens of each source in each of T steps."""

    n: tuple[int, ...] = (10,)
    steps: int = 3
    batch: int = 2
    c: int = 24
    memory: int = 6
    read: int = 4
    memory_mode: str = "TL"
    processor: str = "transformer"
    unit: str = "standard"
    layers: int = 1
    placed: bool = False
    add_erase: str = "paper"
    counted: bool = False  # with `valid`, drawn
    heads: int = 4


PROBLEMS: dict[str, Problem] = {
    "tl": Problem(),
    "tl_mixer": Problem(processor="mixer", layers=2),
    "tl_mlp": Problem(processor="mlp", layers=2),
    "tl_positions": Problem((7, 3), placed=True),
    "tl_valid": Problem((7, 3), placed=True, counted=True),
    "mha": Problem(memory_mode="MHA"),
    "mha_positions": Problem((7, 3), memory_mode="MHA", placed=True),
    "mha_valid": Problem((7, 3), memory_mode="MHA", counted=True),
    "add_erase": Problem(memory_mode="AddErase", placed=True),
    "add_erase_scenic": Problem(memory_mode="AddErase", add_erase="scenic"),
    "simple": Problem(unit="simple"),
    "simple_mixer": Problem(unit="simple", processor="mixer", counted=True),
    "one_step": Problem(steps=1, batch=1),
    "no_steps": Problem(steps=0),
    "odd_steps": Problem((5, 0), steps=7),
    "memory_smaller_than_read": Problem(memory=2, read=5),
    "wide": Problem(c=32),
    "wide_layers": Problem((7, 3), c=48, layers=2, placed=True, counted=True),
    "wide_read": Problem((5, 0), c=32, memory=3, read=17, steps=5),
    "medium": Problem((98,), c=96, memory=96, read=16, placed=True, steps=2, batch=1),
}


def cases(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Every named case on `device`: the same numbers everywhere, drawn in float64 and rounded to dtype."""
    for name in PROBLEMS:
        yield case(name, device, dtype)


def case(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    return problem_case(name, PROBLEMS[name], device, dtype)


def problem_case(name: str, p: Problem, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """The tensors are "memory", "source0", ... and the parameters by their names; `name` seeds what is drawn."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def make(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, dtype=torch.float64)

    template = TokenTuringParameters.init(
        p.c,
        p.memory,
        p.read,
        memory_mode=p.memory_mode,
        processor=p.processor,
        unit=p.unit,
        layers=p.layers,
        mlp=32,
        heads=p.heads,
        tokens=sum(p.n) if p.placed else None,
        add_erase=p.add_erase,
        query_std=1.0,
        generator=generator,
        dtype=torch.float64,
    )
    # Not as initialised: there norms are 1 and biases 0, which hides mistakes.
    weights = {key: x.detach() + 0.2 * make(*x.shape) for key, x in template.named_tensors()}
    tensors = {"memory": make(p.batch, p.memory, p.c), **weights}
    for i, n in enumerate(p.n):
        tensors[f"source{i}"] = make(p.batch, p.steps, n, p.c)
    valid = None
    if p.counted:
        highest = torch.tensor(p.n) + 1
        valid = (torch.rand(p.batch, p.steps, len(p.n), generator=generator) * highest).long().to(device)

    def call(*, backend: str | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        sources = [tensors[f"source{i}"] for i in range(len(p.n))]
        parameters = template.replace({key: tensors[key] for key in weights})
        return token_turing_recurrence(tensors["memory"], sources, parameters, valid=valid, backend=backend)

    fused = (p.memory_mode, p.processor, p.unit) == (
        "TL",
        "transformer",
        "standard",
    )  # what rounds in orders of its own
    orders = tuple(shuffled(call, p.c, seed) for seed in range(4)) if fused else ()
    return Case(name, call, {key: x.to(device, dtype) for key, x in tensors.items()}, orders)


def shuffled(call: Callable[..., tuple[Tensor, Tensor]], c: int, seed: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same call, of token learners and a transformer, with its c channels in another order inside."""
    order = torch.randperm(c, generator=torch.Generator().manual_seed(seed))

    def moved(*, backend: str | None = None, **tensors: Tensor) -> tuple[Tensor, Tensor]:
        for name, x in tensors.items():
            if name.endswith(("mlp.hidden.weight", "q.weight", "k.weight", "v.weight")):
                tensors[name] = x[:, order]  # (out, c)
            elif "process.blocks" in name and name.endswith(("out.weight", "out.bias")):
                tensors[name] = x[order]  # (c, in), (c,)
            elif name.endswith(("memory", "norm.weight", "norm.bias", "norm1.weight", "norm1.bias")) or (
                name.startswith(("source", "positions", "process.positions")) or ".norm2." in name
            ):
                tensors[name] = x[..., order]
        memory, outputs = call(backend=backend, **tensors)
        return memory[..., order.argsort()], outputs[..., order.argsort()]

    return moved
