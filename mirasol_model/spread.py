"""Clips whose snippets lie on several ranks: what a model needs to know to compute its own and to see the others'."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirasol_kernels import ContextShards, Ranks, SnippetLayout, context_parallel_attention
from mirasol_model.packing import Counts


class Spread(NamedTuple):
    """B clips of T snippets in all, of which rank owners[t] holds snippet t of every clip."""

    ranks: Ranks
    owners: np.ndarray  # (T,)
    counts: tuple[Counts, Counts]  # of video and of audio, (B, T): the real tokens of all snippets

    @property
    def own(self) -> np.ndarray:
        """(t,) the snippets of this rank."""
        return np.flatnonzero(self.owners == self.ranks.rank)

    @property
    def most(self) -> int:
        """Snippets of the rank that has most of them."""
        return int(np.bincount(self.owners).max())

    def gather(self, x: Tensor) -> Tensor:
        """x (B, t, ...) of this rank's snippets -> (B, T, ...), of all; differentiable."""
        return self.ranks.gather(x, self._shards(np.ones((1, len(self.owners)), int)), dim=1)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, layout: SnippetLayout, asking: np.ndarray, lengths: np.ndarray
    ) -> Tensor:
        """Attention of this rank's queries (B, H, Nq, D) over everyone's keys.  asking, lengths: (1, T) how many
        queries and keys the snippets have where rows are alike, else (B, T), the rows packed; `layout` is of all."""
        shards = self._shards(lengths)
        queries = shards if asking is lengths else self._shards(asking)
        return context_parallel_attention(q, k, v, layout, self.ranks, shards, q_shards=queries)

    def total(self, losses: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        """The losses of all ranks from each one's share; that of the text, which every rank computes, is whole."""
        given = {name: loss for name, loss in losses.items() if loss is not None}
        if not given:
            return losses
        shares = [loss / self.ranks.size if name == "text" else loss for name, loss in given.items()]
        return losses | dict(zip(given, self.ranks.total(torch.stack(shares)).unbind(), strict=True))

    def _shards(self, lengths: np.ndarray) -> ContextShards:
        return ContextShards(lengths.reshape(-1), np.tile(self.owners, len(lengths)), self.ranks.size)
