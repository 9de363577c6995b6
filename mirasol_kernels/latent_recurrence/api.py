"""The functions users call: what they mean and what they check."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from mirasol_kernels._autocast import autocast_dtype
from mirasol_kernels._dispatch import only_reference
from mirasol_kernels.latent_recurrence import hoisted
from mirasol_kernels.latent_recurrence.op import OP
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters
from mirasol_kernels.latent_recurrence.scan import scan


def latent_recurrence(
    step: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    inputs: Any,
    *,
    dim: int = 1,
    checkpoint_every: int | None = None,
) -> tuple[Any, Any]:
    """Run `state, y_t = step(state, x_t)` over time and return the last state and all y_t, as jax.lax.scan does.

    step: any function of tensors; parameters may be captured.  It runs again in backward, with the same random numbers
    and autocast, and must do the same then; so it must not write into what it is given, nor into what it captures.
    state: pytree of tensors; every step returns one of the same structure, shapes and dtypes.
    inputs: pytree of at least one tensor, each with time on axis `dim`, of equal length T; x_t lacks that axis.
    dim: axis of time in inputs and outputs; y_t, which lacks it, has the axes before it.
    checkpoint_every: K; forward keeps ceil(T/K) states, backward the activations of K steps at a time, at one
        recomputation.  By default about sqrt(T/10): the least memory if a step keeps 10 times its state.

    Returns (state, outputs): outputs a pytree like y_t with time on `dim`.  Gradients are those of the plain loop: of
    inputs, initial state and captured tensors, through outputs and last state.  T = 0 returns the state itself and
    empty outputs, whose shapes one step on zeros, without gradient, finds out.  Nothing is recomputed where autograd is
    off.  A run over T1 steps and then, from its state, over T2 is bitwise the run over T1 + T2.

    Raises ValueError or TypeError naming what does not fit.
    """
    op = "latent_recurrence"
    if not callable(step):
        raise TypeError(f"{op}: step: expected a function (state, x) -> (state, y), got {type(step).__name__}")
    for name, number in (("dim", dim), ("checkpoint_every", 1 if checkpoint_every is None else checkpoint_every)):
        if not isinstance(number, int):
            raise TypeError(f"{op}: {name}: expected an int, got {type(number).__name__}")
    leaves = pytree.tree_leaves(inputs)
    if not leaves:
        raise ValueError(f"{op}: inputs: expected at least one tensor, got none")
    for name, tree in (("inputs", leaves), ("state", pytree.tree_leaves(state))):
        for leaf in tree:
            if not isinstance(leaf, Tensor):
                raise TypeError(f"{op}: {name}: expected a pytree of tensors, got a {type(leaf).__name__} in it")
    for leaf in leaves:
        if not -leaf.dim() <= dim < leaf.dim():
            raise ValueError(f"{op}: dim: expected an axis of every input, got {dim} for one of {tuple(leaf.shape)}")
    lengths = [leaf.shape[dim] for leaf in leaves]
    if len(set(lengths)) > 1:
        raise ValueError(f"{op}: inputs: expected one length on axis {dim}, got {lengths}")
    if checkpoint_every is not None and checkpoint_every < 1:
        raise ValueError(f"{op}: checkpoint_every: expected at least 1 or None, got {checkpoint_every}")
    only_reference()
    return scan(step, state, inputs, dim, checkpoint_every)


def token_turing_recurrence(
    memory: Tensor,
    inputs: Tensor | Sequence[Tensor],
    parameters: TokenTuringParameters,
    *,
    valid: Tensor | None = None,
    gather: Callable[[Tensor], Tensor] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The Token Turing Machine over T steps: read r tokens from [memory | input], process, write the next memory.

        z = read([M | x_t])     y_t = process(z)     M' = write([M | x_t | y_t])

    memory: (B, mem, c); zeros to begin, the returned one to go on: run(T1) then run(T2) is run(T1 + T2).
    inputs: (B, T, n, c), or several sources of equal B, T and c, in the order of the position tables; n may differ.
    parameters: what read, process and write are; see `TokenTuringParameters`.
    valid: (B, T, S), or (B, T) for one source: integers, how many leading tokens of each source count in each step.

    gather: for inputs whose time steps lie on several ranks: makes (B, all T, ...) of this rank's (B, T, ...), as
        `Ranks.gather` does.  What it gets are softmax states, c + 2 numbers per learned token; every rank then runs all
        steps.

    Returns (memory (B, mem, c), outputs (B, T, r, c)) in the dtype of memory.  All tensors have one floating dtype
    (under autocast they may differ) and device.  All gradients; steps are recomputed in backward, and the input side of
    read and write is computed for all steps in parallel (README.md).

    Raises ValueError or TypeError naming the argument.

    Source: Ryoo et al., Token Turing Machines (arXiv 2211.09119); google-research/scenic@4a38d475
    projects/token_turing/model.py, whose quirks README.md lists.
    """
    sources = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    _check(memory, sources, parameters)
    if gather is not None and not callable(gather):
        what = f"a function of a tensor, got {type(gather).__name__}"
        raise TypeError(f"token_turing_recurrence: gather: expected {what}")
    valid = valid if valid is None else _counts(valid, sources)
    steps = OP.select((memory, sources, parameters, backend), backend)
    return hoisted.token_turing_recurrence(memory, sources, parameters, valid, gather, backend, steps)


