"""How this repository measures: candidates interleaved in one run, medians with their spread, memory in a fresh
process, errors against float64, and the machine with its own ceilings beside every number."""

from __future__ import annotations

import ctypes
import functools
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
LEAST_ROUNDS = 3
M_MMAP_THRESHOLD = -3  # of malloc.h


class Timing(NamedTuple):
    median: float  # seconds, like the others
    low: float  # 10 %
    high: float  # 90 %
    rounds: int


def interleave(
    candidates: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 20,
    warmup: float = 0.2,
    budget: float | None = None,
    beaten: float | None = None,
    settle: float = 0.0,
    device: str = "cpu",
) -> dict[str, Timing]:
    """Time every candidate once per round, each round in another order, so that drifting clocks hit all alike.

    rounds: at most; fewer, but at least 3, once `budget` seconds are spent. warmup: seconds per candidate beforehand.
    beaten: who takes that many times as long as the fastest, and a twentieth of the budget, leaves after the first
    round, so that the time goes to those between whom it is close. settle: see `clock`.
    """
    if not candidates:
        return {}
    for work in candidates.values():
        spent = 0.0
        while spent < warmup:
            spent += clock(work, device)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    names, start = list(candidates), time.perf_counter()
    for done in range(rounds):
        if done == 1 and beaten is not None:
            most = max(beaten * min(min(times.values())), (budget or 0.0) / 20)
            names = [name for name in names if times[name][0] <= most]
            start = time.perf_counter()
        if budget is not None and done >= LEAST_ROUNDS and time.perf_counter() - start > budget:
            break
        turn = done % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(clock(candidates[name], device, settle))
    return {name: summary(seconds) for name, seconds in times.items()}


def summary(seconds: Sequence[float]) -> Timing:
    ordered = sorted(seconds)
    tenth = round((len(ordered) - 1) / 10)
    return Timing(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def clock(work: Callable[[], Any], device: str = "cpu", settle: float = 0.0) -> float:
    """Seconds of one call. On a GPU until its work is done. Work in another process has a clock of its own.

    settle: seconds of untimed calls before it, at least one: then it is not the first one after a sleep.
    """
    if elsewhere := getattr(work, "clock", None):
        return elsewhere()
    start = time.perf_counter()
    while settle:
        work()
        if time.perf_counter() - start >= settle:
            break
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    return _between_events(work)


def _between_events(work: Callable[[], Any]) -> float:
    """Seconds on the GPU, whose cache holds nothing of use at the start."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _larger_than_cache(torch.cuda.current_device()).zero_()
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


@functools.cache
def _larger_than_cache(device: int) -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device="cuda")


class Recorded:
    """Calls as one CUDA graph: what each takes on a GPU that does not wait for Python. For `clock` and `interleave`.

    Raises RuntimeError where something in them cannot be captured.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls:  # what a first call on a stream allocates, a capture must not
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph, self.count = torch.cuda.CUDAGraph(), len(calls)
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(self.graph):
                self.results = [call() for call in calls]
        finally:
            torch.cuda.set_stream(before)  # torch leaves the capture's own where the end of a capture fails

    def __call__(self) -> None:
        self.graph.replay()

    def clock(self) -> float:
        return _between_events(self) / self.count


class Memory(NamedTuple):
    before: int  # bytes once everything was prepared
    peak: int  # bytes at most, from then on


def peak_memory(prepare: Callable[..., Callable[[], Any]], *args: Any, device: str = "cpu") -> tuple[Memory, Any]:
    """Memory of `prepare(*args)()` in a fresh process, and what that call returned.

    prepare: importable by name (the process is spawned); it builds what is needed and returns the work to watch.
    CPU: resident memory of the whole process, libraries included. Raises RuntimeError when it fails or is killed.
    GPU: what torch allocates for it on the device, which needs no process of its own.
    """
    if device != "cpu":
        others = torch.cuda.memory_allocated()
        work = prepare(*args)
        before = forget_peak(device)
        result = work()
        return Memory(before - others, peak_of(device) - others), result
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(send, device, prepare, args))
    process.start()
    send.close()
    try:
        answer = receive.recv()
    except EOFError:
        answer = None
    process.join()
    if not isinstance(answer, tuple):
        raise RuntimeError(f"peak_memory: {answer or f'the process ended with code {process.exitcode}'}")
    return answer


