"""The CUDA kernel of a Token Turing Machine's steps.  ctest runs its body on the host; here is what surrounds it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mirasol_kernels import use_backend
from mirasol_kernels._check import evaluate, unavoidable
from mirasol_kernels.latent_recurrence import TokenTuringParameters, op, token_turing_recurrence
from mirasol_kernels.latent_recurrence.cases import PROBLEMS, case
from tests.numerics import assert_within_budget

ABSENT = next(b.absent for b in op.OP.backends if b.name == "cuda")


def machine(**options: Any) -> TokenTuringParameters:
    made = TokenTuringParameters.init(48, 6, 4, heads=4, mlp=32, hidden=16, **options)
    return made.replace({name: x.detach() for name, x in made.named_tensors()})


def said(p: TokenTuringParameters, *, backend: str | None = "cuda", steps: int = 3, memory: torch.Tensor | None = None):
    memory = torch.zeros(2, 6, 48) if memory is None else memory
    return op._cuda(memory, (torch.zeros(2, steps, 5, 48),), p, backend)


def test_what_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    asked = []
    monkeypatch.setattr(op, "_fits", lambda sizes, device: asked.append(sizes) or len(asked) < 3)
    p = machine(layers=2)
    unverified = "not verified on this GPU: runs only if asked for by name"
    assert said(p, backend=None) == unverified
    assert said(p) is None
    with use_backend("cuda"):
        assert said(p, backend=None) is None
    assert asked[0] == (2, 3, 6, 4, 48, 16, 32, 4, 2)
    assert said(p) == "16 layers and what fits the GPU's shared memory only"
    assert said(p, steps=0) == "at least one video, one slot of memory and one step"
    assert said(machine(processor="mixer")) == "transformer as the processor only"
    assert said(machine(memory_mode="MHA")) == "memory mode TL of the standard unit only"
    wanted = p.replace({"read.mlp.out.bias": torch.zeros(4, requires_grad=True)})
    assert said(wanted) == said(p, memory=torch.zeros(2, 6, 48, requires_grad=True)) == "forward only: no gradients"
    assert said(wanted, backend=None) == unverified
    with torch.no_grad():
        assert said(wanted) == "16 layers and what fits the GPU's shared memory only"
    assert op.VERIFIED == {}


def test_backward_says_that_there_is_none() -> None:
    with pytest.raises(NotImplementedError, match="latent_recurrence: backend 'cuda' is forward only"):
        op._cuda_bwd()


@pytest.mark.skipif(ABSENT is not None, reason=f"cuda: {ABSENT}")
def test_the_library_has_it() -> None:
    raw = torch.ops.mirasol_cuda_raw.latent_recurrence_fwd.default._schema
    declared = torch.ops.mirasol_cuda.latent_recurrence_fwd.default._schema
    named = [[(a.name, str(a.type)) for a in schema.arguments] for schema in (raw, declared)]
    assert named[0] == [*named[1], ("stream", "int")] and len(raw.returns) == len(declared.returns)


@pytest.mark.gpu
@pytest.mark.skipif(ABSENT is not None, reason=f"cuda: {ABSENT}")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
@pytest.mark.parametrize("name", PROBLEMS)
def test_forward(name: str) -> None:
    """Outputs on a GPU as near to float64 as float32 allows, and the same every time."""
    here, there = case(name), case(name, "cuda")  # two: what a case keeps for itself lies on its device
    try:
        got = there.call(**there.tensors, backend="cuda")
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    again = there.call(**there.tensors, backend="cuda")
    exact = evaluate(here, "reference", torch.float64)
    low = unavoidable(here, exact)
    for i, out in enumerate(got):
        assert torch.equal(out, again[i])
        assert_within_budget(out.cpu(), low[f"out{i}"], exact[f"out{i}"], what=f"out{i}")


@pytest.mark.gpu
@pytest.mark.skipif(ABSENT is not None, reason=f"cuda: {ABSENT}")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_a_stream_of_steps_is_one_call() -> None:
    p = machine().to("cuda")
    memory, x = torch.randn(2, 6, 48, device="cuda"), torch.randn(2, 7, 5, 48, device="cuda")
    last, outputs = token_turing_recurrence(memory, x, p, backend="cuda")
    for t in range(7):
        memory, y = token_turing_recurrence(memory, x[:, t : t + 1], p, backend="cuda")
        assert torch.equal(y[:, 0], outputs[:, t])
    assert torch.equal(memory, last)


def test_what_is_parallel_runs_where_it_can() -> None:
    """token_learner has no CUDA kernel, and is not asked for one beside the steps on a GPU: here with ours in their
    place."""
    native = next(b for b in op.OP.backends if b.name == "native")
    if native.absent:
        pytest.skip(f"native: {native.absent}")
    wide = case("wide")
    p = wide.tensors
    expected = wide.call(**p, backend="native")
    with pytest.MonkeyPatch.context() as patch, torch.no_grad(), use_backend("cuda"):
        patch.setattr(op.OP, "backends", [native._replace(name="cuda")])
        for got, want in zip(wide.call(**p), expected, strict=True):
            assert torch.equal(got, want)
