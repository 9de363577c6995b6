"""The softmax monoid: pooled tokens that are not yet divided by their sum, so that parts can be merged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLearnerState(NamedTuple):
    """What k learned tokens have seen so far of some tokens x with logits s.

    max      (B, k)     the largest logit seen, -inf if none; a reference point that carries no gradient
    sum      (B, k)     sum of exp(s - max)
    weighted (B, k, c)  sum of exp(s - max) * x

    float32, or float64 for float64 tokens.  `merge` is associative and commutative, and a state without tokens
    (-inf, 0, 0) is its identity, so tokens may come in tiles, sources, time steps or ranks, in any order.  Whatever
    does not depend on the choice of `max` (value(), max + log(sum), and both after merges) has its exact gradient,
    because there the derivatives with respect to `max` cancel.  A NamedTuple, hence a pytree: it can be the state or
    the input of `latent_recurrence`.  The leading axes may be any, equal in all three.
    Raises ValueError or TypeError naming the argument where shapes do not fit.
    """

    max: Tensor
    sum: Tensor
    weighted: Tensor

    @classmethod
    def empty(cls, like: Tensor, k: int) -> TokenLearnerState:
        """The identity, for tokens like `like` (B, n, c)."""
        if not isinstance(like, Tensor) or like.dim() != 3 or not like.is_floating_point():
            got = f"{like.dtype} {tuple(like.shape)}" if isinstance(like, Tensor) else type(like).__name__
            raise ValueError(f"TokenLearnerState.empty: like: expected floating tokens (B, n, c), got {got}")
        if not isinstance(k, int) or k < 0:
            raise ValueError(f"TokenLearnerState.empty: k: expected an integer of at least 0, got {k!r}")
        batch, _, c = like.shape
        dtype = accumulation_dtype(like.dtype)
        return cls(
            like.new_full((batch, k), -torch.inf, dtype=dtype),
            like.new_zeros((batch, k), dtype=dtype),
            like.new_zeros((batch, k, c), dtype=dtype),
        )

    def merge(self, other: TokenLearnerState) -> TokenLearnerState:
        """The state of the tokens of both."""
        if not isinstance(other, TokenLearnerState):
            raise TypeError(f"TokenLearnerState.merge: other: expected a state, got {type(other).__name__}")
        self._check("merge")
        other._check("merge: other")
        if other.weighted.shape != self.weighted.shape:  # not to be broadcast: states of another width or batch
            expected, got = tuple(self.weighted.shape), tuple(other.weighted.shape)
            raise ValueError(f"TokenLearnerState.merge: other: expected weighted {expected} like self, got {got}")
        maximum = torch.maximum(self.max, other.max).detach()
        pivot = finite(maximum)
        mine, theirs = (self.max - pivot).exp(), (other.max - pivot).exp()  # (B, k)
        return TokenLearnerState(
            maximum,
            mine * self.sum + theirs * other.sum,
            mine[..., None] * self.weighted + theirs[..., None] * other.weighted,
        )

    def value(self) -> Tensor:
        """The pooled tokens (B, k, c): softmax-weighted means, and zeros where no token was seen."""
        self._check("value")
        return self.weighted / self.sum.masked_fill(self.sum == 0, 1)[..., None]

    def _check(self, call: str) -> None:
        if not self.max.shape == self.sum.shape == self.weighted.shape[:-1]:
            shapes = ", ".join(str(tuple(x.shape)) for x in self)
            raise ValueError(f"TokenLearnerState.{call}: expected max and sum (B, k), weighted (B, k, c), got {shapes}")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums over tokens are kept in float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def finite(maximum: Tensor) -> Tensor:
    """`maximum` with 0 for -inf, so that exp(s - maximum) of a masked s is 0 and not exp(-inf + inf)."""
    return maximum.masked_fill(maximum == -torch.inf, 0)