def _watched(send: Any, device: str, prepare: Callable[..., Callable[[], Any]], args: tuple) -> None:
    try:
        work = prepare(*args)
        before = forget_peak(device)
        result = work()
        send.send((Memory(before, peak_of(device)), result))
    except Exception as error:
        send.send(f"{type(error).__name__}: {error}")


def return_freed() -> None:
    """glibc: what is freed goes back to the system at once. Else holes between aligned pieces, up to twice what is in
    use, would be counted, whoever runs."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_THRESHOLD, 1 << 16)


def forget_peak(device: str) -> int:
    """Start the peak anew, where the system can; -> bytes in use now."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)  # what is free but kept would hide what is taken next
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed: the peak then includes the preparation
        return peak_of(device)
    return _status("VmRSS")


def peak_of(device: str) -> int:
    """Bytes in use at most since `forget_peak`."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return _status("VmHWM")  # not ru_maxrss: a spawned process inherits that from its parent
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def broken(device: str) -> bool:
    """Whether nothing runs on the GPU any more in this process, as after an access to memory that is not there."""
    if device == "cpu":
        return False
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


def joules() -> float | None:
    """What the GPU has used so far, by NVML's counter; None where that is not to be had."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
        return pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")) / 1e3
    except pynvml.NVMLError:
        return None


def energy(work: Callable[[], Any], *, seconds: float = 1.0) -> float | None:
    """Joules of one call on the GPU, the mean over so many seconds: the counter moves ten times a second."""
    torch.cuda.synchronize()
    start, before, calls = time.perf_counter(), joules(), 0
    if before is None:
        return None
    while time.perf_counter() - start < seconds:
        work()
        torch.cuda.synchronize()
        calls += 1
    after = joules()
    return None if after is None else (after - before) / calls


def error(actual: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """Largest difference from the float64 result, relative to its largest value, over all tensors together."""
    difference = max((a.double() - e).abs().max().item() for a, e in zip(actual, exact, strict=True))
    return difference / max(e.abs().max().item() for e in exact)


def ceilings(device: str = "cpu", *, seconds: float = 0.3) -> dict[str, float]:
    """What this machine reaches right now: GEMM in flop/s per dtype, the best of some sizes, and copy in
    bytes/s, read plus written.

    MIRASOL_CEILINGS: a file in which the first of several processes leaves them for the others.
    """
    kept = Path(os.environ["MIRASOL_CEILINGS"]) if "MIRASOL_CEILINGS" in os.environ else None
    if kept is not None and kept.exists():
        return json.loads(kept.read_text())
    dtypes = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    found: dict[str, float] = {}
    for dtype in dtypes:
        best = 0.0
        for size in (256, 512, 1024, 2048) if device == "cpu" else (4096, 8192, 16384):
            flops = 2 * size**3
            if flops > seconds * best > 0:  # one product would take longer than all of them may
                break
            a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            best = max(best, flops / _best(functools.partial(torch.mm, a, b, out=out), device, seconds / 3))
        found[f"gemm {str(dtype).removeprefix('torch.')}"] = best
    source = torch.randn((32 if device == "cpu" else 512) * 2**20, device=device)
    target = torch.empty_like(source)
    best = _best(lambda: target.copy_(source), device, seconds)
    found["copy"] = 2 * source.nbytes / best
    if kept is not None:
        write(found, kept)
    return found


def _best(work: Callable[[], Any], device: str, seconds: float) -> float:
    work()
    times: list[float] = []
    while sum(times) < seconds or len(times) < LEAST_ROUNDS:
        times.append(clock(work, device))
    return min(times)


def machine(device: str = "cpu") -> dict[str, Any]:
    """Where and from what a number comes. Models of hardware and versions only: no names of hosts, users or paths."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    facts: dict[str, Any] = {
        "cpu": _cpu(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
    }
    if device != "cpu":
        facts |= {
            "gpu": torch.cuda.get_device_name(),
            "capability": torch.cuda.get_device_capability(),
            "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return facts | commit()


def write(report: Mapping[str, Any], path: Path) -> None:
    """At once or not at all: whoever is stopped meanwhile leaves what there was."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def threads(machine: Mapping[str, Any]) -> str:
    return "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"


def commit() -> dict[str, Any]:
    """What is measured: MIRASOL_COMMIT where the tree is a plain copy, else git's commit and whether files differ."""
    if named := os.environ.get("MIRASOL_COMMIT"):
        return {"commit": named, "dirty": None}
    head = _said("git", "rev-parse", "HEAD")
    return {"commit": head, "dirty": None if head is None else bool(_said("git", "status", "--porcelain", "-uno"))}


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
