"""The pieces of a Token Turing Machine: frozen dataclasses of tensors, without behaviour."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Linear:
    weight: Tensor  # (out, in)
    bias: Tensor  # (out,)


@dataclass(frozen=True)
class Norm:
    weight: Tensor  # (c,)
    bias: Tensor  # (c,)


@dataclass(frozen=True)
class Mlp:
    hidden: Linear
    out: Linear


@dataclass(frozen=True)
class Attention:
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    heads: int


@dataclass(frozen=True)
class LearnedMlp:
    """A token learner: logits are mlp(norm(x)), one for each of the k learned tokens."""

    norm: Norm
    mlp: Mlp  # c -> h -> k


@dataclass(frozen=True)
class LearnedQueries:
    """k learned queries attend over the tokens: no norm, no residual."""

    queries: Tensor  # (k, c)
    attention: Attention


@dataclass(frozen=True)
class Mixture:
    """From r tokens to one vector for each of the write heads: over tokens, then over channels."""

    norm: Norm
    tokens: Mlp  # r -> h -> write heads
    channels: Mlp  # c -> h -> c


@dataclass(frozen=True)
class AddErase:
    """The write of a Neural Turing Machine: where (address), what goes (erase), what comes (add)."""

    address: LearnedMlp  # over memory slots, one per write head
    erase: Mixture
    add: Mixture


@dataclass(frozen=True)
class TransformerBlock:
    norm1: Norm
    attention: Attention
    norm2: Norm
    mlp: Mlp


@dataclass(frozen=True)
class MixerBlock:
    norm1: Norm
    tokens: Mlp  # over tokens
    norm2: Norm
    channels: Mlp


@dataclass(frozen=True)
class MlpBlock:
    norm: Norm
    mlp: Mlp


@dataclass(frozen=True)
class Processor:
    """Blocks of one kind and a final norm; positions (tokens, c) are added first (the transformer has them)."""

    blocks: tuple[TransformerBlock, ...] | tuple[MixerBlock, ...] | tuple[MlpBlock, ...]
    norm: Norm
    positions: Tensor | None = None


@dataclass(frozen=True)
class Positions:
    """Learned tables in the order memory, input (its sources one after another), output."""

    read: Tensor  # (mem + n, c)
    write: Tensor | None  # (mem + n + r, c); None where the write does not look at tokens (AddErase)


def learned_tokens(pool: LearnedMlp | LearnedQueries) -> int:
    """k."""
    return pool.queries.shape[0] if isinstance(pool, LearnedQueries) else pool.mlp.out.weight.shape[0]


def tensors_in(node: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of `node` with its dotted name."""
    if isinstance(node, Tensor):
        yield name, node
    for key, child in _children(node):
        yield from tensors_in(child, f"{name}.{key}" if name else key)


def map_tensors(node: Any, change: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """`node` with every tensor replaced by change(its dotted name, tensor)."""
    if isinstance(node, Tensor):
        return change(name, node)
    changed = {key: map_tensors(child, change, f"{name}.{key}" if name else key) for key, child in _children(node)}
    if isinstance(node, tuple):
        return tuple(changed.values())
    return dataclasses.replace(node, **changed) if changed else node


def _children(node: Any) -> list[tuple[str, Any]]:
    if isinstance(node, tuple):
        return [(str(i), item) for i, item in enumerate(node)]
    return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node)] if dataclasses.is_dataclass(node) else []
