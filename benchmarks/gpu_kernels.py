"""Every GPU kernel once, on one small case: what compute-sanitizer watches.

python -m benchmarks.gpu_kernels [--device cuda]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence

import torch

from mirasol_kernels import _check, explain
from mirasol_kernels._dispatch import Backend, Op


def small(op: Op, backend: Backend, dtype: torch.dtype) -> tuple[_check.Case, bool] | None:
    """The first case that the backend takes, and whether with gradients; None where it takes none in this dtype."""
    for gradients in (True, False):
        for case in op.cases.cases(backend.device, dtype) if op.cases else ():
            with torch.set_grad_enabled(gradients):
                tensors = _check.leaves(case) if gradients else case.tensors
                if explain(case.call, **tensors, backend=backend.name)[backend.name] == "runs":
                    return case, gradients
    return None


def run(device: str) -> Iterator[str]:
    for op, backend in [(o, b) for o in Op.all for b in o.backends if b.device == device]:
        if backend.absent:
            yield f"{op.name}, {backend.name}: {backend.absent}"
            continue
        for dtype in (torch.float32, torch.bfloat16):
            found = small(op, backend, dtype)
            what = f"{op.name}, {backend.name}, {str(dtype).removeprefix('torch.')}"
            if found is None:
                yield f"{what}: takes none"
                continue
            case, gradients = found
            if gradients:
                _check.evaluate(case, backend.name)
            else:
                with torch.no_grad():
                    case.call(**case.tensors, backend=backend.name)
            if device == "cuda":
                torch.cuda.synchronize()
            yield f"{what}: {case.name}, forward" + " and backward" * gradients


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    for line in run(parser.parse_args(arguments).device):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
