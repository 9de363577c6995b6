"""The ops and their peers for pytest-benchmark: `pytest benchmarks --benchmark-only [-k "latent and forward"]`.

A case, a direction and who does it are one benchmark, in float32 on the CPU; `-k quick` tries this file out.  Ours is
compared with float64 first: what is wrong is an error and no time.  Candidates do not take turns here, as they do in
`python -m benchmarks.run`, which is what this project quotes.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks import contest
from benchmarks.cases import DIRECTIONS
from benchmarks.peers import Problem
from benchmarks.run import OPS, suite

CALLS = [
    pytest.param(op, case.name, direction, peer.name, id=f"{op}-{case.name}-{direction}-{peer.name}")
    for op in OPS
    for case in suite(op)[1].values()
    for direction in DIRECTIONS
    for peer in suite(op)[2].values()
    if "cpu" in case.devices and direction in case.directions and "cpu" in peer.devices
    if torch.float32 in peer.dtypes
]


@pytest.mark.parametrize(("op", "case", "direction", "peer"), CALLS)
def test_op(benchmark, op: str, case: str, direction: str, peer: str) -> None:
    _, cases, peers = suite(op)
    problem = Problem(cases[case], torch.float32, direction, "cpu", cases[case].inputs(torch.float32, "cpu", 0))
    with torch.set_grad_enabled(direction == "backward"):
        candidates, refusals = contest.enter(problem, [peers[peer]], warmup=0.1)
        if refusals:
            pytest.skip(refusals[0].reason)
        verdict = contest.judge(candidates[0], cases[case].truth(problem.inputs, direction))
        assert verdict["excess"] <= 1 or not candidates[0].ours, verdict
        benchmark.extra_info |= {"flops": cases[case].flops(direction), "errors": verdict["errors"]}
        benchmark(candidates[0].work)
