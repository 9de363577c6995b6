"""The loop that forgets: segments of steps whose activations are recomputed in backward."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from mirasol_kernels._dispatch import use_backend, wanted_backend
from mirasol_kernels.latent_recurrence.replay import CannotReplay, Form, Ran, Run, can_replay, replayed

# What one step keeps for backward, in sizes of its state: 6 to 19 measured for Token Turing Machines (README.md).
SAVED_PER_STATE = 10


def scan(step: Callable, state: Any, inputs: Any, dim: int = 1, checkpoint_every: int | None = None) -> tuple[Any, Any]:
    """`api.latent_recurrence`, its inputs checked: pytrees of at least one tensor, of equal length T along `dim`."""
    leaves, structure = pytree.tree_flatten(inputs)
    length = leaves[0].shape[dim]
    if length == 0:
        return state, _no_outputs(step, state, leaves, structure, dim)
    every = checkpoint_every or default_segment(length)
    (first, form), backend = _taken_apart(state), wanted_backend()
    shape = form[0]

    def run(now: Sequence[Tensor], part: Sequence[Tensor], like: Any = None) -> Ran:
        state, made = pytree.tree_unflatten(now, shape), []
        with use_backend(backend):  # recomputation may run in another thread
            for xs in zip(*(leaf.unbind(dim) for leaf in part), strict=True):
                state, output = _call(step, state, pytree.tree_unflatten(xs, structure))
                last, this = _taken_apart(state)
                _same("state", "the state it was given", form, this)
                ys, this = _taken_apart(output)
                like = like or _with_time(this, dim)
                _same("outputs", "the outputs of the first step", like, this)
                made.append(ys)
        return last, made, like

    ran = None
    if not torch.compiler.is_compiling() and can_replay():
        with contextlib.suppress(CannotReplay):
            ran = replayed(run, first, leaves, dim, every)
    last, outputs = ran or _segments(run, first, leaves, dim, every)
    return pytree.tree_unflatten(last, shape), outputs


def _segments(run: Run, now: list[Tensor], leaves: list[Tensor], dim: int, every: int) -> tuple[list[Tensor], Any]:
    """What `replayed` does, for where it cannot; and without autograd."""

    def segment(now: list[Tensor], part: tuple[Tensor, ...]) -> tuple[list[Tensor], Any]:
        # Cut and joined in here, so that no more than a segment's steps are alive at once: an output, or the gradient
        # of an input, is often a view of something larger.
        now, made, form = run(now, part)
        return now, pytree.tree_unflatten([torch.stack(ys, dim) for ys in zip(*made, strict=True)], form[0])

    outputs = []
    for part in zip(*(leaf.split(every, dim) for leaf in leaves), strict=True):
        if torch.is_grad_enabled():
            now, made = checkpoint(segment, now, part, use_reentrant=False)
        else:
            now, made = segment(now, part)
        outputs.append(made)
        head, this = (_taken_apart(pytree.tree_map(lambda y: y.select(dim, 0), x))[1] for x in (outputs[0], made))
        _same("outputs", "the outputs of the first step", head, this)
    return now, pytree.tree_map(lambda *parts: torch.cat(parts, dim), *outputs)


def default_segment(length: int) -> int:
    """The K that minimises T/K kept states + K steps' activations; of two, the one of fewer segments."""
    root = max(1, math.isqrt(length // SAVED_PER_STATE))
    return min((root + 1, root), key=lambda every: -(-length // every) + SAVED_PER_STATE * every)


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
    _with_time(_taken_apart(output)[1], dim)
    return pytree.tree_map(lambda y: y.new_empty((*y.shape, 0)).movedim(-1, dim), output)


def _taken_apart(tree: Any) -> tuple[list[Tensor], Form]:
    """Leaves; structure, shapes and dtypes."""
    leaves, structure = pytree.tree_flatten(tree)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise TypeError(f"latent_recurrence: step: expected pytrees of tensors, got a {type(leaf).__name__}")
    return leaves, (structure, [(tuple(leaf.shape), leaf.dtype) for leaf in leaves])


def _with_time(form: Form, dim: int) -> Form:
    """The form of y_t, whose every tensor can have time on axis `dim`."""
    for shape, _ in form[1]:
        if not -len(shape) - 1 <= dim <= len(shape):
            raise ValueError(
                f"latent_recurrence: dim: expected an axis of the outputs, got {dim} for a y_t of shape {shape}"
            )
    return form


def _same(what: str, like: str, expected: Form, got: Form) -> None:
    if expected != got:
        raise ValueError(
            f"latent_recurrence: {what}: expected step to return {like}, {_say(expected)}, got {_say(got)}"
        )


def _say(form: Form) -> str:
    structure, leaves = form
    return f"{len(leaves)} tensors {leaves} in {structure}" if len(leaves) != 1 else f"{leaves[0][0]} {leaves[0][1]}"
