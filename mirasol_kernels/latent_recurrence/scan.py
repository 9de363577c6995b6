"""The loop that forgets: segments of steps whose activations are recomputed in backward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mirasol_kernels._dispatch import use_backend, wanted_backend

# What one step keeps for backward, in sizes of its state: 6 to 19 measured for Token Turing Machines (README.md).
SAVED_PER_STATE = 10


def scan(step: Callable, state: Any, inputs: Any, dim: int = 1, checkpoint_every: int | None = None) -> tuple[Any, Any]:
    """`api.latent_recurrence`, its inputs checked: pytrees of at least one tensor, of equal length T along `dim`."""
    leaves, structure = pytree.tree_flatten(inputs)
    length = leaves[0].shape[dim]
    if length == 0:
        return state, _no_outputs(step, state, leaves, structure, dim)
    every = checkpoint_every or default_segment(length)
    form, backend = _form(state), wanted_backend()

    def segment(state: Any, part: tuple[Tensor, ...]) -> tuple[Any, Any]:
        # Cut and joined in here, so that no more than a segment's steps are alive at once: an output, or the gradient
        # of an input, is often a view of something larger.
        outputs = []
        with use_backend(backend):  # recomputation may run in another thread
            for now in zip(*(leaf.unbind(dim) for leaf in part), strict=True):
                state, output = _call(step, state, pytree.tree_unflatten(now, structure))
                _same("state", "the state it was given", form, _form(state))
                outputs.append(output)
                _same("outputs", "the outputs of the first step", _form(outputs[0]), _form(output))
        return state, pytree.tree_map(lambda *ys: torch.stack(ys, dim), *outputs)

    outputs = []
    for part in zip(*(leaf.split(every, dim) for leaf in leaves), strict=True):
        if torch.is_grad_enabled():
            state, made = checkpoint(segment, state, part, use_reentrant=False)
        else:
            state, made = segment(state, part)
        outputs.append(made)
        first, last = (_form(pytree.tree_map(lambda y: y.select(dim, 0), each)) for each in (outputs[0], made))
        _same("outputs", "the outputs of the first step", first, last)
    return state, pytree.tree_map(lambda *parts: torch.cat(parts, dim), *outputs)


def default_segment(length: int) -> int:
    """The K that minimises T/K kept states + K steps' activations."""
    return max(1, math.isqrt(length // SAVED_PER_STATE))


def _call(step: Callable, state: Any, now: Any) -> tuple[Any, Any]:
    result = step(state, now)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"latent_recurrence: step: expected it to return (state, output), got {type(result).__name__}")
    return result


def _no_outputs(step: Callable, state: Any, leaves: list[Tensor], structure: pytree.TreeSpec, dim: int) -> Any:
    """T = 0: one step on zeros says what an output looks like."""
    zeros = [leaf.new_zeros(leaf.movedim(dim, 0).shape[1:]) for leaf in leaves]
    devices = sorted({leaf.get_device() for leaf in leaves if leaf.is_cuda})
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        _, output = _call(step, state, pytree.tree_unflatten(zeros, structure))
    _form(output)
    return pytree.tree_map(lambda y: y.new_empty((*y.shape, 0)).movedim(-1, dim), output)


def _form(tree: Any) -> tuple:
    """Structure, shapes and dtypes."""
    leaves, structure = pytree.tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"latent_recurrence: step: expected pytrees of tensors, got a {type(leaf).__name__}")
    return structure, [(tuple(leaf.shape), leaf.dtype) for leaf in leaves]


def _same(what: str, like: str, expected: tuple, got: tuple) -> None:
    if expected != got:
        raise ValueError(
            f"latent_recurrence: {what}: expected step to return {like}, {_say(expected)}, got {_say(got)}"
        )


def _say(form: tuple) -> str:
    structure, leaves = form
    return f"{len(leaves)} tensors {leaves} in {structure}" if len(leaves) != 1 else f"{leaves[0][0]} {leaves[0][1]}"
