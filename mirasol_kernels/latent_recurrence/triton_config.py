"""Tiles of the fused step.

One table serves every compute capability: products of float32 that keep its 24 bits run on the ordinary multipliers,
which are alike from 8.0 to 12.0, and no tile comes near the 99 KB of shared memory of the smallest chips.  A test
compiles each for all of them.  Nothing is searched at a first call.
"""

from __future__ import annotations

from typing import NamedTuple

from mirasol_kernels._triton import power_of_two


class Tile(NamedTuple):
    """`rows` by `columns` of a product, in steps of `channels`, and how the compiler shall spread and pipeline it."""

    rows: int
    columns: int
    channels: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


# Few rows: small tiles, so that a step of a few videos fills the chip.  Many: four times the products per byte.
FEW, MANY = Tile(16, 32, 64, 4, 3), Tile(64, 64, 32, 8, 2)

# 16 tokens by all hidden units of a token learner, then by `columns` learned tokens at a time.
SCORE = Tile(16, 64, 64, 8, 2)

# Learned tokens by channels; `channels` are the tokens of a step here.
POOL = Tile(16, 32, 16, 4, 2)

ATTEND_ROWS = 16


def linear_tile(rows: int, columns: int, processors: int) -> Tile:
    """For a product of `rows` by `columns`: many, once that gives every processor two programs."""
    programs = -(-rows // MANY.rows) * -(-columns // MANY.columns)
    return MANY if programs >= 2 * processors else FEW


def attend_tile(read: int, head: int) -> Tile:
    """`channels` are the tokens seen at a time: with a whole head of them, 16 KB each of keys and values."""
    seen = min(power_of_two(read), max(16, 4096 // power_of_two(head)))
    return Tile(ATTEND_ROWS, 32, min(seen, 32), 4, 2)
