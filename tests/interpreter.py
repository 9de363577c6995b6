"""What tests of Triton's interpreter share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from triton.runtime import interpreter


def multiply_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products sum in ascending order with one rounding per term, as the GPU's float32 product does.

    NumPy's order depends on shapes and on which operand comes first; then a weight that backward recomputes from the
    transposed product is not the one that forward summed, which scores of 1e4 show.
    """

    def dot(self: Any, a: Any, b: Any, d: Any, *_: Any) -> Any:
        left, right, total = a.data.astype(np.float64), b.data.astype(np.float64), d.data
        for k in range(right.shape[0]):
            total = (left[:, k, None] * right[k] + total).astype(d.data.dtype)
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
