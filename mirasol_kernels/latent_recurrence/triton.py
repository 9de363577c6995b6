"""Forward on GPU: all steps as a queue of kernels, 4 + 4 x (blocks of the processor) of them a step.

    score_memory   logits of the memory, for read and for write: both are known before the step begins
    pool           z: the states of memory and input, merged
    per block      linear (norm, q k v), attend (with its projection), linear (norm, hidden, GELU), linear (shrink)
    score_output   the last norm, which gives the output, and its logits for write
    pool           the next memory: the states of memory, output and input, merged

All launches are known before the first and all buffers made: nothing is looked at on the host, and a CUDA graph can
hold a call.  A step is a chain of small products, so what counts is how few links it has, and among how many programs
each is spread.  Products of float32 keep its 24 bits.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mirasol_kernels._triton import (
    Launch,
    Machine,
    add_product,
    load_matrix,
    load_vector,
    power_of_two,
    share_of,
)
from mirasol_kernels.latent_recurrence.triton_config import POOL, SCORE
from mirasol_kernels.latent_recurrence.triton_linear import (
    LENGTHS,
    add_tokens,
    attend_launch,
    centred_at,
    linear_launch,
    moments,
    store_rows,
    tile_at,
    tokens_at,
)

# x (B, steps, n, c), steps and t.  A kernel finds x[:, t] by itself: pointers whose alignment, and strides whose
# divisors, change with t and T would each compile a kernel of their own.
Place = tuple[Tensor, int, int]


def run_forward(*args: Any, machine: Machine | None = None) -> None:
    """Fills the last memory, the outputs and `kept`, which follow the arguments of op.py's schema; machine: by default
    that of the memory."""
    memory, kept = args[0], args[-1]
    if kept.shape[1]:
        kept[:, 0].copy_(memory)
    for launch in forward_launches(*args, machine=machine or Machine.of(memory.device)):
        launch.run()


def forward_launches(
    memory: Tensor,
    for_read: list[Tensor],
    for_write: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor | None],
    heads: int,
    keep: bool,
    last: Tensor,
    outputs: Tensor,
    kept: Tensor,
    *,
    machine: Machine,
) -> list[Launch]:
    """The kernels of all steps, in order."""
    (batch, steps, read, c), slots = outputs.shape, memory.shape[1]
    reader, writer = (tuple(_folded(w[:4]) + w[4:]) for w in (weights[:6], weights[6:12]))
    blocks = [weights[first : first + 16] for first in range(12, len(weights) - 2, 16)]
    # The layers behind norms: q, k and v together (3 c, c) and (3 c), and the hidden one.
    qkvs = [_folded([*block[:2], torch.cat(block[2:8:2]), torch.cat(block[3:8:2])]) for block in blocks]
    hiddens = [_folded(block[10:14]) for block in blocks]
    read_table, write_table, output_table, process_table = tables
    width = max((block[12].shape[0] for block in blocks), default=0)  # one for all

    def buffer(*sizes: int) -> Tensor:
        return memory.new_empty(*sizes)

    read_logits, write_logits = buffer(batch, slots, read), buffer(batch, slots, slots)
    output_logits = buffer(batch, read, slots)
    x, qkv, hidden = (buffer(batch * read, columns) for columns in (c, 3 * c, width))  # the tokens of all videos
    memories = _memories(memory, last, kept if keep else None, steps)
    done = []
    for t in range(steps):
        before, after, now = memories[t], memories[t + 1], (outputs, steps, t)
        done += [
            _score_memory(before, reader, read_table, read_logits, writer, write_table, write_logits),
            _pool([(before, read_table, read_logits)], for_read, steps, t, process_table, (x, 1, 0)),
        ]
        for block, of_qkv, of_hidden in zip(blocks, qkvs, hiddens, strict=True):
            done += [
                linear_launch(x, of_qkv, qkv, machine, norm=True),
                attend_launch(qkv, block[8:10], x, read, heads),
                linear_launch(x, of_hidden, hidden, machine, norm=True, gelu=True),
                linear_launch(hidden, block[14:16], x, machine, add=True),
            ]
        seen = [(before, write_table, write_logits), (now, output_table, output_logits)]
        done += [
            _score_output(x, tuple(weights[-2:]), now, writer, output_table, output_logits),
            _pool(seen, for_write, steps, t, None, after),
        ]
    return done


def _folded(tensors: list[Tensor]) -> list[Tensor]:
    """weight and bias of the layer behind a norm, of whose own they are given two, with those in them: once a call."""
    norm_weight, norm_bias, weight, bias = tensors
    return [weight * norm_weight, torch.addmv(bias, weight, norm_bias)]


def _memories(memory: Tensor, last: Tensor, kept: Tensor | None, steps: int) -> list[Place]:
    """Where the memory lies before each step, and after the last: kept, or one of two buffers by turns."""
    if kept is not None:
        return [*((kept, steps, t) for t in range(steps)), (last, 1, 0)]
    turns = (last, torch.empty_like(last) if steps > 1 else last)
    return [(memory, 1, 0), *((turns[(steps - t) % 2], 1, 0) for t in range(1, steps + 1))]


def _score_memory(
    before: Place,
    reader: tuple[Tensor, ...],
    read_table: Tensor | None,
    read_logits: Tensor,
    writer: tuple[Tensor, ...],
    write_table: Tensor | None,
    write_logits: Tensor,
) -> Launch:
    batch, slots, read = read_logits.shape
    arguments = {
        **_named("from", before, "memory"),
        **{"reader": reader, "read_table": read_table, "read_logits": read_logits},
        **{"writer": writer, "write_table": write_table, "write_logits": write_logits},
        **{"rows": batch * slots, "MEM": slots, "READ": read, **_score_constants(reader)},
    }
    return Launch(score_memory, (triton.cdiv(batch * slots, SCORE.rows), 2), arguments, SCORE.options())


def _score_output(
    x: Tensor, norm: tuple[Tensor, ...], now: Place, writer: tuple[Tensor, ...], table: Tensor | None, logits: Tensor
) -> Launch:
    _, read, slots = logits.shape
    arguments = {
        **{"x": x, "norm": norm, **_named("to", now, "outputs"), "rows": len(x)},
        **{"writer": writer, "table": table, "logits": logits},
        **{"MEM": slots, "READ": read, **_score_constants(writer)},
    }
    return Launch(score_output, (triton.cdiv(len(x), SCORE.rows),), arguments, SCORE.options())


def _score_constants(pool_weights: tuple[Tensor, ...]) -> dict[str, int]:
    h, c = pool_weights[0].shape
    return {
        **{"C": c, "H": h, "ROWS": SCORE.rows, "BLOCK_C": SCORE.channels},
        **{"BLOCK_H": power_of_two(h), "BLOCK_K": SCORE.columns},
    }


def _pool(
    seen: list[tuple[Place, Tensor | None, Tensor]],
    of_input: list[Tensor],
    steps: int,
    t: int,
    table: Tensor | None,
    after: Place,
) -> Launch:
    """seen: memory, and output if it is seen, each with its table and its logits (B, n, k)."""
    (before, memory_table, memory_logits), *more = seen
    now, output_table, output_logits = more[0] if more else (None, None, None)
    (batch, slots, k), c = memory_logits.shape, of_input[2].shape[3]
    arguments = {
        **{**_named("from", before, "memory"), "memory_table": memory_table, "memory_logits": memory_logits},
        **{"outputs": now and now[0], "output_table": output_table, "output_logits": output_logits},
        **{"of_input": tuple(of_input), "steps": steps, "t": t, "table": table, **_named("to", after, "out")},
        **{"C": c, "MEM": slots, "READ": 0 if now is None else now[0].shape[2], "K": k},
        **{"SLOTS": POOL.rows, "BLOCK_C": POOL.columns, "TOKENS": POOL.channels},
    }
    grid = batch, triton.cdiv(k, POOL.rows), triton.cdiv(c, POOL.columns)
    return Launch(pool, grid, arguments, POOL.options())


def _named(kind: str, place: Place, name: str) -> dict[str, Any]:
    return dict(zip((name, f"{kind}_steps", f"{kind}_t"), place, strict=True))


@triton.jit(do_not_specialize=LENGTHS)
def score_memory(
    memory,
    from_steps,
    from_t,
    reader,
    read_table,
    read_logits,
    writer,
    write_table,
    write_logits,
    rows,
    MEM: tl.constexpr,
    READ: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Logits (B, MEM, READ) for read or (B, MEM, MEM) for write of a tile of the slots of all videos."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot, inside = row % MEM, row < rows
    source = memory, (row // MEM * from_steps + from_t) * MEM + slot, inside, None, None, None
    if tl.program_id(1) == 0:
        score(source, slot, read_table, reader, read_logits, row, READ, C, H, ROWS, BLOCK_C, BLOCK_H, BLOCK_K)
    else:
        score(source, slot, write_table, writer, write_logits, row, MEM, C, H, ROWS, BLOCK_C, BLOCK_H, BLOCK_K)


@triton.jit(do_not_specialize=LENGTHS)
def score_output(
    x,
    norm,
    outputs,
    to_steps,
    to_t,
    rows,
    writer,
    table,
    logits,
    MEM: tl.constexpr,
    READ: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The outputs of a tile of the tokens x (B READ, C) of all videos, and their logits (B, READ, MEM)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token, inside = row % READ, row < rows
    mean, rstd = moments((x, row, inside, None, None, None), token, None, C, ROWS, BLOCK_C)
    source = x, row, inside, mean, rstd, norm
    at = (row // READ * to_steps + to_t) * READ + token
    for first in tl.static_range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        tile = tokens_at(source, token, None, channel, C, BLOCK_C)
        store_rows(outputs, at, inside, channel, tile, C, BLOCK_C, False)
    score(source, token, table, writer, logits, row, MEM, C, H, ROWS, BLOCK_C, BLOCK_H, BLOCK_K)


@triton.jit
def score(
    source,
    place,
    table,
    weights,
    logits,
    row,
    K: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows `row` of logits (., K): those of the tokens of `tokens_at` by a token learner of these weights."""
    hidden_weight, hidden_bias, out_weight, out_bias = weights
    mean, rstd = moments(source, place, table, C, ROWS, BLOCK_C)
    unit = tl.arange(0, BLOCK_H)
    acc = tl.zeros([ROWS, BLOCK_H], tl.float32)
    for first in range(0, C, BLOCK_C):
        channel = first + tl.arange(0, BLOCK_C)
        tile = centred_at(source, place, table, mean, channel, C, BLOCK_C)
        factor = load_matrix(hidden_weight, unit, channel, H, C, BLOCK_H, BLOCK_C)  # (BLOCK_H, BLOCK_C)
        acc = add_product(acc, tile, tl.trans(factor))
    acc = acc * rstd[:, None] + load_vector(hidden_bias, unit, H, BLOCK_H)[None, :]
    acc = acc * share_of(acc)
    for first in range(0, K, BLOCK_K):
        slot = first + tl.arange(0, BLOCK_K)
        factor = load_matrix(out_weight, slot, unit, K, H, BLOCK_K, BLOCK_H)  # (BLOCK_K, BLOCK_H)
        s = tl.dot(acc, tl.trans(factor), input_precision="ieee") + load_vector(out_bias, slot, K, BLOCK_K)[None, :]
        store_rows(logits, row, source[2], slot, s, K, BLOCK_K, False)


