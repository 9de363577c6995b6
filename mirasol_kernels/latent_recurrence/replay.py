"""The loop as one node of autograd's graph: it keeps states, and its backward runs segments of steps again.

`torch.utils.checkpoint` around each segment computes the same, but calls Python three times for every tensor that a
step saves. Here forward runs a segment with its graph, reads off that graph which parameters the step captured, and
drops it; backward runs the segment again and asks autograd for the gradients of exactly these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import get_device_states

Form = tuple[pytree.TreeSpec, list[tuple[tuple[int, ...], torch.dtype]]]  # of a tree of tensors
Ran = tuple[list[Tensor], list[list[Tensor]], Form]  # the state, what each step put out, and the form of that
Run = Callable[
    ..., Ran
]  # (state, inputs of some steps, form of outputs); states, inputs and outputs as lists of leaves


class CannotReplay(Exception):
    """The step captured what this node cannot take as its input: a tensor with a past, or with hooks."""


def can_replay() -> bool:
    """Whether there is a graph to replay, and nobody else has a hand in it. FSDP, for one, expects the gradients of
    what it gathered for a step within that step's own backward."""
    return (
        torch.is_grad_enabled()
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    )


Random = list[Tensor]  # the states of random number generators


class Surroundings:
    """What steps find beside their arguments, to be found again in backward: autocast, and random numbers, of the CPU
    and of the devices that some tensors are on."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices, _ = get_device_states(*tensors)
        self.kind = next((x.device.type for x in tensors if x.device.type not in ("cpu", "meta")), "cpu")
        self.autocast = self._autocast()

    def random(self) -> Random:
        states = [torch.get_rng_state()]
        if self.devices:
            module = torch.get_device_module(self.kind)
            states += [module.get_rng_state(device) for device in self.devices]
        return states

    def restore(self, random: Random) -> None:
        torch.set_rng_state(random[0])
        for device, state in zip(self.devices, random[1:], strict=True):
            torch.get_device_module(self.kind).set_rng_state(state, device)

    @contextlib.contextmanager
    def again(self, random: Random) -> Iterator[None]:
        """A segment is short, and mostly finds everything as it was: then nothing is set."""
        now = self.random()
        with contextlib.ExitStack() as stack:
            if self._autocast() != self.autocast:
                for how in self.autocast:
                    stack.enter_context(torch.autocast(*how))
            if not same(now, random):
                self.restore(random)
            try:
                yield
            finally:
                if not same(now, self.random()):
                    self.restore(now)

    def _autocast(self) -> list[tuple[str, torch.dtype, bool, bool]]:
        return [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in dict.fromkeys(("cpu", self.kind))
        ]


def same(a: Random, b: Random) -> bool:
    return all(map(torch.equal, a, b))


class Plan(NamedTuple):
    """What the node is told beside its tensors."""

    run: Run
    dim: int
    every: int
    inputs: int  # how many leaves
    state: int
    varying: list[list[bool]]  # of each segment but the first: which leaves of its state have a gradient
    surroundings: Surroundings
    random: list[Random]  # of each segment


def replayed(
    run: Run, state: Sequence[Tensor], inputs: Sequence[Tensor], dim: int, every: int
) -> tuple[list[Tensor], Any]:
    """The leaves of the last state, and the outputs. Raises CannotReplay, with random numbers as they were."""
    length = inputs[0].shape[dim]
    oldest = torch._C._autograd._get_sequence_nr()
    surroundings, random = Surroundings((*state, *inputs)), list[Random]()
    kept: list[Tensor] = []  # (segments - 1, ...): the states that segments begin with, but for the first
    varying: list[list[bool]] = []  # which of them have a gradient
    outputs: list[Tensor] = []
    differentiable: list[bool] = []
    parameters: dict[int, Tensor] = {}
    form: Any = None
    now = _cut_off(state)
    for first in range(0, length, every):
        drawn = surroundings.random()  # 5 kB: kept once for all segments that draw nothing
        random.append(random[-1] if random and same(random[-1], drawn) else drawn)
        part = _cut_off(_steps(inputs, dim, first, every))
        end, made, form = run(now, part, form)
        try:
            parameters |= _captured([*end, *(y for ys in made for y in ys)], {id(x) for x in (*now, *part)}, oldest)
        except CannotReplay:
            surroundings.restore(random[0])
            raise
        if first == 0:
            outputs = [_room(y, dim, length) for y in made[0]]
            differentiable = [False] * len(outputs)
            # In one tensor: each by itself would take a part of a page more.
            kept = [x.new_empty((-(-length // every) - 1, *x.shape)) for x in end]
        else:
            for room, x in zip(kept, now, strict=True):
                room[len(varying)].copy_(x.detach())
            varying.append([x.requires_grad for x in now])
        for i, ys in enumerate(zip(*made, strict=True)):
            differentiable[i] |= _fill(outputs[i], ys, dim, first)
        now, ys = _cut_off(end), ()
        del end, made, part  # with them goes the graph
    everything = [*(x.detach() for x in now), *outputs]
    flags = [*(x.requires_grad for x in now), *differentiable]
    if any(flags):
        plan = Plan(run, dim, every, len(inputs), len(state), varying, surroundings, random)
        constants = [x for x, yes in zip(everything, flags, strict=True) if not yes]
        everything = list(_Replay.apply(plan, everything, constants, kept, *inputs, *state, *parameters.values()))
    return everything[: len(state)], pytree.tree_unflatten(everything[len(state) :], form[0])


def _steps(inputs: Sequence[Tensor], dim: int, first: int, count: int) -> list[Tensor]:
    return [x.narrow(dim, first, min(count, x.shape[dim] - first)) for x in inputs]


def _cut_off(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The same numbers, where a graph begins."""
    return [x.detach().requires_grad_(x.requires_grad) for x in tensors]


