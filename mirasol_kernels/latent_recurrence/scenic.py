"""From the names and layouts of google-research/scenic@4a38d475 projects/token_turing/model.py (flax) to ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class Flax:
    """Reads modules out of flat flax paths and remembers what was not read."""

    def __init__(self, arrays: Mapping[str, Any]) -> None:
        if any(path.startswith("param.") for path in arrays):
            arrays = {path.removeprefix("param."): x for path, x in arrays.items() if path.startswith("param.")}
        self.arrays = {path.removeprefix("unit_function."): x for path, x in arrays.items()}
        self.left = set(self.arrays)

    def has(self, module: str) -> bool:
        return any(path.startswith(module + ".") for path in self.arrays)

    def take(self, path: str) -> Tensor:
        if path not in self.arrays:
            raise ValueError(f"from_scenic: arrays: expected {path!r}, got none of that name")
        self.left.discard(path)
        return torch.as_tensor(self.arrays[path]).clone()

    def norm(self, path: str) -> Norm:
        return Norm(self.take(f"{path}.scale"), self.take(f"{path}.bias"))

    def mlp(self, path: str) -> Mlp:
        hidden, out = (
            Linear(self.take(f"{path}.Dense_{i}.kernel").T.contiguous(), self.take(f"{path}.Dense_{i}.bias"))
            for i in (0, 1)
        )
        return Mlp(hidden, out)

    def attention(self, path: str) -> Attention:
        heads = self.take(f"{path}.query.kernel").shape[
            1
        ]  # kernels are (c, heads, head_dim), `out` (heads, head_dim, c)
        q, k, v = (
            Linear(self.take(f"{path}.{x}.kernel").flatten(1).T.contiguous(), self.take(f"{path}.{x}.bias").flatten())
            for x in ("query", "key", "value")
        )
        out = self.take(f"{path}.out.kernel").flatten(0, 1).T.contiguous()
        return Attention(q, k, v, Linear(out, self.take(f"{path}.out.bias")), heads)

    def learned_mlp(self, path: str) -> LearnedMlp:
        return LearnedMlp(self.norm(f"{path}.LayerNorm_0"), self.mlp(f"{path}.token_masking"))

    def learned_queries(self, path: str) -> LearnedQueries:
        return LearnedQueries(self.take(f"{path}.tokens")[0], self.attention(f"{path}.attn"))

    def add_erase(self, path: str) -> AddErase:
        norms = [self.norm(f"{path}.LayerNorm_{i}") for i in range(3)]
        mlps = [self.mlp(f"{path}.MlpBlock_{i}") for i in range(5)]
        return AddErase(
            LearnedMlp(norms[0], mlps[0]), Mixture(norms[1], mlps[1], mlps[2]), Mixture(norms[2], mlps[3], mlps[4])
        )

    def processor(self) -> Processor:
        if self.has("Encoder_0"):
            return Processor(
                tuple(self._transformer(path) for path in self._numbered("Encoder_0.encoderblock_")),
                self.norm("Encoder_0.encoder_norm"),
                self.take("Encoder_0.posembed_input.pos_embedding")[0],
            )
        if self.has("MixerBlock_0"):
            blocks = tuple(self._mixer(path) for path in self._numbered("MixerBlock_"))
            return Processor(blocks, self.norm("LayerNorm_0"))
        layers = len(self._numbered("MlpBlock_"))
        mlps = tuple(MlpBlock(self.norm(f"LayerNorm_{i}"), self.mlp(f"MlpBlock_{i}")) for i in range(layers))
        return Processor(mlps, self.norm(f"LayerNorm_{layers}"))

    def _numbered(self, prefix: str) -> list[str]:
        """prefix0, prefix1, ... as far as they are there."""
        found: list[str] = []
        while self.has(f"{prefix}{len(found)}"):
            found.append(f"{prefix}{len(found)}")
        return found

    def _transformer(self, path: str) -> TransformerBlock:
        return TransformerBlock(
            self.norm(f"{path}.LayerNorm_0"),
            self.attention(f"{path}.MultiHeadDotProductAttention_0"),
            self.norm(f"{path}.LayerNorm_1"),
            self.mlp(f"{path}.MlpBlock_0"),
        )

    def _mixer(self, path: str) -> MixerBlock:
        return MixerBlock(
            self.norm(f"{path}.LayerNorm_0"),
            self.mlp(f"{path}.token_mixing"),
            self.norm(f"{path}.LayerNorm_1"),
            self.mlp(f"{path}.channel_mixing"),
        )
