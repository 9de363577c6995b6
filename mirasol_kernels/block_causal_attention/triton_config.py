"""Tiles by compute capability: what compiles, fits and spills in no loop; nothing is searched at a first call.

Chosen from what tests/test_gpu_code.py compiles (Triton 3.9); none has run on a GPU.  What decided in general:
- eight warps: with four, a tile of 128 x 64 leaves no registers for the walk;
- two or three stages: deeper pipelines do not fit beside the tiles;
- 9.0 multiplies with wgmma from 64 rows of the first operand on, 10.0 with tcgen05; fewer go to mma.sync.
"""

from __future__ import annotations

import torch

from mirasol_kernels._triton import Config, Machine, like

WIDTHS = (64, 128, 256)  # a configuration serves head sizes up to this

# capability -> kernel -> a Config for each of WIDTHS
TABLE: dict[int, dict[str, tuple[Config, Config, Config]]] = {
    80: {  # 163 KB of shared memory, mma.sync
        # 256: 64 x 64 spills in its loops
        "forward": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        "backward_q": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        # 256: dk and dv alone are 64 KB; 32 x 64 spills
        "backward_kv": (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    },
    86: {  # 8.6 and 8.9: 99 KB, so half the tile wherever 8.0 takes more
        "forward": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        "backward_q": (Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(32, 32, 8, 2)),
        "backward_kv": (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    },
    90: {  # 227 KB, wgmma
        # the largest that compiles clean reads keys least often: 128 x 128 spills at head size 80, 128 x 64 at 256
        "forward": (Config(128, 128, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        "backward_q": (Config(128, 128, 8, 3), Config(128, 64, 8, 2), Config(128, 32, 8, 2)),
        # 128: 64 x 128 spills in its loops.  256: all that is wgmma spills, by hundreds; 32 keys are mma.sync
        "backward_kv": (Config(64, 128, 8, 3), Config(32, 128, 8, 2), Config(32, 32, 8, 2)),
    },
    100: {  # 227 KB, and tensor memory for the sums
        "forward": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        "backward_q": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 64, 8, 2)),
        # 64, 128: all 512 columns of tensor memory.  256: 32 x 64 spills in its loops
        "backward_kv": (Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(32, 32, 8, 2)),
    },
    120: {  # 99 KB, mma.sync: as 8.6
        "forward": (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(64, 32, 8, 2)),
        "backward_q": (Config(128, 64, 8, 3), Config(128, 32, 8, 2), Config(32, 32, 8, 2)),
        "backward_kv": (Config(64, 128, 8, 2), Config(64, 64, 8, 2), Config(32, 32, 8, 2)),
    },
}

# Few rows: reading the keys is all the time there is, so a tile has as few rows as a product takes.
DECODE = (Config(16, 64, 4, 3), Config(16, 64, 4, 2), Config(16, 32, 4, 2))

# Products of float32 run on the ordinary cores with operands in registers: small tiles, alike on every chip (99 KB).
FLOAT32 = {
    "forward": (Config(32, 64, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 2)),
    "decode": (Config(16, 32, 4, 2), Config(16, 32, 4, 2), Config(16, 32, 8, 2)),
    "backward_q": (Config(32, 32, 8, 2), Config(32, 32, 8, 2), Config(16, 32, 8, 2)),
    "backward_kv": (Config(32, 32, 8, 2), Config(16, 32, 8, 2), Config(32, 16, 8, 1)),
}


def config_of(kernel: str, dim: int, dtype: torch.dtype, machine: Machine) -> Config:
    """The tile for the larger of the two head sizes; kernel: forward, decode, backward_q or backward_kv."""
    width = next(i for i, width in enumerate(WIDTHS) if dim <= width)
    if dtype == torch.float32:
        return FLOAT32[kernel][width]
    if kernel == "decode":
        return DECODE[width]
    return TABLE[like(machine.capability)][kernel][width]
