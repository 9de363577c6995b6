"""The transformer block of everything behind the encoder (which keeps that of the image ViTs), and rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from mirasol_kernels import use_backend, wanted_backend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q (B, H, Nq, D), k and v (B, H, Nk, D) -> (B, H, Nq, D)
Rotary = tuple[Tensor, Tensor]  # cos and sin, (N, D/2) or (B, 1, N, D/2)

# Tokens of a row whose MLP activations, the widest of a block, exist at a time where they are recomputed.
AT_A_TIME = 512


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*D) -> (B, H, N, D), a view: the kernels take any strides but the last."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H*D)"""
    return x.transpose(1, 2).flatten(2)


def rotary(positions: Tensor, head_dim: int, dtype: torch.dtype) -> Rotary:
    """Angles position * 10000^(-2i/D) of each channel pair (arXiv 2104.09864); positions (..., N) of any range.

    Taken in float64: a stream's positions grow without end, and float32 would lose the fast channels first.
    """
    frequency = 10_000.0 ** -(torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float64) / head_dim)
    angle = positions.double()[..., None] * frequency  # (..., N, D/2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotate(x: Tensor, angles: Rotary) -> Tensor:
    """x (B, H, N, D) turned by the angles of its tokens; the channel pairs are (i, i + D/2)."""
    cos, sin = (a.to(x.dtype) for a in angles)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """function(*args), of which nothing but the arguments is kept: it runs again in backward, and must do the same."""
    if not torch.is_grad_enabled():
        return function(*args)
    backend = wanted_backend()

    def run(*args: Any) -> Any:
        with use_backend(backend):  # backward may run in another thread, or outside of the caller's `with`
            return function(*args)

    return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)


class Block(nn.Module):
    """Pre-norm transformer block. Who sees whom is the caller's `attend`, so it serves every layout and cache."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key_value, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, mlp_dim), nn.Linear(mlp_dim, dim)

    def forward(
        self, x: Tensor, attend: Attend, leave: Callable[[Tensor], Tensor] = lambda x: x, *, recompute: bool = False
    ) -> Tensor:
        """x (B, N, d) -> (B, Nq, d).  `leave` picks the tokens (B, Nq, d) that leave: the others are only attended to,
        so for them there is no query, no MLP and no second norm.

        recompute: nothing but x is kept for backward, which runs the MLP, the widest part, a piece of x at a time."""
        if not recompute:
            return self._think(self._look(x, attend, leave))

        def run(x: Tensor) -> Tensor:
            pieces = self._look(x, attend, leave).split(AT_A_TIME, dim=1)
            return torch.cat([recomputed(self._think, piece) for piece in pieces], dim=1)

        return recomputed(run, x)

    def _look(self, x: Tensor, attend: Attend, leave: Callable[[Tensor], Tensor]) -> Tensor:
        return leave(x) + self.out(merge_heads(self._seen(self.norm1(x), attend, leave)))

    def _seen(self, y: Tensor, attend: Attend, leave: Callable[[Tensor], Tensor]) -> Tensor:
        # By itself, so that q and k as they were before `attend` turned them are gone when more is computed.
        q = split_heads(self.query(leave(y)), self.heads)  # (B, H, Nq, D)
        k, v = (split_heads(part, self.heads) for part in self.key_value(y).chunk(2, dim=-1))  # (B, H, N, D)
        return attend(q, k, v)

    def _think(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def init_weights(module: nn.Module, depth: int) -> None:
    """Every linear layer keeps the variance of its input: truncated normal, 1 / fan-in, which at the widths of the
    large presets is about the usual 0.02 and at small ones is not (at 64, 0.02 let the latent loss flatten x before
    anything else was learned). The layers that write to the residual stream of a transformer of `depth` blocks start
    1/sqrt(2 depth) as large (GPT-2's rule). Biases are zero."""
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            scale = math.sqrt(2 * depth) if name.endswith(("out", "down")) else 1.0
            nn.init.trunc_normal_(layer.weight, std=layer.in_features**-0.5 / scale)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
