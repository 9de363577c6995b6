"""Every launch of every case of every op is read by Triton's front end: what the interpreter, which runs Python, cannot
show.  There an early return ends a function, and None is never loaded from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mirasol_kernels.block_causal_attention import cases as attention_cases
from mirasol_kernels.block_causal_attention import op as attention
from mirasol_kernels.latent_recurrence import TokenTuringParameters
from mirasol_kernels.latent_recurrence import cases as recurrence_cases
from mirasol_kernels.latent_recurrence import op as recurrence
from mirasol_kernels.token_learner import cases as learner_cases
from mirasol_kernels.token_learner import op as learner
from tests.gpu_code import read

CAPABILITY = 90
ABSENT = next(b.absent for b in attention.OP.backends if b.name == "triton")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"triton: {ABSENT}")


def meta(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="meta")


def attends(dtype: torch.dtype) -> Iterator[list]:
    from mirasol_kernels._triton import Machine
    from mirasol_kernels.block_causal_attention import triton, triton_backward

    for name, problem in attention_cases.PROBLEMS.items():
        q, k, v = (meta(x, dtype) for x in attention_cases.build(name, problem).tensors.values())
        tables = [table.to("meta") for table in problem.layout().tables()]
        results = attention._fake_fwd(q, k, v, *tables[:2], problem.factor)
        for processors in (1, 132):  # few: keys are not split
            machine = Machine(CAPABILITY, processors)
            yield triton.forward_launches(q, k, v, *tables[:2], problem.factor, *results, machine=machine)
        args = results[0], results[1], q, k, v, *results, *tables, problem.factor
        yield triton_backward.backward_launches(*args, *attention._fake_bwd(*args), machine=machine)


def learns(dtype: torch.dtype) -> Iterator[list]:
    from mirasol_kernels._triton import Machine
    from mirasol_kernels.token_learner import triton, triton_backward

    machine = Machine(CAPABILITY, 132)
    for name, problem in learner_cases.PROBLEMS.items():
        tensors = {key: meta(x, dtype) for key, x in learner_cases.case(name, dtype=dtype).tensors.items()}
        count = range(len(problem.n))
        sources = [tensors[f"source{i}"] for i in count]
        tables = [tensors[f"position{i}"] if problem.placed else None for i in count]
        valid = None if problem.valid is None else torch.empty(len(problem.valid), len(count), dtype=torch.int64)
        valid = None if valid is None else valid.to("meta")
        weights = [tensors[each] for each in learner_cases.WEIGHTS]
        for divide in (True, False):
            call: Any = sources, tables, *weights, valid, problem.gelu == "erf", problem.eps, divide
            results = maximum, total, pooled = learner._fake_fwd(*call)
            yield triton.forward_launches(*call, *results, machine=machine)
            args = pooled, None if divide else total, maximum, total, pooled if divide else None, *call
            yield triton_backward.backward_launches(*args, learner._fake_bwd(*args), machine=machine)


def recurs(dtype: torch.dtype) -> Iterator[list]:
    from mirasol_kernels._triton import Machine
    from mirasol_kernels.latent_recurrence import triton

    for p in recurrence_cases.PROBLEMS.values():
        if (p.memory_mode, p.processor, p.unit) != ("TL", "transformer", "standard"):
            continue  # step by step
        sizes: Any = {"layers": p.layers, "mlp": 32, "heads": p.heads, "tokens": sum(p.n) if p.placed else None}
        weights = TokenTuringParameters.init(p.c, p.memory, p.read, device="meta", **sizes)
        memory = torch.empty(p.batch, p.memory, p.c, device="meta")
        states = [memory.new_empty(p.batch, p.steps, k, *c) for k in (p.read, p.memory) for c in ((), (), (p.c,))]
        tables = [memory.new_empty(n, p.c) if p.placed else None for n in (p.memory, p.memory, p.read, p.read)]
        for keep in (True, False):
            call = memory, states[:3], states[3:], recurrence.weights_of(weights), tables, p.heads, keep
            for processors in (1, 132):  # tiles of many rows, and of few
                machine = Machine(CAPABILITY, processors)
                yield triton.forward_launches(*call, *recurrence._fake_fwd(*call), machine=machine)


def kind(launch: Any) -> tuple:
    """What a launch is compiled for, nearly: strides and numbers may be aligned or not."""
    given = {
        name: (x.dtype if isinstance(x, Tensor) else x if name.isupper() or x is None else type(x))
        for name, x in launch.arguments.items()
    }
    return launch.kernel.__name__, *(str(each) for each in given.items())


@pytest.mark.parametrize(
    ("of", "dtype"),
    [(op, dtype) for op in (attends, learns) for dtype in (torch.float32, torch.bfloat16)] + [(recurs, torch.float32)],
    ids=lambda given: getattr(given, "__name__", str(given)),
)
def test_every_case_is_read(of: Any, dtype: torch.dtype) -> None:
    seen = set()
    for launches in of(dtype):
        for launch in launches:
            if kind(launch) not in seen:
                seen.add(kind(launch))
                read(launch, CAPABILITY)
    assert len(seen) > 20
