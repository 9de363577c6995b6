"""The text decoder: causal over its tokens, with cross-attention to every h_t of the clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_model.config import TextConfig
from mirasol_model.layers import Rotary, init_weights, merge_heads, rotary, rotate, split_heads

Extend = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

# Ages turn keys by AGE_SCALE log(age). Turned by the age itself, a decoder trained on clips of up to 32 snippets was at
# chance on the order of events in clips of 128; in logarithms those lie as far from what it knows as 4 from 1, and the
# models of benchmarks.needle were right on 81 to 100 % of such orders. The scale is ours, and hardly explored.
AGE_SCALE = 2.0


class Memory(NamedTuple):
    """A clip as the decoder reads it: keys and values of each layer, (B, H, T*m, D), and what is there of them."""

    layers: list[tuple[Tensor, Tensor]]
    real: Tensor | None  # (B, 1, 1, T*m) bool; None where everything is

    def expand(self, rows: int) -> Memory:
        """One clip for as many questions; a memory that has `rows` rows stays what it is."""
        layers = [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in self.layers]
        return Memory(layers, None if self.real is None else self.real.expand(rows, -1, -1, -1))


class TextCache:
    """Keys and values of the text so far, per layer, in memory allocated once."""

    def __init__(self, decoder: TextDecoder, batch: int, tokens: int, like: Tensor):
        config = decoder.config
        shape = (config.layers, 2, batch, config.heads, tokens, config.dim // config.heads)
        self.memory = like.new_zeros(shape)
        self.length = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v (B, H, L, D) -> all so far (B, H, length + L, D)."""
        end = self.length + k.shape[2]
        for kept, new in zip(self.memory[layer], (k, v), strict=True):
            kept[:, :, self.length : end] = new
        return self.memory[layer, 0, :, :, :end], self.memory[layer, 1, :, :, :end]


class TextBlock(nn.Module):
    """Pre-norm: causal self-attention, cross-attention, MLP."""

    def __init__(self, source_dim: int, config: TextConfig):
        super().__init__()
        dim, self.heads = config.dim, config.heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.query, self.key_value = nn.Linear(dim, dim), nn.Linear(source_dim, 2 * dim)
        self.cross_out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, config.mlp_dim), nn.Linear(config.mlp_dim, dim)

    def remember(self, h: Tensor, angles: Rotary) -> tuple[Tensor, Tensor]:
        """h (B, N, d) -> k, v (B, H, N, D)"""
        k, v = (split_heads(part, self.heads) for part in self.key_value(h).chunk(2, dim=-1))
        return rotate(k, angles), v

    def forward(
        self, x: Tensor, angles: Rotary, kv: tuple[Tensor, Tensor], real: Tensor | None, extend: Extend
    ) -> Tensor:
        """x (B, L, d) -> (B, L, d); extend(k, v) adds the earlier text's."""
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        k, v = extend(rotate(k, angles), v)
        causal = q.shape[2] > 1  # one token at a time sees all there is; several come only at the beginning
        attended = F.scaled_dot_product_attention(rotate(q, angles), k, v, is_causal=causal)
        x = x + self.out(merge_heads(attended))
        q = split_heads(self.query(self.norm2(x)), self.heads)
        x = x + self.cross_out(merge_heads(F.scaled_dot_product_attention(q, *kv, attn_mask=real)))
        return x + self.down(F.gelu(self.up(self.norm3(x))))


class TextDecoder(nn.Module):
    """text (B, L) -> logits (B, L, vocabulary). The output layer is the transposed embedding (ours)."""

    def __init__(self, source_dim: int, config: TextConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.dim)
        self.blocks = nn.ModuleList(TextBlock(source_dim, config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.trunc_normal_(self.embed.weight, std=0.02)
        init_weights(self, config.layers)

    def remember(self, h: Tensor, age: np.ndarray) -> Memory:
        """h (B, T, m, d) and the age of its snippets (B, T): 1 for the last of a clip, and so on back; 0 or less is
        past its end and not there. Keys are rotated by the logarithm of the age (ours): what a question asks about
        lies so long ago, the longer the less exactly."""
        m, head_dim = h.shape[2], self.config.dim // self.config.heads
        ages = torch.from_numpy(np.repeat(age, m, axis=1)).to(h.device, non_blocking=True)  # (B, T*m)
        positions = -AGE_SCALE * ages.clamp(min=1).double().log()
        angles = rotary(positions[:, None], head_dim, torch.promote_types(h.dtype, torch.float32))
        real = None if (age > 0).all() else (ages > 0)[:, None, None]
        h = h.flatten(1, 2)  # (B, T*m, d)
        return Memory([block.remember(h, angles) for block in self.blocks], real)  # type: ignore[operator]

    def forward(self, text: Tensor, memory: Memory, cache: TextCache | None = None) -> Tensor:
        """text (B, L): all of it, or with a cache what comes next (at first any number of tokens, then one by one)."""
        start = cache.length if cache else 0
        x = self.embed(text)
        positions = torch.arange(start, start + text.shape[1], device=text.device)
        angles = rotary(positions, self.config.dim // self.config.heads, torch.promote_types(x.dtype, torch.float32))
        for i, (block, kv) in enumerate(zip(self.blocks, memory.layers, strict=True)):

            def extend(k: Tensor, v: Tensor, i: int = i) -> tuple[Tensor, Tensor]:
                return cache.extend(i, k, v) if cache else (k, v)

            x = block(x, angles, kv, memory.real, extend)
        if cache:
            cache.length += text.shape[1]
        return F.linear(self.norm(x), self.embed.weight)