@triton.jit(do_not_specialize=LENGTHS)
def pool(
    memory,
    from_steps,
    from_t,
    memory_table,
    memory_logits,
    outputs,
    output_table,
    output_logits,
    of_input,
    steps,
    t,
    table,
    out,
    to_steps,
    to_t,
    C: tl.constexpr,
    MEM: tl.constexpr,
    READ: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """SLOTS learned tokens by BLOCK_C channels of one video, out of (B, K, C): means over memory, output and input; and
    the table added.  Softmax is online over tiles of tokens and begins with the state of the input."""
    b = tl.program_id(0)
    slot = tl.program_id(1) * SLOTS + tl.arange(0, SLOTS)
    channel = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)
    now, inside = b * steps + t, slot < K
    state = now * K + slot
    m = tl.load(of_input[0] + state, mask=inside, other=0.0)  # -inf, with sums of 0, where the step had no input
    weight = tl.load(of_input[1] + state, mask=inside, other=1.0)
    acc = tile_at(of_input[2], state, inside, channel, C, BLOCK_C)
    video = b * from_steps + from_t
    for first in range(0, MEM, TOKENS):
        token = first + tl.arange(0, TOKENS)
        s = logits_at(memory_logits, b, token, slot, MEM, K)
        source = memory, video * MEM + token, token < MEM, None, None, None
        m, weight, acc = add_tokens(m, weight, acc, s, tokens_at(source, token, memory_table, channel, C, BLOCK_C))
    if outputs is not None:
        for first in range(0, READ, TOKENS):
            token = first + tl.arange(0, TOKENS)
            s = logits_at(output_logits, b, token, slot, READ, K)
            source = outputs, now * READ + token, token < READ, None, None, None
            m, weight, acc = add_tokens(m, weight, acc, s, tokens_at(source, token, output_table, channel, C, BLOCK_C))
    acc = acc / weight[:, None]  # at least 1: memory has a slot
    if table is not None:
        acc += tile_at(table, slot, inside, channel, C, BLOCK_C)
    store_rows(out, (b * to_steps + to_t) * K + slot, inside, channel, acc, C, BLOCK_C, False)


@triton.jit
def logits_at(logits, b, token, slot, N: tl.constexpr, K: tl.constexpr):  # -> (len(slot), len(token))
    """Of logits (B, N, K), transposed; -inf where there is no token."""
    at = logits + (b.to(tl.int64) * N + token)[None, :] * K + slot[:, None]
    return tl.load(at, mask=(token < N)[None, :] & (slot < K)[:, None], other=float("-inf"))