def _check(memory: Tensor, sources: tuple[Tensor, ...], parameters: TokenTuringParameters) -> None:
    op = "token_turing_recurrence"
    if not isinstance(parameters, TokenTuringParameters):
        raise TypeError(f"{op}: parameters: expected TokenTuringParameters, got {type(parameters).__name__}")
    if not sources:
        raise ValueError(f"{op}: inputs: expected at least one tensor, got none")
    weight = parameters.process.norm.weight
    named = [("memory", memory), *((f"inputs[{i}]", x) for i, x in enumerate(sources)), ("parameters", weight)]
    for name, x in named:
        if not isinstance(x, Tensor):
            raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name}: expected a floating dtype, got {x.dtype}")
        if x.dtype != memory.dtype and autocast_dtype(memory.device.type) is None:
            raise TypeError(f"{op}: {name}: expected {memory.dtype} like memory, got {x.dtype}")
        if x.device != memory.device:
            raise ValueError(f"{op}: {name}: expected a tensor on {memory.device} like memory, got {x.device}")

    c, slots = parameters.width, parameters.memory_tokens
    if memory.dim() != 3 or memory.shape[2] != c or memory.shape[1] != (memory.shape[1] if slots is None else slots):
        want = f"(B, {'mem' if slots is None else slots}, {c})"
        raise ValueError(f"{op}: memory: expected {want} for these parameters, got {tuple(memory.shape)}")
    batch, mem, _ = memory.shape
    steps = sources[0].shape[1] if sources[0].dim() == 4 else "T"
    for i, x in enumerate(sources):
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, steps, c):
            raise ValueError(f"{op}: inputs[{i}]: expected ({batch}, {steps}, n, {c}), got {tuple(x.shape)}")

    n, r = sum(x.shape[2] for x in sources), parameters.read_tokens
    tables = parameters.positions
    expected = (
        []
        if tables is None
        else [("positions.read", tables.read, mem + n), ("positions.write", tables.write, mem + n + r)]
    )
    expected.append(("process.positions", parameters.process.positions, r if parameters.write is not None else mem + r))
    for name, table, tokens in expected:
        if table is not None and table.shape != (tokens, c):
            raise ValueError(
                f"{op}: parameters.{name}: expected ({tokens}, {c}) for memory {mem}, input {n} and read {r} tokens, "
                f"got {tuple(table.shape)}"
            )


def _counts(valid: Tensor, sources: tuple[Tensor, ...]) -> Tensor:
    """valid as (B, T, S)."""
    op, x = "token_turing_recurrence", sources[0]
    if not isinstance(valid, Tensor):
        raise TypeError(f"{op}: valid: expected a tensor, got {type(valid).__name__}")
    if valid.is_floating_point() or valid.is_complex() or valid.dtype == torch.bool:
        raise TypeError(f"{op}: valid: expected integers, got {valid.dtype}")
    if valid.device != x.device:
        raise ValueError(f"{op}: valid: expected a tensor on {x.device} like memory, got {valid.device}")
    full = (*x.shape[:2], len(sources))
    if valid.shape != full and (len(sources) > 1 or valid.shape != full[:2]):
        raise ValueError(f"{op}: valid: expected {full}, got {tuple(valid.shape)}")
    return valid.reshape(full)
