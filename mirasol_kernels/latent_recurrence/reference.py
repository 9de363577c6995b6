"""The definitions, step by step: what `latent_recurrence` and `token_turing_recurrence` mean.

Nothing is hoisted, recomputed or merged here: every step concatenates what it looks at and takes one softmax over it.
The functions of `api` run `scan` and `hoisted` instead, which are these to rounding; tests hold them together.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mirasol_kernels.latent_recurrence.modules import AddErase, LearnedMlp, LearnedQueries
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters
from mirasol_kernels.latent_recurrence.parts import add_erase, join_heads, linear, logits, process, split_heads


def latent_recurrence(step: Callable, state: Any, inputs: Any, dim: int = 1) -> tuple[Any, Any]:
    """The plain loop; T at least 1."""
    leaves, structure = pytree.tree_flatten(inputs)
    outputs = []
    for now in zip(*(leaf.unbind(dim) for leaf in leaves), strict=True):
        state, output = step(state, pytree.tree_unflatten(now, structure))
        outputs.append(output)
    return state, pytree.tree_map(lambda *ys: torch.stack(ys, dim), *outputs)


def token_turing_recurrence(
    memory: Tensor, sources: tuple[Tensor, ...], parameters: TokenTuringParameters, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """memory (B, mem, c), sources each (B, T, n, c), valid (B, T, S) or None; T at least 1."""
    inputs = torch.cat(sources, 2)  # (B, T, n, c)
    mask = torch.ones(inputs.shape[:3], dtype=torch.bool, device=inputs.device)
    if valid is not None:
        counted = [torch.arange(x.shape[2], device=x.device) < valid[:, :, i, None] for i, x in enumerate(sources)]
        mask = torch.cat(counted, 2)

    def step(memory: Tensor, now: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return unit(memory, *now, parameters)

    return latent_recurrence(step, memory, (inputs, mask))


def unit(memory: Tensor, tokens: Tensor, mask: Tensor, p: TokenTuringParameters) -> tuple[Tensor, Tensor]:
    """One step: memory (B, mem, c), tokens (B, n, c), of which those in mask (B, n) count; memory, output (B, r, c)."""
    tokens = tokens.masked_fill(~mask[..., None], 0)
    if p.write is None:
        new = process(torch.cat([memory, pool(tokens, mask, p.read)], 1), p.process)  # (B, mem + r, c)
        return new[:, p.read_tokens :], new[:, : p.read_tokens]

    read_table, write_table = (p.positions.read, p.positions.write) if p.positions else (None, None)
    slots = mask.new_ones(memory.shape[:2])
    seen = torch.cat([memory, tokens], 1)  # (B, mem + n, c)
    read = pool(_placed(seen, read_table), torch.cat([slots, mask], 1), p.read)  # (B, r, c)
    output = process(read, p.process)
    if isinstance(p.write, AddErase):
        return add_erase(memory, output, p.write, p.add_erase), output
    seen = torch.cat([memory, tokens, output], 1)  # the raw tokens again, without the read table
    mask = torch.cat([slots, mask, mask.new_ones(output.shape[:2])], 1)
    return pool(_placed(seen, write_table), mask, p.write), output


def pool(x: Tensor, mask: Tensor, p: LearnedMlp | LearnedQueries) -> Tensor:
    """(B, n, c) -> (B, k, c): softmax over the tokens in mask (B, n); where there are none, a mean of 0."""
    if isinstance(p, LearnedMlp):
        return _softmax(logits(x, p).mT, mask[:, None]) @ x
    heads = p.attention.heads
    q = split_heads(linear(p.queries, p.attention.q), heads)  # (H, k, D)
    k, v = (split_heads(linear(x, w), heads) for w in (p.attention.k, p.attention.v))  # (B, H, n, D)
    weights = _softmax(q @ k.mT * q.shape[-1] ** -0.5, mask[:, None, None])  # (B, H, k, n)
    return linear(join_heads(weights @ v), p.attention.out)


def _softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)


def _placed(x: Tensor, table: Tensor | None) -> Tensor:
    return x if table is None else x + table
