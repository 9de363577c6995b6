"""Named sample inputs that tests, benchmarks and `python -m mirasol_kernels --check` share."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mirasol_kernels._check import Case
from mirasol_kernels.token_learner.api import token_learner, token_learner_state

WEIGHTS = ("norm_weight", "norm_bias", "w1", "b1", "w2", "b2")


@dataclass(frozen=True)
class Problem:
    """Sizes of one call, n: tokens of each source; with positions where placed, counts valid (B, S), spread logits.

    mean: of tokens, whose standard deviation is 1.
    sliced: sources with gaps between rows, like a part of a larger tensor.  state: of `token_learner_state`.
    """

    n: tuple[int, ...]
    batch: int = 2
    c: int = 32
    h: int = 64
    k: int = 8
    placed: bool = False
    valid: tuple[tuple[int, ...], ...] | None = None
    gelu: str = "tanh"
    spread: float = 1.0
    mean: float = 0.0
    sliced: bool = False
    eps: float = 1e-6
    state: bool = False


PROBLEMS: dict[str, Problem] = {
    "small": Problem((20,)),
    "odd": Problem((37,), batch=3, c=33, h=17, k=5),
    "erf": Problem((20,), gelu="erf"),
    "sources": Problem((19, 8, 1), placed=True),
    "empty_source": Problem((0, 21, 0), placed=True),
    "no_tokens": Problem((0,)),
    "valid": Problem((16, 9), placed=True, valid=((16, 0), (5, 9))),
    "row_without_tokens": Problem((16, 9), valid=((0, 0), (7, 3))),
    "one_token": Problem((1,), batch=1, c=16, h=1, k=1),
    "read": Problem((96, 98), c=96, k=16, placed=True),
    "write": Problem((96, 98, 16), c=96, k=96, placed=True),
    "tile_less_one": Problem((63,), c=64, k=32),
    "tile": Problem((64,), c=64, k=32),
    "tile_and_one": Problem((65,), c=64, k=32),
    "wide": Problem((50,), batch=1, c=768, k=32),
    "many_tokens": Problem((700, 300), batch=1, c=64),
    "large_logits": Problem((40,), spread=1e4),
    "far_from_zero": Problem((60, 40), c=64, mean=100),
    "far_from_zero_wide": Problem((50,), batch=1, c=768, k=32, mean=100),
    "sliced": Problem((20, 12), sliced=True),
    "no_batch": Problem((5,), batch=0),
    "parts": Problem((900, 20), batch=2, c=24, h=16, placed=True),
    "state": Problem((19, 8, 0), placed=True, state=True),
    "state_of_valid": Problem((16, 9), valid=((0, 0), (7, 3)), state=True),
    "state_of_large_logits": Problem((40,), spread=1e3, state=True),
}


def cases(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Iterator[Case]:
    """Every named case on `device`: the same numbers everywhere, drawn in float64 and rounded to dtype."""
    for name in PROBLEMS:
        yield case(name, device, dtype)


def case(name: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    return build(name, PROBLEMS[name], device, dtype)


def build(name: str, problem: Problem, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Case:
    """The name is the seed."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))

    def make(*sizes: int, std: float = 1.0, mean: float = 0.0) -> Tensor:
        return (mean + std * torch.randn(*sizes, generator=generator, dtype=torch.float64)).to(device, dtype)

    b, c, h, k = problem.batch, problem.c, problem.h, problem.k
    tensors = {
        "norm_weight": 1 + make(c, std=0.2),
        "norm_bias": make(c, std=0.2),
        "w1": make(h, c, std=1.5 * c**-0.5),
        "b1": make(h, std=0.2),
        "w2": make(k, h, std=1.5 * problem.spread * h**-0.5),
        "b2": make(k, std=0.2),
    }
    for i, n in enumerate(problem.n):
        if problem.sliced:
            tensors[f"source{i}"] = make(b, n + 3, c + 4, mean=problem.mean)[:, 2 : n + 2, 4:]
        else:
            tensors[f"source{i}"] = make(b, n, c, mean=problem.mean)
        if problem.placed:
            tensors[f"position{i}"] = make(n, c, std=0.5)
    valid = None if problem.valid is None else torch.tensor(problem.valid, device=device)

    def call(*, backend: str | None = None, **tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        sources = [tensors[f"source{i}"] for i in range(len(problem.n))]
        positions = [tensors[f"position{i}"] for i in range(len(problem.n))] if problem.placed else None
        weights = (tensors[name] for name in WEIGHTS)
        options: dict[str, Any] = {
            "positions": positions,
            "valid": valid,
            "gelu": problem.gelu,
            "eps": problem.eps,
            "backend": backend,
        }
        if problem.state:
            return tuple(token_learner_state(sources, *weights, **options))
        return token_learner(sources, *weights, **options)

    case = Case(name, call, tensors)
    # What tokens far from 0 leave of differences is rounding, whose size differs between orders.
    return case._replace(orders=tuple(reordered(case, seed) for seed in range(4))) if problem.mean else case


def reordered(case: Case, seed: int) -> Callable[..., tuple[Tensor, ...]]:
    """The same call with its channels and hidden units in another order: its results differ by rounding alone."""
    generator = torch.Generator().manual_seed(seed)
    c, h = len(case.tensors["norm_weight"]), len(case.tensors["b1"])
    channels, units = torch.randperm(c, generator=generator), torch.randperm(h, generator=generator)

    def call(*, w1: Tensor, b1: Tensor, w2: Tensor, backend: str | None, **others: Tensor) -> tuple[Tensor, ...]:
        moved = {name: x[..., channels] for name, x in others.items() if name != "b2"}
        moved |= {"w1": w1[units][:, channels], "b1": b1[units], "w2": w2[:, units], "b2": others["b2"]}
        outputs = case.call(**moved, backend=backend)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return tuple(out[..., channels.argsort()] if out.dim() == 3 else out for out in outputs)

    return call
