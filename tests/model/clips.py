"""What the tests of the model share: every Combiner, models that are not at initialisation, and clips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.config import CombinerConfig

SAMPLES_PER_FRAME = 640  # 16 kHz at 25 frames a second

VARIANTS: dict[str, dict[str, Any]] = {
    "current": {"kind": "transformer"},
    "current-last": {"kind": "transformer", "order": "last"},
    "all": {"kind": "transformer", "context": "all"},
    "all-last": {"kind": "transformer", "context": "all", "order": "last"},
    "all-window": {"kind": "transformer", "context": "all", "window": 2},
    "ttm": {"kind": "ttm"},
    "ttm-mha": {"kind": "ttm", "memory_mode": "MHA", "processor": "mixer"},
    "ttm-add-erase": {"kind": "ttm", "memory_mode": "AddErase", "processor": "mlp"},
    "perceiver": {"kind": "perceiver"},
    "token_learner": {"kind": "token_learner"},
}


def combiner_config(variant: str, **changes: Any) -> CombinerConfig:
    return replace(MirasolConfig.preset("tiny").combiner, **VARIANTS[variant], **changes)


def tiny(variant: str = "current", **parts: Any) -> MirasolConfig:
    """The preset with a Combiner; `parts` are fields of the configuration, as {"latent": {"window": 3}}."""
    config = replace(MirasolConfig.preset("tiny"), combiner=combiner_config(variant))
    changes = {
        name: replace(getattr(config, name), **value) if isinstance(value, dict) else value
        for name, value in parts.items()
    }
    return replace(config, **changes)


def stir(module: nn.Module) -> nn.Module:
    """Move every parameter away from its initial value, where biases and some mistakes are zero."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def model(variant: str = "current", *, dtype: torch.dtype = torch.float64, **parts: Any) -> Mirasol:
    made = Mirasol(tiny(variant, **parts))
    stir(made.to(dtype))
    return made.eval()


def clip(frames: int, rows: int = 1, *, size: tuple[int, int] = (32, 32), dtype=torch.float64) -> tuple[Tensor, Tensor]:
    video = torch.rand(rows, 3, frames, *size, dtype=dtype)
    audio = 0.1 * torch.randn(rows, frames * SAMPLES_PER_FRAME, dtype=dtype)
    return video, audio


def scenes(rows: int = 8, frames: int = 16) -> tuple[Tensor, Tensor]:
    """Clips that tell themselves apart: a square that moves over a coloured ground, and a tone. float32."""
    video = torch.rand(rows, 3, 1, 1, 1).repeat(1, 1, frames, 32, 32)
    square = torch.rand(rows, 3, 1, 1)
    for b in range(rows):
        for t in range(frames):
            row, column = (3 * b + t * (1 + b % 3)) % 24, (5 * b + 2 * t) % 24
            video[b, :, t, row : row + 8, column : column + 8] = square[b]
    seconds = torch.arange(frames * SAMPLES_PER_FRAME) / 16_000
    audio = torch.stack([0.3 * torch.sin(2 * torch.pi * (200 + 150 * b) * seconds) for b in range(rows)])
    return video, audio


def words(rows: int, length: int = 6) -> Tensor:
    return torch.randint(3, 259, (rows, length))
