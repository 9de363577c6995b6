"""The autoregressive model over snippets: x_1..x_T -> h_1..h_T (B, T, m, d), where h_t depends on x_1..x_t alone."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from mirasol_kernels import SnippetCache, SnippetLayout, block_causal_attention
from mirasol_model.config import LatentConfig
from mirasol_model.layers import Block, Rotary, init_weights, rotary, rotate
from mirasol_model.spread import Spread


class LatentModel(nn.Module):
    """Block-causal transformer: a token sees its own snippet and the earlier ones, as far as `window` and `sink` go.

    Position is rotary by snippet index, hence relative and without a table; which of the m tokens it is, a learned
    slot embedding says. Clips of a batch may end early: what comes after their end is in nobody's past.
    """

    def __init__(self, dim: int, tokens: int, config: LatentConfig):
        super().__init__()
        self.config, self.tokens, self.head_dim = config, tokens, dim // config.heads
        self.slots = nn.Parameter(torch.empty(tokens, dim))
        self.mask = nn.Parameter(torch.empty(dim))
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        init_weights(self, config.layers)
        for parameter in (self.slots, self.mask):
            nn.init.trunc_normal_(parameter, std=0.02)

    def forward(
        self, x: Tensor, spread: Spread | None = None, *, mask: bool = False, recompute: bool = False
    ) -> Tensor:
        """x (B, T, m, d), of the parameters' dtype and device -> h (B, T, m, d).

        mask: for training, `mask_ratio` of the tokens of x, at random, give way to a learned one.
        spread: x are the snippets of one rank of several, and so is h. Ranks whose random numbers are equal hide what
        one process hides.
        recompute: of each layer nothing but its input is kept for backward.
        """
        snippets, own = (x.shape[1], slice(None)) if spread is None else (len(spread.owners), spread.own)
        if mask and self.config.mask_ratio > 0:
            hidden = torch.rand(len(x), snippets, self.tokens, device=x.device)[:, own] < self.config.mask_ratio
            x = torch.where(hidden[..., None], self.mask.to(x.dtype), x)
        layout = SnippetLayout.uniform(snippets, self.tokens, window=self.config.window, sink=self.config.sink)
        positions = torch.arange(snippets, device=x.device)[own].repeat_interleave(self.tokens)
        angles = self._angles(positions, x)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, angles), rotate(k, angles)
            if spread is None:
                return block_causal_attention(q, k, v, layout)
            lengths = np.full((1, snippets), self.tokens)
            return spread.attend(q, k, v, layout, lengths, lengths)

        y = (x + self.slots).flatten(1, 2)  # (B, T*m, d)
        for block in self.blocks:
            y = block(y, attend, recompute=recompute)
        return self.norm(y).view_as(x)

    def caches(self, batch: int, window: int, sink: int, like: Tensor) -> list[SnippetCache]:
        """What `step` keeps of the past, one per layer; `like` gives dtype and device."""
        return [
            SnippetCache(
                batch,
                self.config.heads,
                self.head_dim,
                snippet_tokens=self.tokens,
                window=window,
                sink=sink,
                dtype=like.dtype,
                device=like.device,
            )
            for _ in self.blocks
        ]

    @torch.no_grad()
    def step(self, x: Tensor, caches: list[SnippetCache]) -> Tensor:
        """The next snippet, x (B, m, d) -> h (B, m, d); its keys and values go into the caches."""
        y = x + self.slots
        angles = self._angles(caches[0].position[:, None, None], x)  # (B, 1, 1, D/2): one position for all m tokens
        for block, cache in zip(self.blocks, caches, strict=True):

            def attend(q: Tensor, k: Tensor, v: Tensor, cache: SnippetCache = cache) -> Tensor:
                kind = cache.k.dtype  # autocast may come and go between snippets
                cache.append(rotate(k, angles).to(kind), v.to(kind))
                return cache.attend(rotate(q, angles).to(kind))

            y = block(y, attend)
        return self.norm(y)

    def _angles(self, positions: Tensor, like: Tensor) -> Rotary:
        return rotary(positions, self.head_dim, torch.promote_types(like.dtype, torch.float32))
