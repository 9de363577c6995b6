"""What a model is trained on: clips with a prompt and its answer."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Example(NamedTuple):
    """One clip and one question about it."""

    video: Tensor | None  # (3, frames, H, W), uint8 or float in [0, 1]
    audio: Tensor | None  # (samples,) in [-1, 1], the same time span
    prompt: str
    answer: str
    kind: str = ""  # the type of question; evaluation reports each on its own
