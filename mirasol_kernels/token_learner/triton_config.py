"""Tiles by compute capability: what compiles, fits and spills in no loop; nothing is searched at a first call."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mirasol_kernels._triton import Machine, like, power_of_two


class Tile(NamedTuple):
    """`tokens` by `channels` that a step holds, and how the compiler shall spread and pipeline it."""

    tokens: int
    channels: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


SUMS = 16 * 1024  # float32 numbers that a program sums where others share the work: 64 registers of each of 256 threads

WIDTHS = (128, 256)  # a tile serves hidden layers up to this

# capability -> kernel -> a Tile for each of WIDTHS.  One that is only in the first has no tile for more: of `gradient`
# at 256 everything that mma.sync multiplies spills, in its loops over channels or a thousand times around them.
TABLE: dict[int, dict[str, tuple[Tile, ...]]] = {
    80: {  # mma.sync; all within the 99 KB of 8.6, 8.9 and 12.0
        "layer": (Tile(64, 64, 8, 3),),
        "pool": (Tile(64, 128, 8, 2),),
        # 64 tokens: 711 spills around the loops instead of 64 (8.0), some in them (12.0)
        "gradient": (Tile(32, 64, 8, 2),),
        "weights": (Tile(64, 128, 8, 3),),
    },
    90: {  # wgmma; 10.0: tcgen05
        "layer": (Tile(64, 64, 8, 3), Tile(32, 64, 8, 3)),
        "pool": (Tile(64, 128, 8, 2), Tile(32, 128, 8, 2)),
        "gradient": (Tile(64, 64, 8, 2), Tile(32, 32, 8, 2)),
        "weights": (Tile(64, 128, 8, 3), Tile(64, 64, 8, 2)),
    },
}
TABLE[86] = TABLE[120] = TABLE[80]
TABLE[100] = TABLE[90]

# 256: what `pool` fuses spills in its loop over channels
FLOAT32: dict[str, tuple[Tile, ...]] = {
    "layer": (Tile(32, 32, 8, 2),),
    "pool": (Tile(32, 64, 8, 2),),
    "gradient": (Tile(32, 32, 8, 2),),
    "weights": (Tile(32, 32, 8, 2),),
}


def tile_of(kernel: str, h: int, dtype: torch.dtype, machine: Machine) -> Tile:
    """kernel: layer, which `pool` includes where it fuses, pool, gradient or weights."""
    width = next(i for i, width in enumerate(WIDTHS) if h <= width)
    return (FLOAT32 if dtype == torch.float32 else TABLE[like(machine.capability)])[kernel][width]


def slots_of(k: int, h: int, dtype: torch.dtype) -> int:
    """How many of the k learned tokens a step scores.  Alike in forward and backward, so that their logits are."""
    return min(power_of_two(k), 32 if dtype == torch.float32 else 128 if h <= WIDTHS[0] else 32)


def fuses(k: int, c: int) -> bool:
    """Whether a program holds the sums of all learned tokens over all channels in registers: half of a multiprocessor's
    256 KB; with 32 x 1280, 376 bytes a thread spill (9.0)."""
    return power_of_two(k) * c <= 2 * SUMS and k <= 32
