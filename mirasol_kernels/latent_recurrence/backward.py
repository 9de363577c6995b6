"""The backward of the fused steps, recomputed, in PyTorch: what kernels port, and what the Triton backend runs.

From the last step to the first, a step runs again from the memory before it, `kept`, and autograd differentiates it:
what lives at a time is what one step saves.  The products, where the time goes, are torch's.  Attention is written out,
since torch's fused one may add gradients in any order, and a kernel of ours is the same bit by bit at every run.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from mirasol_kernels.latent_recurrence.modules import (
    Attention,
    LearnedMlp,
    Linear,
    Mlp,
    Norm,
    TransformerBlock,
)
from mirasol_kernels.latent_recurrence.parts import join_heads, linear, logits, mlp, norm, split_heads
from mirasol_kernels.token_learner import TokenLearnerState

POOL, BLOCK = 6, 16  # tensors of a token learner and of a block of the processor


class Unit(NamedTuple):
    """The tensors of a fused call by their names."""

    read: LearnedMlp
    write: LearnedMlp
    blocks: tuple[TransformerBlock, ...]
    norm: Norm
    process_table: Tensor | None  # (r, c)
    read_table: Tensor | None  # (mem, c)
    write_table: Tensor | None  # (mem, c)
    output_table: Tensor | None  # (r, c)

    @classmethod
    def of(cls, weights: list[Tensor], tables: list[Tensor | None], heads: int) -> Unit:
        """weights and tables in the order of op.py's schema."""
        read_table, write_table, output_table, process_table = tables
        starts = range(2 * POOL, len(weights) - 2, BLOCK)
        blocks = tuple(_block(weights[first : first + BLOCK], heads) for first in starts)
        read, write = _pool(weights[:POOL]), _pool(weights[POOL : 2 * POOL])
        return cls(read, write, blocks, Norm(*weights[-2:]), process_table, read_table, write_table, output_table)


def _pool(w: list[Tensor]) -> LearnedMlp:
    return LearnedMlp(Norm(*w[:2]), Mlp(Linear(*w[2:4]), Linear(*w[4:6])))


def _block(w: list[Tensor], heads: int) -> TransformerBlock:
    q, k, v, out, hidden, shrink = (Linear(*w[i : i + 2]) for i in (2, 4, 6, 8, 12, 14))
    return TransformerBlock(Norm(*w[:2]), Attention(q, k, v, out, heads), Norm(*w[10:12]), Mlp(hidden, shrink))


def step(memory: Tensor, for_read: TokenLearnerState, for_write: TokenLearnerState, p: Unit) -> tuple[Tensor, ...]:
    """The next memory (B, mem, c) and the output (B, r, c) from memory (B, mem, c) and the states of a step's input."""
    z = pooled(_placed(memory, p.read_table), p.read).merge(for_read).value()  # (B, r, c)
    x = _placed(z, p.process_table)
    for block in p.blocks:
        x = x + attention(norm(x, block.norm1), block.attention)
        x = x + mlp(norm(x, block.norm2), block.mlp)
    output = norm(x, p.norm)
    seen = torch.cat([_placed(memory, p.write_table), _placed(output, p.output_table)], 1)  # (B, mem + r, c)
    return pooled(seen, p.write).merge(for_write).value(), output


def pooled(x: Tensor, p: LearnedMlp) -> TokenLearnerState:
    """The state of tokens x (B, n, c)."""
    s = logits(x, p)  # (B, n, k)
    maximum = s.detach().amax(1)
    weights = (s - maximum[:, None]).exp()
    return TokenLearnerState(maximum, weights.sum(1), weights.mT @ x)


def attention(x: Tensor, p: Attention) -> Tensor:
    q, k, v = (split_heads(linear(x, w), p.heads) for w in (p.q, p.k, p.v))  # (B, H, r, D)
    weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)  # (B, H, r, r)
    return linear(join_heads(weights @ v), p.out)


def _placed(x: Tensor, table: Tensor | None) -> Tensor:
    return x if table is None else x + table


def backward(
    dmemory: Tensor,
    doutputs: Tensor,
    kept: Tensor,
    for_read: list[Tensor],
    for_write: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor | None],
    heads: int,
) -> list[Tensor]:
    """The gradients of op.py's schema, in its order, from those of the last memory (B, mem, c) and of all outputs
    (B, T, r, c); kept (B, T, mem, c) is the memory before each step."""
    constants = [x.detach().requires_grad_() for x in weights]
    placed = [None if x is None else x.detach().requires_grad_() for x in tables]
    unit = Unit.of(constants, placed, heads)
    constants += [x for x in placed if x is not None]
    totals = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in constants]
    of_inputs = [torch.empty_like(x) for x in (*for_read[1:], *for_write[1:])]
    for t in reversed(range(kept.shape[1])):
        now = [x[:, t].detach().requires_grad_() for x in (kept, *for_read[1:], *for_write[1:])]
        memory, read_sum, read_weighted, write_sum, write_weighted = now
        with torch.enable_grad():
            read = TokenLearnerState(for_read[0][:, t], read_sum, read_weighted)
            write = TokenLearnerState(for_write[0][:, t], write_sum, write_weighted)
            results = step(memory, read, write, unit)
        dmemory, *grads = torch.autograd.grad(results, [*now, *constants], [dmemory, doutputs[:, t]])
        for total, grad in zip(of_inputs, grads, strict=False):
            total[:, t] = grad
        torch._foreach_add_(totals, grads[len(of_inputs) :])
    return [dmemory.contiguous(), *of_inputs, *totals]
