"""The backward by hand, in PyTorch: what the kernels port, line by line.  It recomputes; nothing of size n is saved.

With p = exp(s - max) and the state (max, sum, weighted) = (max, sum_n p, sum_n p x):

    dp = dsum + x . dweighted        ds = p dp        dx = p dweighted + (the way through the logits)

so every source is its own affair once dsum (B, k) and dweighted (B, k, c) are known.  The finished tokens
out = weighted / sum have dweighted = dout / sum and dsum = -(dout . out) / sum.  With the softmax weights w = p / sum
that makes ds = w (dout . x - dout . out), the backward of softmax.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from mirasol_kernels.token_learner.reference import Tables, Tokens, leading, tokens
from mirasol_kernels.token_learner.state import TokenLearnerState, finite


class Gradients(NamedTuple):
    sources: Tokens
    weights: Tokens  # of norm_weight, norm_bias, w1, b1, w2, b2
    positions: Tables


def token_learner_backward(dout: Tensor, out: Tensor, state: TokenLearnerState, *args) -> Gradients:
    """From dout (B, k, c), with out = state.value() and only `max` and `sum` of the state used (B, k).

    args: those of the forward, from `sources` to `eps`.
    """
    inverse = state.sum.masked_fill(state.sum == 0, 1).reciprocal()
    return token_learner_state_backward(-(dout * out).sum(-1) * inverse, dout * inverse[..., None], state.max, *args)


def token_learner_state_backward(
    dsum: Tensor,
    dweighted: Tensor,
    maximum: Tensor,
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
) -> Gradients:
    """From the gradients dsum (B, k) and dweighted (B, k, c) of a state whose merged max was `maximum` (B, k)."""
    pivot = finite(maximum)[:, None]  # (B, 1, k)
    dsources: list[Tensor] = []
    dpositions: list[Tensor | None] = []
    dweights = [torch.zeros_like(w) for w in (norm_weight, norm_bias, w1, b1, w2, b2)]
    for i, (source, table) in enumerate(zip(sources, positions, strict=True)):
        mask = leading(source, None if valid is None else valid[:, i])
        x = tokens(source, table, mask)  # (B, n, c)
        centred = x - x.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + eps).rsqrt()  # (B, n, 1)
        xhat = centred * rstd
        normed = xhat * norm_weight + norm_bias
        z = normed @ w1.mT + b1  # (B, n, h)
        hidden, slope = gelu_and_slope(z, gelu)
        p = (hidden @ w2.mT + b2 - pivot).exp()  # (B, n, k)
        if mask is not None:
            p = p.masked_fill(~mask, 0)

        ds = p * (dsum[:, None] + x @ dweighted.mT)  # (B, n, k)
        dz = ds @ w2 * slope  # (B, n, h)
        dnormed = dz @ w1  # (B, n, c)
        dxhat = dnormed * norm_weight
        dx = rstd * (dxhat - dxhat.mean(-1, keepdim=True) - xhat * (dxhat * xhat).mean(-1, keepdim=True))
        dx = dx + p @ dweighted
        dsources.append(dx)
        dpositions.append(None if table is None else dx.sum(0).view(table.shape))
        parts = (dnormed * xhat, dnormed, outer(dz, normed), dz, outer(ds, hidden), ds)
        for total, part in zip(dweights, parts, strict=True):
            total += part if part.dim() == 2 else part.sum((0, 1))
    return Gradients(tuple(dsources), tuple(dweights), tuple(dpositions))


def outer(dy: Tensor, x: Tensor) -> Tensor:
    """The gradient (o, i) of a weight: the sum over all tokens of dy (B, n, o) times x (B, n, i)."""
    return dy.flatten(0, 1).mT @ x.flatten(0, 1)


def gelu_and_slope(z: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """gelu(z) and its derivative; kind "tanh" or "erf"."""
    if kind == "erf":
        area = 0.5 * (1 + torch.erf(z * math.sqrt(0.5)))
        return z * area, area + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    root = math.sqrt(2 / math.pi)
    t = torch.tanh(root * (z + 0.044715 * z**3))
    slope = root * (1 + 3 * 0.044715 * z * z)
    return 0.5 * z * (1 + t), 0.5 * (1 + t) + 0.5 * z * (1 - t * t) * slope
