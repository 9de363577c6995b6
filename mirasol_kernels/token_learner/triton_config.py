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

TABLE: dict[int, dict[str, Tile]] = {
    80: {
        "layer": Tile(64, 64, 8, 3),
        "pool": Tile(64, 128, 8, 2),
        "gradient": Tile(64, 64, 8, 2),
        "weights": Tile(64, 128, 8, 3),
    },
}
for _cc in (86, 90, 100, 120):
    TABLE[_cc] = TABLE[80]

FLOAT32 = {
    "layer": Tile(32, 32, 8, 2),
    "pool": Tile(32, 64, 8, 2),
    "gradient": Tile(32, 32, 8, 2),
    "weights": Tile(32, 32, 8, 2),
}


def tile_of(kernel: str, h: int, dtype: torch.dtype, machine: Machine) -> Tile:
    if dtype == torch.float32:
        return FLOAT32[kernel]
    return TABLE[like(machine.capability)][kernel]


def slots_of(k: int, dtype: torch.dtype) -> int:
    """How many of the k learned tokens a step scores."""
    return min(power_of_two(k), 32 if dtype == torch.float32 else 128)


def fuses(k: int, c: int) -> bool:
    """Whether a program holds the sums of all learned tokens over all channels in registers: half of a multiprocessor's
    256 KB; with 32 x 1280, 376 bytes a thread spill (9.0)."""
    return power_of_two(k) * c <= 2 * SUMS and k <= 32
