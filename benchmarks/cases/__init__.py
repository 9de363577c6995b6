"""What is measured, one module per op, named as the op.

A module has `CASES`, name -> case. A case says what a call costs and what is right:
    name, who       what it is called and who has this shape
    kind            "snippets", "decode", ...: what one geometric mean is taken over; "quick" runs with --quick only
    devices, directions
    memory          directions in which the memory of a call is measured as well
    inputs(dtype, device, seed) -> the arguments of a call and the gradients of its results
    truth(inputs, direction)    -> `Truth`
    flops(direction), bytes(direction, dtype)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

DIRECTIONS = ("forward", "backward")  # backward is forward and backward together: what a training step pays
NAMES = {"forward": "forward", "backward": "forward + backward"}


class Truth(NamedTuple):
    """Results in float64 and those of the reference in the call's dtype, by name, on a part of the call."""

    exact: dict[str, Tensor]
    low: dict[str, Tensor]
    part: str  # in words
    cut: Callable[[Sequence[Tensor]], dict[str, Tensor]]  # results of a whole call -> that part of them, by name