def _room(y: Tensor, dim: int, length: int) -> Tensor:
    axis = dim % (y.dim() + 1)
    return y.new_empty((*y.shape[:axis], length, *y.shape[axis:]))


def _fill(room: Tensor, ys: Sequence[Tensor], dim: int, first: int) -> bool:
    """Write steps `first` and on; whether any of them has a gradient."""
    for t, y in enumerate(ys, first):
        room.select(dim, t).copy_(y.detach())
    return any(y.requires_grad for y in ys)


def _captured(made: list[Tensor], given: set[int], oldest: int) -> dict[int, Tensor]:
    """By id, the leaves that `made` was computed from, other than those given.

    oldest: the graph's sequence number before the first step: what is older was captured, with its past.
    """
    found: dict[int, Tensor] = {id(x): x for x in made if x.requires_grad and x.is_leaf}
    stack = [x.grad_fn for x in made if x.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            found[id(leaf)] = leaf
            continue
        if node._sequence_nr() < oldest:
            raise CannotReplay
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                stack.append(following)
    found = {key: leaf for key, leaf in found.items() if key not in given}
    if any(leaf._backward_hooks for leaf in found.values()):  # they would run in each segment
        raise CannotReplay
    return found


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, plan: Plan, made: list[Tensor], constants: list[Tensor], kept: list[Tensor], *tensors: Tensor
    ):
        """tensors: inputs, first state, parameters. Returns what was made."""
        ctx.plan = plan
        ctx.save_for_backward(*tensors, *kept)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*constants)
        ctx.parameters = len(tensors) - plan.inputs - plan.state
        return tuple(made)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        plan, saved = ctx.plan, list(ctx.saved_tensors)
        inputs, rest = saved[: plan.inputs], saved[plan.inputs :]
        state, rest = rest[: plan.state], rest[plan.state :]
        parameters, kept = rest[: ctx.parameters], rest[ctx.parameters :]
        dend, douts = list(grads[: plan.state]), grads[plan.state :]
        length = inputs[0].shape[plan.dim]
        if torch.is_grad_enabled():  # create_graph: the gradients hang on all that they come from
            with plan.surroundings.again(plan.random[0]):
                end, made, _ = plan.run(state, inputs)
                return (None,) * 4 + _gradients(
                    plan.dim, 0, end, made, dend, douts, [*inputs, *state, *parameters], True
                )

        dinputs = [torch.empty_like(x) if x.requires_grad else None for x in inputs]
        dparameters: list[Tensor | None] = [None] * len(parameters)
        own: set[int] = set()  # of these, the sums: a gradient may share its memory with others
        for number in reversed(range(len(plan.random))):
            first = number * plan.every
            now, part = _cut_off(state), _cut_off(_steps(inputs, plan.dim, first, plan.every))
            if number > 0:
                flags = plan.varying[number - 1]
                now = [room[number - 1].requires_grad_(flag) for room, flag in zip(kept, flags, strict=True)]
            with torch.enable_grad(), plan.surroundings.again(plan.random[number]):
                end, made, _ = plan.run(now, part)
            got = _gradients(plan.dim, first, end, made, dend, douts, [*part, *now, *parameters])
            del end, made
            for room, dx in zip(dinputs, got, strict=False):
                if room is not None:
                    share = room.narrow(plan.dim, first, min(plan.every, length - first))
                    share.zero_() if dx is None else share.copy_(dx)
            dend = list(got[plan.inputs : plan.inputs + plan.state])
            for i, more in enumerate(got[plan.inputs + plan.state :]):
                so_far = dparameters[i]
                if so_far is None or more is None:
                    dparameters[i] = more if so_far is None else so_far
                elif i in own:
                    so_far.add_(more)
                else:
                    dparameters[i] = so_far + more
                    own.add(i)
            del got
        return (None, None, None, None, *dinputs, *dend, *dparameters)


def _gradients(
    dim: int,
    first: int,
    end: Sequence[Tensor],
    made: Sequence[Sequence[Tensor]],
    dend: Sequence[Tensor | None],
    douts: Sequence[Tensor | None],
    wanted: Sequence[Tensor],
    create_graph: bool = False,
) -> tuple[Tensor | None, ...]:
    """Of what is wanted, from those of the state after some steps and of all outputs; None where there is none."""
    pairs = list(zip(end, dend, strict=True))
    for t, ys in enumerate(made, first):
        pairs += [(y, None if dy is None else dy.select(dim, t)) for y, dy in zip(ys, douts, strict=True)]
    pairs = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
    leaves = [x for x in wanted if x.requires_grad]
    if not pairs or not leaves:
        return (None,) * len(wanted)
    roots, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(roots, leaves, weights, allow_unused=True, create_graph=create_graph))
    return tuple(next(found) if x.requires_grad else None for x in wanted)
