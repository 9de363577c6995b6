"""Who runs a call, who does not, and the reason; on a toy op, so that it holds whatever is compiled here."""

import os
import shutil
import subprocess
import sys
import threading

import pytest
import torch
from torch import Tensor

from mirasol_kernels import _dispatch, latent_recurrence
from mirasol_kernels._dispatch import BACKENDS, Op, explain, use_backend, wanted_backend
from mirasol_kernels.integrations.video_diffusion import RollingCache


def _float32(a: Tensor) -> str | None:
    return None if a.dtype == torch.float32 else "float32 only"


@pytest.fixture(scope="module")
def op():
    """Its one fused backend doubles with + 1, so that a test sees which implementation ran."""
    toy = Op("toy", fwd=("(Tensor a) -> Tensor", torch.empty_like))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_dispatch, "_absent", lambda name: "no driver" if name == "cuda" else None)
        toy.backend("triton", "cpu", _float32, fwd=lambda a: 2 * a + 1)
        toy.backend("cuda", "cuda", _float32, fwd=lambda a: 2 * a + 2)
    yield toy
    Op.all.remove(toy)


@pytest.fixture(scope="module")
def toy(op):
    def toy(a: Tensor, backend: str | None = None) -> Tensor:
        chosen = op.select((a,), backend)
        return 2 * a if chosen is None else chosen.calls["fwd"](a)

    return toy


FUSED, REFERENCE = 3.0, 2.0  # what toy(1) gives


def ran(result: Tensor) -> float:
    return result.item()


def one(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones((), dtype=dtype)


def test_automatic_choice_falls_to_the_reference(toy):
    assert ran(toy(one())) == FUSED
    assert ran(toy(one(torch.float64))) == REFERENCE
    assert ran(toy(one(), backend="reference")) == REFERENCE


@pytest.mark.parametrize(
    ("backend", "dtype", "reason"),
    [
        ("triton", torch.float64, "float32 only"),
        ("cuda", torch.float32, "runs on cuda tensors"),
        ("native", torch.float32, "no native kernel of this op"),
    ],
)
def test_a_named_backend_never_falls_back(toy, backend, dtype, reason):
    message = f"toy: backend '{backend}' refuses this call: {reason}"
    with pytest.raises(NotImplementedError, match=message):
        toy(one(dtype), backend=backend)
    with use_backend(backend), pytest.raises(NotImplementedError, match=message):
        toy(one(dtype))


def test_an_unknown_backend_is_told_the_known_ones(toy):
    message = f"expected one of {', '.join(BACKENDS)}, got 'opencl'"
    with pytest.raises(ValueError, match=message):
        toy(one(), backend="opencl")
    with pytest.raises(ValueError, match=message), use_backend("opencl"):
        pass
    assert wanted_backend() is None


def test_the_call_goes_before_the_context_and_contexts_nest(toy):
    with use_backend("reference"):
        assert ran(toy(one())) == REFERENCE
        assert ran(toy(one(), backend="triton")) == FUSED
        with use_backend(None):
            assert ran(toy(one())) == FUSED
        assert ran(toy(one())) == REFERENCE
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert ran(toy(one())) == FUSED


def test_an_op_without_fused_kernels():
    bare = Op("bare")
    try:
        assert bare.select((one(),), None) is None and bare.select((one(),), "reference") is None
        with pytest.raises(NotImplementedError, match="bare: backend 'cuda' refuses this call: no cuda kernel of"):
            bare.select((one(),), "cuda")
        assert bare.explain(one()) == {"reference": "runs"} and bare.cases is None
    finally:
        Op.all.remove(bare)


def test_explain_names_every_reason(op, toy):
    runs = {"triton": "runs", "cuda": "runs on cuda tensors", "reference": "runs"}
    assert op.explain(one()) == explain(toy, one()) == runs
    assert explain(toy, one(torch.float64), backend="cuda") == runs | {"triton": "float32 only"}
    assert op.explain() == explain("toy") == runs | {"cuda": "no driver"}
    assert op.explain(torch.ones((), device="meta"))["triton"] == "runs on cpu tensors"
    with pytest.raises(ValueError, match=r"explain: op: expected one of .*toy.*, got 'other'"):
        explain("other")
    assert ran(toy(one())) == FUSED  # and afterwards calls run again


def test_explain_checks_the_arguments_as_the_call_does():
    def picky(a: Tensor) -> Tensor:
        raise ValueError("picky: a: expected something else")

    with pytest.raises(ValueError, match="picky: a"):
        explain(picky, one())
    assert explain(torch.sin, one()) == {"reference": "runs"}


def test_explain_computes_nothing_sends_nothing_and_stores_nothing():
    def step(state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        raise AssertionError("it ran")

    x = torch.zeros(1, 2, 3)
    assert explain(latent_recurrence, step, x[:, 0], x) == {"reference": "runs"}
    cache, q = RollingCache(1, 2, 4, frame_seqlen=3), torch.randn(1, 3, 2, 4)
    assert explain(cache.attend, q, q, q, 0)["reference"] == "runs"
    assert cache.end == 0 and not cache.frames.k.any() and not cache.frames.position.any()


def test_a_choice_holds_for_its_thread_alone(toy):
    inside, outside = threading.Event(), threading.Event()
    seen = {}

    def other():
        with use_backend("reference"):
            inside.set()
            outside.wait(10)
            seen["other"] = ran(toy(one()))

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    seen["main"] = ran(toy(one()))
    outside.set()
    thread.join()
    assert seen == {"main": FUSED, "other": REFERENCE}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_a_choice_survives_fork(toy):
    with use_backend("reference"):
        child = os.fork()
        if child == 0:
            os._exit(0 if ran(toy(one())) == REFERENCE else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_compiler = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=needs_compiler)])
def test_a_compiled_function_chooses_again(toy, backend):
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend=backend)
    for _ in range(2):  # the second round meets the guards of the first
        assert ran(compiled(one())) == FUSED
        with use_backend("reference"):
            assert ran(compiled(one())) == REFERENCE
        assert ran(compiled(one(torch.float64))) == REFERENCE


def test_a_compiled_function_chooses_for_its_thread(toy):
    torch._dynamo.reset()
    compiled = torch.compile(toy, fullgraph=True, backend="eager")
    seen = []
    with use_backend("reference"):
        assert ran(compiled(one())) == REFERENCE
        thread = threading.Thread(target=lambda: seen.append(ran(compiled(one()))))
        thread.start()
        thread.join()
    assert seen == [FUSED]


def test_use_backend_inside_a_compiled_function(toy):
    def both(a: Tensor) -> tuple[Tensor, Tensor]:
        with use_backend("reference"):
            first = toy(a)
        return first, toy(a)

    torch._dynamo.reset()
    first, second = torch.compile(both, fullgraph=True, backend="eager")(one())
    assert (ran(first), ran(second)) == (REFERENCE, FUSED) and wanted_backend() is None


def test_the_environment_chooses():
    script = (
        "import torch; from mirasol_kernels._dispatch import Op, wanted_backend\n"
        "print(wanted_backend())\n"
        "Op('bare').select((torch.ones(1),), None)"
    )

    def run(backend: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-W", "ignore", "-c", script]
        return subprocess.run(command, env=os.environ | {"MIRASOL_BACKEND": backend}, capture_output=True, text=True)

    assert (run("reference").stdout, run("").stdout) == ("reference\n", "None\n")
    assert "no native kernel of this op" in run("native").stderr
    assert "expected one of native, triton, cuda, reference, got 'opencl'" in run("opencl").stderr
