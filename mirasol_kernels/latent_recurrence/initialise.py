"""New parameters for a Token Turing Machine, drawn as the public reference draws them (scenic@4a38d475)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mirasol_kernels.latent_recurrence.modules import (
    AddErase,
    Attention,
    LearnedMlp,
    LearnedQueries,
    Linear,
    MixerBlock,
    Mixture,
    Mlp,
    MlpBlock,
    Norm,
    Processor,
    TransformerBlock,
)

# The reference does not expose these: heads of the learned queries, write heads of AddErase, the mixer's token MLP.
POOL_HEADS, WRITE_HEADS, TOKEN_MLP = 8, 8, 128


class Draw:
    """Tensors of one dtype and device from one generator."""

    def __init__(self, generator: torch.Generator | None, device: torch.device | str | None, dtype: torch.dtype | None):
        self.generator = generator
        self.like = torch.empty(0, device=device, dtype=dtype)

    def normal(self, *shape: int, std: float) -> Tensor:
        return self.like.new_empty(shape).normal_(0, std, generator=self.generator)

    def xavier(self, out: int, into: int) -> Tensor:
        bound = math.sqrt(6 / (into + out))
        return self.like.new_empty(out, into).uniform_(-bound, bound, generator=self.generator)

    def lecun(self, out: int, into: int) -> Tensor:
        """Variance 1 / fan-in after cutting the normal at two standard deviations, which takes 0.8796 of its own."""
        weight, std = self.like.new_empty(out, into), into**-0.5 / 0.87962566103423978
        return torch.nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std, generator=self.generator)

    def norm(self, c: int) -> Norm:
        return Norm(self.like.new_ones(c), self.like.new_zeros(c))

    def mlp(self, into: int, hidden: int, out: int) -> Mlp:
        return Mlp(
            Linear(self.xavier(hidden, into), self.normal(hidden, std=1e-6)),
            Linear(self.xavier(out, hidden), self.normal(out, std=1e-6)),
        )

    def attention(self, c: int, heads: int, lecun: bool = False) -> Attention:
        weight = self.lecun if lecun else self.xavier
        q, k, v, out = (Linear(weight(c, c), self.like.new_zeros(c)) for _ in range(4))
        return Attention(q, k, v, out, heads)

    def table(self, tokens: int, c: int) -> Tensor:
        return self.normal(tokens, c, std=0.02)

    def learned_mlp(self, c: int, hidden: int, k: int) -> LearnedMlp:
        return LearnedMlp(self.norm(c), self.mlp(c, hidden, k))

    def learned_queries(self, c: int, k: int, std: float) -> LearnedQueries:
        return LearnedQueries(self.normal(k, c, std=std), self.attention(c, POOL_HEADS, lecun=True))

    def add_erase(self, c: int, hidden: int, read: int) -> AddErase:
        def mixture() -> Mixture:
            return Mixture(self.norm(c), self.mlp(read, hidden, WRITE_HEADS), self.mlp(c, hidden, c))

        return AddErase(self.learned_mlp(c, hidden, WRITE_HEADS), mixture(), mixture())

    def processor(self, kind: str, tokens: int, c: int, layers: int, mlp: int, heads: int) -> Processor:
        blocks: tuple
        if kind == "transformer":
            blocks = tuple(
                TransformerBlock(self.norm(c), self.attention(c, heads), self.norm(c), self.mlp(c, mlp, c))
                for _ in range(layers)
            )
        elif kind == "mixer":
            blocks = tuple(
                MixerBlock(self.norm(c), self.mlp(tokens, TOKEN_MLP, tokens), self.norm(c), self.mlp(c, mlp, c))
                for _ in range(layers)
            )
        else:
            blocks = tuple(MlpBlock(self.norm(c), self.mlp(c, mlp, c)) for _ in range(layers))
        return Processor(blocks, self.norm(c), self.table(tokens, c) if kind == "transformer" else None)
