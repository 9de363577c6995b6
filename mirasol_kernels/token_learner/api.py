"""The functions users call: what they mean, what they check, and which backend runs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirasol_kernels._autocast import autocast_dtype
from mirasol_kernels.token_learner import reference
from mirasol_kernels.token_learner.op import OP, fused
from mirasol_kernels.token_learner.state import TokenLearnerState


def token_learner(
    sources: Tensor | Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    positions: Tensor | Sequence[Tensor | None] | None = None,
    valid: Tensor | None = None,
    gelu: str = "tanh",
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """k tokens, each a mean of all tokens of all sources, weighted by a softmax over the tokens.

        x = source + positions     s = w2 gelu(w1 LayerNorm(x) + b1) + b2     out_k = sum_n softmax_n(s_nk) x_n

    sources      (B, n, c), or several of equal B and c, pooled as one sequence and never concatenated; n may differ
                 and be 0
    norm_weight  (c,), norm_bias (c,)
    w1 (h, c), b1 (h,), w2 (k, h), b2 (k,): torch Linear layout
    positions    (n, c) or (1, n, c), added to the source (to the summed values too); one per source, or None
    valid        (B,) for one source, (B, S) for S: integers, how many leading tokens count; beyond [0, n] it is clamped
    gelu         "tanh" (the public reference) or "erf"

    Returns (B, k, c) in the dtype of the sources; a batch row without any token gives zeros.  All tensors have one
    floating dtype (under autocast they may differ) and device.  Raises ValueError or TypeError naming the argument.

    Source: TokenLearner v1.1, google-research/scenic@4a38d475 projects/token_learner/model.py `TokenLearnerModuleV11`;
    several sources, positions and valid: Token Turing Machines, projects/token_turing/model.py of the same.
    """
    args = _checked("token_learner", sources, norm_weight, norm_bias, w1, b1, w2, b2, positions, valid, gelu, eps)
    chosen = OP.select((*args, backend), backend)
    if chosen is None:
        return reference.token_learner_state(*args).value().to(args[0][0].dtype)
    return fused(chosen, args, divide=True)[2].to(args[0][0].dtype)


def token_learner_state(
    sources: Tensor | Sequence[Tensor],
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    positions: Tensor | Sequence[Tensor | None] | None = None,
    valid: Tensor | None = None,
    gelu: str = "tanh",
    eps: float = 1e-6,
    backend: str | None = None,
) -> TokenLearnerState:
    """`token_learner` before its last division, as a state that can be merged with the state of other tokens.

    Arguments and errors as `token_learner`.  With the states a and b of two sets of tokens, `a.merge(b).value()` is
    `token_learner` of both sets; see `TokenLearnerState` for its fields and gradients.
    """
    op = "token_learner_state"
    args = _checked(op, sources, norm_weight, norm_bias, w1, b1, w2, b2, positions, valid, gelu, eps)
    chosen = OP.select((*args, backend), backend)
    return (
        reference.token_learner_state(*args)
        if chosen is None
        else TokenLearnerState(*fused(chosen, args, divide=False))
    )


def _checked(op, sources, norm_weight, norm_bias, w1, b1, w2, b2, positions, valid, gelu, eps) -> tuple:
    """The arguments in the form the implementations take: tuples of sources and tables, valid (B, S) or None."""
    single = isinstance(sources, Tensor)
    sources = (sources,) if single else tuple(sources)
    if not sources:
        raise ValueError(f"{op}: sources: expected at least one tensor, got none")
    if single or positions is None:
        positions = (positions,) * len(sources)
    elif isinstance(positions, Tensor) or len(positions) != len(sources):
        got = "one tensor" if isinstance(positions, Tensor) else len(positions)
        raise ValueError(f"{op}: positions: expected one table or None for each of {len(sources)} sources, got {got}")

    first = sources[0]
    for i, source in enumerate(sources):
        name = "sources" if single else f"sources[{i}]"
        _tensor(op, name, source, first)
        if source.dim() != 3 or source.shape[::2] != first.shape[::2]:
            want = "(B, n, c)" if i == 0 else f"({first.shape[0]}, n, {first.shape[2]})"
            raise ValueError(f"{op}: {name}: expected {want}, got {tuple(source.shape)}")
    c = first.shape[-1]

    _shaped(op, "norm_weight", norm_weight, first, (c,))
    _shaped(op, "norm_bias", norm_bias, first, (c,))
    _shaped(op, "w1", w1, first, ("h", c))
    _shaped(op, "b1", b1, first, (w1.shape[0],))
    _shaped(op, "w2", w2, first, ("k", w1.shape[0]))
    _shaped(op, "b2", b2, first, (w2.shape[0],))
    for i, (source, table) in enumerate(zip(sources, positions, strict=True)):
        if table is not None:
            name, n = "positions" if single else f"positions[{i}]", source.shape[1]
            _shaped(op, name, table, first, (1, n, c) if isinstance(table, Tensor) and table.dim() == 3 else (n, c))
    if valid is not None:
        valid = _counts(op, valid, first, len(sources))
    if gelu not in ("tanh", "erf"):
        raise ValueError(f"{op}: gelu: expected 'tanh' or 'erf', got {gelu!r}")
    return sources, norm_weight, norm_bias, w1, b1, w2, b2, tuple(positions), valid, gelu, eps


def _tensor(op: str, name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{op}: {name}: expected a floating dtype, got {x.dtype}")
    if x.dtype != like.dtype and autocast_dtype(like.device.type) is None:
        raise TypeError(f"{op}: {name}: expected {like.dtype} like the first source, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{op}: {name}: expected a tensor on {like.device} like the first source, got {x.device}")


def _shaped(op: str, name: str, x: Tensor, like: Tensor, shape: tuple[int | str, ...]) -> None:
    if isinstance(x, Tensor) and x.shape == shape and x.dtype == like.dtype and x.device == like.device:
        return  # nearly always; and a small call is over in the time that the rest of this takes for its tensors
    _tensor(op, name, x, like)
    if x.dim() != len(shape) or any(want not in (got, "h", "k") for want, got in zip(shape, x.shape, strict=True)):
        letters = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{op}: {name}: expected ({letters}), got {tuple(x.shape)}")


def _counts(op: str, valid: Tensor, like: Tensor, sources: int) -> Tensor:
    batch = like.shape[0]
    if not isinstance(valid, Tensor):
        raise TypeError(f"{op}: valid: expected a tensor, got {type(valid).__name__}")
    if valid.is_floating_point() or valid.is_complex() or valid.dtype == torch.bool:
        raise TypeError(f"{op}: valid: expected integers, got {valid.dtype}")
    if valid.device != like.device:
        raise ValueError(f"{op}: valid: expected a tensor on {like.device} like the first source, got {valid.device}")
    if valid.shape != (batch, sources) and (sources > 1 or valid.shape != (batch,)):
        want = f"({batch},) or ({batch}, 1)" if sources == 1 else f"({batch}, {sources})"
        raise ValueError(f"{op}: valid: expected {want}, got {tuple(valid.shape)}")
    return valid.view(batch, sources)
