"""Who does the work, one module per op, named as the op: `PEERS`, name -> `Peer`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Callable[..., tuple[Tensor, ...]]


class Problem(NamedTuple):
    """One call: what is known of it before it is timed."""

    case: Any  # of `benchmarks.cases.<op>`
    dtype: torch.dtype
    direction: str
    device: str
    inputs: tuple[Tensor, ...]  # an example


def anything(problem: Problem) -> str | None:
    return None


class Peer(NamedTuple):
    """One way to do it. `prepare` does, untimed, all that does not depend on the numbers: masks, compilation.

    What it returns takes `case.inputs(...)` and gives the results that `Truth.cut` names.
    """

    name: str
    prepare: Callable[[Problem], Call]
    why_not: Callable[[Problem], str | None] = anything  # the reason, or None
    ours: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
