"""What the model is trained on: L = w_latent * latent + w_recon * (video + audio) + w_text * text (MODEL section 8).

Latent: h_t predicts the Combiner's next tokens x_{t+1}. Reconstruction: h_t predicts the next snippet's picture and
sound at a small size. Text: the next token. The first snippet is never predicted, and what is not there (past the end
of a clip, a missing modality, frames that only pad a snippet) is not predicted either.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_kernels import SnippetLayout, block_causal_attention
from mirasol_model.config import LossConfig
from mirasol_model.encoders import sincos_positions
from mirasol_model.layers import Block, init_weights
from mirasol_model.packing import to_index


def widen(x: Tensor) -> Tensor:
    """Losses are taken in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def text_loss(logits: Tensor, labels: Tensor) -> Tensor | None:
    """Cross-entropy of labels[:, 1:] under logits[:, :-1]; -100 is not counted; None where nothing is to be predicted.

    logits (B, L, vocabulary), labels (B, L). The mean is taken over labels, not over rows.
    """
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    counted = labels != -100
    if not counted.any():
        return None
    return F.cross_entropy(widen(logits), labels, ignore_index=-100)


class LatentLoss(nn.Module):
    """mean(1 - cos(g(h_t), stopgrad(x_{t+1}))) over tokens. The stop-gradient is ours: without it x may collapse."""

    def __init__(self, dim: int):
        super().__init__()
        self.predict = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        """h of snippets t, x of snippets t+1, (R, m, d) each."""
        return (1 - F.cosine_similarity(widen(self.predict(h)), widen(x.detach()), dim=-1)).mean()


class Reconstruction(nn.Module):
    """h_t gives the patches of the shrunk next snippet: a small transformer over [h_t | P queries], of which only the
    queries leave; and the error of each patch."""

    def __init__(self, dim: int, size: Sequence[int], patch: Sequence[int], channels: int, config: LossConfig):
        super().__init__()
        self.size, self.patch = tuple(size), tuple(patch)
        self.grid = tuple(s // p for s, p in zip(size, patch, strict=True))
        self.query = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, channels * int(np.prod(patch)))
        self.distance = config.distance
        init_weights(self, config.layers)
        nn.init.trunc_normal_(self.query, std=0.02)

    def predict(self, h: Tensor) -> Tensor:
        """h_t (R, m, d) -> patches (R, P, values)"""
        centres = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in self.grid))
        places = sincos_positions(centres, h.shape[2]).to(h)  # (P, d)
        x = torch.cat([h, (self.query + places).expand(len(h), -1, -1)], dim=1)  # (R, m + P, d)
        layouts = [SnippetLayout.uniform(1, x.shape[1], q_tokens=n) for n in (x.shape[1], len(places))]
        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1

            def attend(q: Tensor, k: Tensor, v: Tensor, last: bool = last) -> Tensor:
                return block_causal_attention(q, k, v, layouts[last])

            x = block(x, attend, lambda y: y[:, -len(places) :]) if last else block(x, attend)
        return self.head(self.norm(x))

    def target(self, snippets: Tensor) -> Tensor:
        """(R, channels, *space), time first in space -> patches (R, P, values) of its area-averaged small form."""
        x = F.interpolate(snippets, size=self.size, mode="area")
        for axis, patch in enumerate(self.patch):
            x = x.unflatten(2 + 2 * axis, (-1, patch))  # (R, channels, n0, p0, n1, p1, ...)
        axes = range(2, x.ndim)
        return x.permute(0, *axes[::2], 1, *axes[1::2]).flatten(len(self.grid) + 1).flatten(1, -2)

    def real_patches(self, real: np.ndarray, steps: int) -> np.ndarray:
        """real (R,) leading time steps of `steps` -> (R, P) whether a patch is averaged from those alone."""
        bins = self.size[0]
        ends = -(-(np.arange(1, bins + 1) * steps) // bins)  # adaptive pooling ends bin i there
        whole = (ends[None] <= np.asarray(real)[:, None]).reshape(-1, self.grid[0], self.patch[0]).all(axis=2)
        return np.repeat(whole, int(np.prod(self.grid[1:])), axis=1)

    def forward(self, h: Tensor, target: Tensor) -> Tensor:
        """h_t (R, m, d), `target` of snippets t+1 -> (R, P): 1 - cosine, or the mean squared difference."""
        guess, target = widen(self.predict(h)), widen(target)
        if self.distance == "cosine":
            return 1 - F.cosine_similarity(guess, target, dim=-1)
        return (guess - target).square().mean(-1)


def mean_of(errors: Tensor, counted: np.ndarray) -> Tensor:
    """The mean over the entries that count, at least one of them."""
    if counted.all():
        return errors.mean()
    return errors.flatten()[to_index(np.flatnonzero(counted), errors)].mean()
