"""What the tests of block_causal_attention share."""

from __future__ import annotations

import pytest
import torch

from mirasol_kernels import explain
from mirasol_kernels.block_causal_attention import cases, op

FUSED = [b.name for b in op.OP.backends if b.device == "cpu"]
BACKENDS = ["reference", *FUSED]
ON_GPU = [b.name for b in op.OP.backends if b.device == "cuda"]


def served(backend: str, dtype: torch.dtype = torch.float32) -> str:
    """The backend, if it takes `dtype` on the CPU here; its reason skips the test."""
    case = next(cases.cases(dtype=dtype))
    said = explain(case.call, **case.tensors, backend=backend)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    return backend


def on_gpu(backend: str) -> str:
    """The backend, if it and a GPU are here."""
    said = explain(op.OP.name)[backend]
    if said != "runs":
        pytest.skip(f"{backend}: {said}")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return backend
