"""The Token Turing Machine with its input off the sequential path: equal to `reference` to rounding.

The softmax over [memory | input | output] is a merge of states, and the state of the input depends on nothing that the
recurrence computes.  So the input's states, for read and for write, are made for all T steps at once; a step pools its
memory and its r tokens and merges.  README.md has the algebra.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from mirasol_kernels._autocast import without_autocast
from mirasol_kernels._dispatch import Backend, use_backend, wanted_backend
from mirasol_kernels.block_causal_attention import block_causal_attention
from mirasol_kernels.latent_recurrence.modules import AddErase, LearnedMlp, LearnedQueries, Linear, Mlp
from mirasol_kernels.latent_recurrence.op import fused
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters
from mirasol_kernels.latent_recurrence.parts import add_erase, join_heads, linear, process, split_heads
from mirasol_kernels.latent_recurrence.scan import scan
from mirasol_kernels.layout import SnippetLayout
from mirasol_kernels.token_learner import TokenLearnerState, token_learner_state

Pool = LearnedMlp | LearnedQueries
Tables = tuple[Tensor | None, ...]


def token_turing_recurrence(
    memory: Tensor,
    sources: tuple[Tensor, ...],
    parameters: TokenTuringParameters,
    valid: Tensor | None,
    gather: Callable[[Tensor], Tensor] | None,
    backend: str | None,
    steps: Backend | None,
) -> tuple[Tensor, Tensor]:
    """memory (B, mem, c), sources each (B, T, n, c), valid (B, T, S) or None, as `api` has checked them.

    gather: of a rank's steps makes everyone's.

    steps: the backend that runs the sequential part in one call, or None: step by step, in PyTorch.
    """
    p, batch_and_time = parameters, sources[0].shape[:2]
    lengths = [memory.shape[1], *(x.shape[2] for x in sources), p.read_tokens]
    read_table, write_table = (p.positions.read, p.positions.write) if p.positions else (None, None)
    read_tables, write_tables = _split(read_table, lengths[:-1]), _split(write_table, lengths)
    every_step = tuple(x.flatten(0, 1) for x in sources)  # (B T, n, c)
    counts = None if valid is None else valid.flatten(0, 1)

    def at_once(pool: Pool, tables: Tables) -> TokenLearnerState:
        """The states of the input of all steps, with leading axes (B, T)."""
        fields = [x.unflatten(0, batch_and_time) for x in pooled(pool, every_step, tables, counts, backend)]
        return TokenLearnerState(*(map(gather, fields) if gather else fields))

    def read(memory: Tensor, of_input: TokenLearnerState) -> Tensor:
        of_memory = pooled(p.read, (memory,), read_tables[:1], None, backend)
        return finished(p.read, of_memory.merge(of_input), memory.dtype)

    def step_simple(memory: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        new = process(torch.cat([memory, tokens], 1), p.process).to(memory.dtype)
        return new[:, p.read_tokens :], new[:, : p.read_tokens]

    def step_add_erase(memory: Tensor, of_input: TokenLearnerState) -> tuple[Tensor, Tensor]:
        output = process(read(memory, of_input), p.process).to(memory.dtype)
        new = add_erase(memory, output, cast(AddErase, p.write), p.add_erase)
        return new.to(memory.dtype), output

    def step(memory: Tensor, now: tuple[TokenLearnerState, TokenLearnerState]) -> tuple[Tensor, Tensor]:
        for_read, for_write = now
        output = process(read(memory, for_read), p.process).to(memory.dtype)
        write = cast(Pool, p.write)
        of_step = pooled(write, (memory, output), (write_tables[0], write_tables[-1]), None, backend)
        return finished(write, of_step.merge(for_write), memory.dtype), output

    if steps is not None:
        # token_learner has no CUDA kernel: beside that of the steps, what is parallel runs on the best there is.
        backend = None if steps.name == "cuda" else backend or wanted_backend()
        with use_backend(backend):
            for_read = at_once(_without_bias_gradient(cast(LearnedMlp, p.read)), read_tables[1:])
            for_write = at_once(_without_bias_gradient(cast(LearnedMlp, p.write)), write_tables[1:-1])
        tables = read_tables[0], write_tables[0], write_tables[-1], p.process.positions
        return fused(steps, memory, for_read, for_write, p, tables)
    for_read = at_once(p.read, read_tables[1:])
    if p.write is None:
        return scan(step_simple, memory, finished(p.read, for_read, memory.dtype))
    if isinstance(p.write, AddErase):
        return scan(step_add_erase, memory, for_read)
    return scan(step, memory, (for_read, at_once(p.write, write_tables[1:-1])))


def pooled(
    pool: Pool, sources: tuple[Tensor, ...], tables: Tables, valid: Tensor | None, backend: str | None
) -> TokenLearnerState:
    """The state of the tokens of all sources; with learned queries its axes are (B, H, k) and (B, H, k, D)."""
    if isinstance(pool, LearnedMlp):
        hidden, out = pool.mlp.hidden, pool.mlp.out
        weights = (pool.norm.weight, pool.norm.bias, hidden.weight, hidden.bias, out.weight, out.bias)
        return token_learner_state(sources, *weights, positions=tables, valid=valid, backend=backend)
    states = []
    for i, (source, table) in enumerate(zip(sources, tables, strict=True)):
        count = None if valid is None else valid[:, i]
        states.append(_attended(pool, source if table is None else source + table, count, backend))
    return functools.reduce(TokenLearnerState.merge, states)


def _without_bias_gradient(p: LearnedMlp) -> LearnedMlp:
    """The last bias moves all logits of a token alike, so its gradient is 0; see `op.Steps.backward`."""
    out = p.mlp.out
    return LearnedMlp(p.norm, Mlp(p.mlp.hidden, Linear(out.weight, out.bias.detach())))


def finished(pool: Pool, state: TokenLearnerState, dtype: torch.dtype) -> Tensor:
    """The pooled tokens (..., k, c)."""
    value = state.value().to(dtype)
    return value if isinstance(pool, LearnedMlp) else linear(join_heads(value), pool.attention.out).to(dtype)


def _attended(pool: LearnedQueries, x: Tensor, count: Tensor | None, backend: str | None) -> TokenLearnerState:
    """Attention as a state: out and lse are the state whose reference point is lse, where the sum is 1."""
    p = pool.attention
    q = split_heads(linear(pool.queries, p.q), p.heads).expand(x.shape[0], -1, -1, -1)  # (B, H, k, D)
    mask = None
    if count is not None:
        mask = torch.arange(x.shape[1], device=x.device) < count[:, None]  # (B, n)
        x = x.masked_fill(~mask[..., None], 0)
    k, v = (split_heads(linear(x, w), p.heads) for w in (p.k, p.v))  # (B, H, n, D)
    if mask is not None or torch.compiler.is_compiling():
        out, lse = _dense_attention(q, k, v, mask)
    else:
        layout = _everything(q.shape[2], k.shape[2])
        out, lse = block_causal_attention(q, k, v, layout, return_lse=True, backend=backend)
    maximum = lse.detach()
    total = (lse - maximum.masked_fill(maximum == -torch.inf, 0)).exp()  # 1, or 0 where nothing was seen; carries lse
    return TokenLearnerState(maximum, total, total[..., None] * out.to(total.dtype))


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same where a layout, made on the host outside compiled code, cannot say it: counts are on the device."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    with without_autocast(q.device.type):
        q, k, v = (x.to(dtype) for x in (q, k, v))
        scores = q @ k.mT * q.shape[-1] ** -0.5  # (B, H, k, n)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None, None], -torch.inf)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
        return weights @ v, lse


@functools.lru_cache(maxsize=256)
def _everything(queries: int, keys: int) -> SnippetLayout:
    return SnippetLayout.cross([queries], [keys], [1])


def _split(table: Tensor | None, lengths: list[int]) -> Tables:
    return (None,) * len(lengths) if table is None else table.split(lengths)
