"""Does a backend compute what the reference defines?  Shared by tests and `python -m mirasol_kernels --check`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class Case(NamedTuple):
    """One sample call: `call(**tensors, backend=...)`; all tensors are floating point and are differentiated.

    orders: the same call with its sums taken in other orders.  Where steps amplify roundings, what a dtype cannot avoid
    differs by more than two between orders: it is the worst of them.
    """

    name: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    tensors: dict[str, Tensor]
    orders: tuple[Callable[..., Tensor | tuple[Tensor, ...]], ...] = ()


def leaves(case: Case, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of the case, cast to `dtype`, as `evaluate` passes them: a forward-only backend refuses these."""
    return {name: x.detach().to(dtype or x.dtype).requires_grad_() for name, x in case.tensors.items()}


def evaluate(case: Case, backend: str | None, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Outputs "out0", "out1", ... and gradients "d" + name of the case on `backend`, its tensors cast to `dtype`."""
    tensors = leaves(case, dtype)
    with torch.enable_grad():
        outputs = case.call(**tensors, backend=backend)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    results = {f"out{i}": out.detach() for i, out in enumerate(outputs)}
    differentiable = [out for out in outputs if out.requires_grad]
    if differentiable:
        weights = [_weights(out) for out in differentiable]
        grads = torch.autograd.grad(differentiable, list(tensors.values()), weights, allow_unused=True)
        results |= {f"d{name}": g for name, g in zip(tensors, grads, strict=True) if g is not None}
    return results


def unavoidable(case: Case, exact: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference in the dtype of the case's tensors; of all orders the one that is farthest from `exact`."""
    low = evaluate(case, "reference")
    for order in case.orders:
        for name, other in evaluate(case._replace(call=order), "reference").items():
            low[name] = farthest((low[name], other), exact[name])
    return low


def farthest(lows: Iterable[Tensor], exact: Tensor) -> Tensor:
    """Of results of several orders of summation, the one with the largest error; the first of equals."""
    return max(lows, key=lambda low: peak(low.double() - exact))


def _weights(out: Tensor) -> Tensor:
    """Eighths, exact in every dtype; 0 where the output is infinite: an lse of a row that sees nothing."""
    generator = torch.Generator().manual_seed(out.numel())
    eighths = torch.randint(-8, 9, out.shape, generator=generator).to(out.device) / 8
    return torch.where(torch.isfinite(out), eighths.to(out.dtype), 0)


def budget(low: Tensor, exact: Tensor, dtype: torch.dtype) -> tuple[float, float]:
    """The largest and the root-mean-square error that a kernel of `dtype` may have.

    Twice the error of the reference run in that dtype (`low`) against float64 (`exact`), which the arithmetic cannot
    avoid, plus four ulps of the largest value, so that a lucky reference does not forbid a rounding.
    """
    error = low.double() - exact
    ulps = 4 * torch.finfo(dtype).eps * peak(exact)
    return 2 * peak(error) + ulps, 2 * rms(error) + ulps


def excess(actual: Tensor, low: Tensor, exact: Tensor) -> float:
    """Error of `actual` as a share of its budget: at most 1 passes.  Infinite where an infinity or NaN is misplaced."""
    infinite = torch.isinf(exact)
    actual64 = actual.double()
    if actual.shape != exact.shape or not torch.equal(actual64[infinite], exact[infinite]):
        return float("inf")
    actual64, low, exact = actual64[~infinite], low[~infinite], exact[~infinite]
    if not torch.isfinite(actual64).all():
        return float("inf")
    error = actual64 - exact
    used = zip((peak(error), rms(error)), budget(low, exact, actual.dtype), strict=True)
    return max(e / most if most else float("inf") if e else 0.0 for e, most in used)


def check(case: Case, backend: str) -> dict[str, float]:
    """`excess` of every output and gradient of the case on `backend`."""
    actual, exact = evaluate(case, backend), evaluate(case, "reference", torch.float64)
    low = unavoidable(case, exact)
    if not actual.keys() == low.keys() == exact.keys():
        return {"the set of results": float("inf")}
    return {name: excess(actual[name], low[name], exact[name]) for name in exact}


def peak(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item() if x.numel() else 0.0
