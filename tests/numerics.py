"""What "equal" means in this project: every bound is derived from float64, none is typed by hand."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mirasol_kernels._check import budget, peak, rms


def assert_within_budget(actual: Tensor, low: Tensor, exact: Tensor, *, what: str = "result") -> None:
    """`actual` is as close to `exact` (the reference in float64 on the same, already rounded inputs) as `budget`
    allows; `low` is the reference in `actual`'s own dtype. Infinities (an lse of a row that sees nothing) must
    agree in place and sign; NaN never passes."""
    assert exact.dtype == torch.float64, f"{what}: the exact result must be float64, got {exact.dtype}"
    assert actual.shape == exact.shape == low.shape, (
        f"{what}: shapes differ: {tuple(actual.shape)}, {tuple(low.shape)}, {tuple(exact.shape)}"
    )
    infinite = torch.isinf(exact)
    assert torch.equal(actual.double()[infinite], exact[infinite]), f"{what}: infinities differ"
    finite = ~infinite
    kept, low, exact = actual.double()[finite], low[finite], exact[finite]
    assert torch.isfinite(kept).all(), f"{what}: {(~torch.isfinite(kept)).sum()} of {kept.numel()} are not finite"
    most, mean = budget(low, exact, actual.dtype)
    error = kept - exact
    assert peak(error) <= most, f"{what}: largest error {peak(error):.3e}, budget {most:.3e}"
    assert rms(error) <= mean, f"{what}: rms error {rms(error):.3e}, budget {mean:.3e}"


def assert_close_fp64(actual: Tensor, expected: Tensor, *, what: str = "result") -> None:
    """Two float64 computations of one thing: they differ by rounding alone, 1e-12 of the largest value (at least 1)."""
    assert actual.dtype == expected.dtype == torch.float64, f"{what}: {actual.dtype} against {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} against {tuple(expected.shape)}"
    infinite = torch.isinf(expected)
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: infinities differ"
    actual, expected = actual[~infinite], expected[~infinite]
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    error, bound = peak(actual - expected), 1e-12 * max(1.0, peak(expected))
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}"


def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of golden file `name` (`tl_v11_small`, `extra/ast_frontend`), from the folder in MIRASOL_GOLDEN."""
    folder = os.environ.get("MIRASOL_GOLDEN")
    if not folder:
        pytest.skip("MIRASOL_GOLDEN is not set: no golden data of the public reference code on this machine")
    with np.load(Path(folder) / f"{name}.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


# What the authors of the golden data measured between two independent implementations (float32, JAX against
# float64): its README. These are properties of the data, not of our code.
GOLDEN_OUTPUT, GOLDEN_GRADIENT = 1e-5, 5e-5


def assert_golden(actual: Tensor, expected: np.ndarray, *, tol: float = GOLDEN_OUTPUT, what: str = "result") -> None:
    """max|actual - expected| / max(1, max|expected|) <= tol."""
    want = torch.from_numpy(np.asarray(expected, dtype=np.float64))
    assert tuple(actual.shape) == tuple(want.shape), f"{what}: {tuple(actual.shape)} against {tuple(want.shape)}"
    error = peak(actual.detach().double().cpu() - want) / max(1.0, peak(want))
    assert error <= tol, f"{what}: error {error:.3e}, tolerance of the golden data {tol:.0e}"
