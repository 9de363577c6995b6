"""One call, everybody who can do it: right first, then timed in turns."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.cases import Truth
from benchmarks.elsewhere import SETTLE
from benchmarks.peers import Call, Peer, Problem
from mirasol_kernels import _check

MOST_SETS = 64
BEATEN = 3.0  # times as long as the fastest
# Seconds below which a call on a GPU is also timed in a CUDA graph, without what Python costs: for each step of a
# recurrence, whose launches wait for Python as a single small call's do, and at most LONGEST.
SMALL, LONGEST = 1e-3, 20e-3
IN_A_GRAPH = 0.1  # seconds of calls in one, or about: it keeps the results of all
CACHES = 2  # the sets of inputs are as large as this many last-level caches, where MOST_SETS allows


class Effort(NamedTuple):
    rounds: int = 60  # at most
    warmup: float = 0.2  # seconds per candidate
    seconds: float = 4.0  # per case, dtype and direction, over all who are not BEATEN


QUICK = Effort(rounds=5, warmup=0.01, seconds=0.2)


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cache_bytes(device: str) -> int:
    """Of the last level."""
    if device != "cpu":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = path.read_text().strip()[:-1], path.read_text().strip()[-1]
        sizes.append(int(number) << {"K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


def input_sets(problem: Problem) -> list[tuple[Tensor, ...]]:
    """So many that a call finds none of its inputs in a cache, as in a model, where a layer's inputs come and go."""
    size = sum(x.nbytes for x in problem.inputs)
    count = min(MOST_SETS, max(1, -(-CACHES * cache_bytes(problem.device) // max(1, size))))
    return [problem.inputs, *(problem.case.inputs(problem.dtype, problem.device, seed) for seed in range(1, count))]


class Candidate(NamedTuple):
    name: str
    ours: bool
    results: tuple[Tensor, ...]  # of `problem.inputs`
    work: Callable[[], Any]  # one call, on the next set of inputs
    calls: list[Callable[[], Any]]  # one on each set


class Refusal(NamedTuple):
    name: str
    reason: str
    failed: bool = False  # ours, which may refuse but not fail

    def note(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason} | ({"failed": True} if self.failed else {})


def first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def attempt(peer: Peer, problem: Problem, keep_going: bool = False) -> tuple[Call, tuple[Tensor, ...], float] | Refusal:
    """The call, its first results, their seconds.  Refused where the peer says so, and where it fails, with that.

    Raises what ours raises, but with `keep_going` where the GPU still works: then that is its refusal.
    """
    reason = peer.why_not(problem)
    if reason is not None:
        return Refusal(peer.name, reason)
    try:
        call = peer.prepare(problem)
        start = time.perf_counter()
        results = tuple(x.detach() for x in call(*problem.inputs))
        return call, results, time.perf_counter() - start
    except NotImplementedError as refusal:
        return Refusal(peer.name, str(refusal).splitlines()[0])
    except Exception as failure:  # somebody else's code: whatever it raises is its reason
        if peer.ours and (not keep_going or harness.broken(problem.device)):
            raise
        return Refusal(peer.name, first_line(failure), failed=peer.ours)


def taking_turns(call: Call, sets: Iterator[tuple[Tensor, ...]]) -> Callable[[], Any]:
    return lambda: call(*next(sets))


def enter(
    problem: Problem, peers: Sequence[Peer], warmup: float, keep_going: bool = False
) -> tuple[list[Candidate], list[Refusal]]:
    """Everybody who can do this call, warm, with what they computed, and the reasons of the others."""
    every = input_sets(problem)
    sets = itertools.cycle(every)
    ready, refused = [], []
    for peer in peers:
        if problem.device not in peer.devices or problem.dtype not in peer.dtypes:
            continue
        tried = attempt(peer, problem, keep_going)
        if isinstance(tried, Refusal):
            refused.append(tried)
            continue
        call, results, spent = tried
        work = call if hasattr(call, "clock") else taking_turns(call, sets)
        while spent < warmup:
            spent += harness.clock(work, problem.device)
        calls: list[Callable[[], Any]] = [functools.partial(call, *inputs) for inputs in every]
        ready.append(Candidate(peer.name, peer.ours, results, work, calls))
    return ready, refused


def judge(candidate: Candidate, truth: Truth) -> dict[str, Any]:
    """errors: largest difference from float64, relative to the largest value.  excess: the largest share of its budget
    (`_check.budget`); past 1 it is wrong."""
    found = truth.cut(candidate.results)
    finite = all(bool(torch.isfinite(x).all()) for x in candidate.results)  # all of it, not only the part
    errors = {name: harness.error([found[name]], [exact]) for name, exact in truth.exact.items()}
    excess = max(_check.excess(found[name], truth.low[name], exact) for name, exact in truth.exact.items())
    return {"errors": errors, "excess": excess if finite else float("inf")}


def floor(case: Any, dtype: torch.dtype, direction: str, limits: Mapping[str, float]) -> float:
    """Seconds that this machine needs at least.  Half precision may be widened, so float32's GEMM bounds it as well."""
    gemm = max(limits[f"gemm {name}"] for name in {dtype_name(dtype), "float32"} if f"gemm {name}" in limits)
    return max(case.flops(direction) / gemm, case.bytes(direction, dtype) / limits["copy"])


def in_graphs(
    calls: Mapping[str, Sequence[Callable[[], Any]]], effort: Effort
) -> tuple[dict[str, dict[str, float]], list[Refusal]]:
    """The same calls, captured and replayed -> per candidate what its row gets, and who cannot be captured."""
    recorded, refused = {}, []
    for name, mine in calls.items():
        try:
            recorded[name] = harness.Recorded(mine)
        except RuntimeError as failure:
            refused.append(Refusal(name, f"not captured in a CUDA graph: {first_line(failure)}"))
    timings = harness.interleave(recorded, rounds=effort.rounds, warmup=0, budget=effort.seconds / 2)
    return {
        name: {"graph_seconds": t.median, "graph_seconds_low": t.low, "graph_seconds_high": t.high}
        for name, t in timings.items()
    }, refused


def compete(
    problem: Problem, peers: Sequence[Peer], limits: Mapping[str, float], effort: Effort, keep_going: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """-> a row per candidate, and a note per one that has no time.  The caller sets gradients on or off.

    keep_going: where one of ours fails, the others are timed all the same.
    """
    case, dtype, direction = problem.case, problem.dtype, problem.direction
    key = {"case": case.name, "kind": case.kind, "dtype": dtype_name(dtype), "direction": direction}
    truth = case.truth(problem.inputs, direction)
    candidates, refusals = enter(problem, peers, effort.warmup, keep_going)
    notes: list[dict[str, Any]] = [key | refusal.note() for refusal in refusals]
    verdicts = {candidate.name: judge(candidate, truth) for candidate in candidates}
    for candidate in list(candidates):
        verdict = verdicts[candidate.name]
        if candidate.ours and not verdict["excess"] <= 1:
            said = f"wrong: error {max(verdict['errors'].values()):.1e} is {verdict['excess']:.1f} times its budget"
            notes.append(key | Refusal(candidate.name, said, failed=True).note())
            candidates.remove(candidate)
    works = {candidate.name: candidate.work for candidate in candidates}
    calls = {candidate.name: candidate.calls for candidate in candidates}
    ours = {candidate.name: candidate.ours for candidate in candidates}
    del candidates  # and with them the results, which may be large
    settle = SETTLE if any(hasattr(work, "clock") for work in works.values()) else 0.0  # another process takes turns
    timings = harness.interleave(
        works, rounds=effort.rounds, warmup=0, budget=effort.seconds, beaten=BEATEN, settle=settle,
        device=problem.device,
    )  # fmt: skip
    graphs: dict[str, dict[str, float]] = {}
    small = min(SMALL * getattr(case, "steps", 1), LONGEST)
    if problem.device != "cpu" and timings and min(timing.median for timing in timings.values()) < small:
        some = {name: mine[: max(1, round(IN_A_GRAPH / timings[name].median))] for name, mine in calls.items()}
        graphs, refused = in_graphs(some, effort)
        notes += [key | refusal.note() for refusal in refused]
    least = floor(case, dtype, direction, limits)
    rows = [
        key
        | {
            "candidate": name,
            "ours": ours[name],
            "seconds": timing.median,
            "seconds_low": timing.low,
            "seconds_high": timing.high,
            "rounds": timing.rounds,
            "flops_per_second": case.flops(direction) / timing.median,
            "of_floor": least / timing.median,
            "checked": truth.part,
        }
        | verdicts[name]
        | graphs.get(name, {})
        for name, timing in timings.items()
    ]
    return rows, notes
