"""The definition: one source at a time in plain PyTorch, any device, any floating dtype."""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol_kernels.token_learner.state import TokenLearnerState, accumulation_dtype, finite

Tokens = tuple[Tensor, ...]  # sources, each (B, n, c)
Tables = tuple[Tensor | None, ...]  # per source its positions (n, c) or (1, n, c)


def token_learner_state(
    sources: Tokens,
    norm_weight: Tensor,
    norm_bias: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    positions: Tables,
    valid: Tensor | None,
    gelu: str,
    eps: float,
) -> TokenLearnerState:
    """The merged state of all sources; `valid` (B, S) or None.  Arguments as `api` has checked them."""
    states = []
    for i, (source, table) in enumerate(zip(sources, positions, strict=True)):
        mask = leading(source, None if valid is None else valid[:, i])
        x = tokens(source, table, mask)  # (B, n, c)
        hidden = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, eps)
        hidden = F.gelu(F.linear(hidden, w1, b1), approximate="none" if gelu == "erf" else gelu)  # (B, n, h)
        states.append(pool(F.linear(hidden, w2, b2), x, mask))
    return reduce(TokenLearnerState.merge, states)


def pool(logits: Tensor, x: Tensor, mask: Tensor | None) -> TokenLearnerState:
    """The state of tokens x (..., n, c) with logits (..., n, k); mask (..., n, 1), True for what counts."""
    dtype = accumulation_dtype(x.dtype)
    logits = logits.to(dtype)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    highest = logits.detach()  # (..., n, k)
    maximum = highest.amax(-2) if x.shape[-2] else highest.new_full((*x.shape[:-2], logits.shape[-1]), -torch.inf)
    weights = (logits - finite(maximum)[..., None, :]).exp()  # (..., n, k)
    return TokenLearnerState(maximum, weights.sum(-2), (weights.mT @ x.to(dtype)).to(dtype))


def leading(source: Tensor, count: Tensor | None) -> Tensor | None:
    """(B, n, 1), True for the first `count` (B,) tokens of each batch row; None where all count."""
    if count is None:
        return None
    return (torch.arange(source.shape[1], device=source.device) < count[:, None])[..., None]


def tokens(source: Tensor, table: Tensor | None, mask: Tensor | None) -> Tensor:
    """What is scored and summed: source + positions.  Masked tokens become 0 here, since 0 * NaN is NaN."""
    x = source if table is None else source + table
    return x if mask is None else x.masked_fill(~mask, 0)
