"""The benchmarks at small sizes, with every peer: everybody has a time or a reason, and what they compute is right.

No time is judged.  Where CI runs, those whom our numbers are compared with must run.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

pytest.importorskip("tqdm", reason="the benchmarks draw a bar with it")

from benchmarks import contest, harness
from benchmarks.peers import Problem
from benchmarks.peers import block_causal_attention as attention
from benchmarks.run import OPS, suite
from mirasol_kernels.latent_recurrence import TokenTuringParameters

LIMITS = {"gemm float32": 1e11, "copy": 1e10}
# Op -> peer -> in which directions it can run on a CPU; FlexAttention has no backward there.
BOTH = ("forward", "backward")
REQUIRED = {
    "block_causal_attention": {
        "dense_mask": BOTH,
        "per_snippet": BOTH,
        "flash_per_snippet": BOTH[1:],
        "flex": BOTH[:1],
    },
    "token_learner": {"eager": BOTH, "compile": BOTH},
    "latent_recurrence": {"eager": BOTH, "compile": BOTH, "checkpoint_step": BOTH[1:], "checkpoint_segment": BOTH[1:]},
}
SMALL = {"block_causal_attention": "quick_ragged", "token_learner": "quick", "latent_recurrence": "quick"}


@pytest.mark.slow
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("op", OPS)
def test_everybody_runs_or_says_why_not(op: str, direction: str) -> None:
    _, cases, peers = suite(op)
    case = cases[SMALL[op]]
    problem = Problem(case, torch.float32, direction, "cpu", case.inputs(torch.float32, "cpu", 0))
    with torch.set_grad_enabled(direction == "backward"):
        rows, notes = contest.compete(problem, list(peers.values()), LIMITS, contest.QUICK)
    said = {note["name"]: note["reason"] for note in notes}
    ran = {row["candidate"]: row for row in rows}
    expected = {p.name for p in peers.values() if "cpu" in p.devices and torch.float32 in p.dtypes}
    assert ran.keys() | said.keys() == expected and not ran.keys() & said.keys()
    for name, row in ran.items():
        # Peers may round otherwise than we do, but they do the same work: a wrong one shows in the first digits.
        assert row["excess"] <= 1 or (not row["ours"] and max(row["errors"].values()) < 1e-3), name
    missing = {name: said[name] for name, where in REQUIRED[op].items() if direction in where and name in said}
    if os.environ.get("MIRASOL_CI"):
        assert not missing
    elif missing:
        pytest.skip("; ".join(f"{name}: {reason}" for name, reason in missing.items()))


def test_every_op_has_peers_that_must_run() -> None:
    assert set(REQUIRED) == set(SMALL) == set(OPS)
    for op, names in REQUIRED.items():
        assert names.keys() <= suite(op)[2].keys()


def test_a_loop_over_snippets_chooses_its_kernels_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: outside of the loop, and cuDNN only by name and where it has few shapes to plan."""
    _, cases, peers = suite("block_causal_attention")
    case = cases["quick_uniform"]
    problem = Problem(case, torch.float32, "forward", "cuda", case.inputs(torch.float32, "cpu", 0))
    chosen: list[list[SDPBackend]] = []

    def choose(kernels: list[SDPBackend]) -> contextlib.AbstractContextManager[None]:
        chosen.append(kernels)
        return contextlib.nullcontext()

    monkeypatch.setattr(attention, "sdpa_kernel", choose)
    for name in ("per_snippet", "cudnn_per_snippet"):
        peers[name].prepare(problem)(*problem.inputs)
    assert len(chosen) == 2 and SDPBackend.CUDNN_ATTENTION not in chosen[0]
    assert chosen[1] == [SDPBackend.CUDNN_ATTENTION]
    assert peers["cudnn_per_snippet"].why_not(problem) is None
    many = problem._replace(case=cases["combiner_64"])
    assert peers["cudnn_per_snippet"].why_not(many) == "cuDNN would plan 64 shapes, each by itself"


@pytest.mark.parametrize("name", ["quick", "quick_scan"])
def test_no_weights_are_drawn_while_a_recurrence_is_timed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To draw those of `machine_512` takes 6 ms, a twentieth of the call; and 64 times that in a compiled step."""
    _, cases, peers = suite("latent_recurrence")
    case = cases[name]
    problem = Problem(case, torch.float32, "backward", "cpu", case.inputs(torch.float32, "cpu", 0))
    others = case.inputs(torch.float32, "cpu", 1)
    case.step(problem.inputs[:-4])  # as when its truth was computed
    monkeypatch.setattr(TokenTuringParameters, "init", lambda *_, **__: pytest.fail("weights are drawn"))
    for peer in ("ours", "eager", "checkpoint_step", "checkpoint_segment"):
        peers[peer].prepare(problem)(*problem.inputs)
    captured: list[torch.fx.GraphModule] = []

    def compiler(graph: torch.fx.GraphModule, _: object) -> Callable:
        captured.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    call = peers["compile"].prepare(problem)
    call(*others)
    drawn = [node for graph in captured for node in graph.graph.nodes if "rand" in str(node.target)]
    # At most one graph more for a later step, whose state is no leaf; none for other weights.
    assert not drawn and len(captured) <= 2


@pytest.mark.slow
def test_pytest_benchmark(tmp_path) -> None:
    pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")
    file = tmp_path / "times.json"
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "quick and not compile and not flex", "--benchmark-max-time=0.01", "--benchmark-min-rounds=1"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, f"--benchmark-json={file}"], cwd=harness.ROOT, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]
    text = file.read_text()
    for op in OPS:
        assert f"test_op[{op}-quick" in text
