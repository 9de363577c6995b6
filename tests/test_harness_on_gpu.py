"""What the harness does on a GPU, with a GPU that is made up: cold caches, graphs, memory, energy."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from benchmarks import contest, harness

LIMITS = {"gemm float32": 1e11, "copy": 1e10}


class Gpu:
    """Counts calls in order; an event's time is the number of calls before it, in milliseconds."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.held = 100
        self.streams: list[object] = []  # that were made the current one

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace(at=0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", sum(call == "work" for call in self.calls))
        event.elapsed_time = lambda end: float(end.at - event.at)
        return event


class Graph:
    recording: Graph | None = None

    def __init__(self) -> None:
        self.calls = 0

    def replay(self) -> None:
        GPU.calls += ["work"] * self.calls


class Recording:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __enter__(self) -> None:
        self.before = len(GPU.calls)

    def __exit__(self, *_: object) -> None:
        self.graph.calls = len(GPU.calls) - self.before
        del GPU.calls[self.before :]


class Cold:
    def zero_(self) -> None:
        GPU.calls.append("cold")


@pytest.fixture(autouse=True)
def gpu(monkeypatch) -> Gpu:
    global GPU
    GPU = Gpu()
    stream = SimpleNamespace(wait_stream=lambda other: None)
    context = SimpleNamespace(__enter__=lambda self: None, __exit__=lambda *_: None)
    fakes = {
        "Event": GPU.event,
        "current_device": lambda: 0,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: type("Within", (), vars(context))(),
        "set_stream": lambda stream: GPU.streams.append(stream),
        "CUDAGraph": Graph,
        "graph": Recording,
        "synchronize": lambda: None,
        "memory_allocated": lambda: GPU.held,
        "reset_peak_memory_stats": lambda: None,
        "max_memory_allocated": lambda: GPU.held + 50,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(harness, "_larger_than_cache", lambda device: Cold())
    return GPU


def work() -> None:
    GPU.calls.append("work")


def test_a_call_finds_a_cold_cache(gpu):
    assert harness.clock(work, "cuda") == 1e-3
    assert gpu.calls == ["cold", "work"]


def test_a_graph_is_all_calls_and_its_time_is_that_of_one(gpu):
    recorded = harness.Recorded([work, work, work])
    assert gpu.calls == ["work"] * 3  # the warm ones; captured ones do not run
    assert harness.clock(recorded, "cuda") == 1e-3
    assert gpu.calls[3:] == ["cold", "work", "work", "work"]


def test_who_cannot_be_captured_says_so(gpu):
    warmed = []

    def fails() -> None:
        if warmed:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        warmed.append(True)

    timings, refused = contest.in_graphs({"a": [work], "b": [fails]}, contest.QUICK)
    assert timings == {"a": {"graph_seconds": 1e-3, "graph_seconds_low": 1e-3, "graph_seconds_high": 1e-3}}
    assert gpu.streams == [torch.cuda.current_stream()] * 2  # the failed capture leaves nobody on its own
    assert [(r.name, r.reason) for r in refused] == [
        ("b", "not captured in a CUDA graph: RuntimeError: operation not permitted when stream is capturing")
    ]


def test_memory_on_a_gpu_is_what_torch_allocates_for_this(gpu):
    def prepare(size: int):
        gpu.held += size

        def run() -> str:
            gpu.held += 7
            return "done"

        return run

    assert harness.peak_memory(prepare, 30, device="cuda") == (harness.Memory(30, 30 + 7 + 50), "done")


def nvml(monkeypatch, counter) -> None:
    module = ModuleType("pynvml")
    module.NVMLError = type("NVMLError", (Exception,), {})
    module.nvmlInit = lambda: None
    module.nvmlDeviceGetHandleByUUID = lambda uuid: uuid
    module.nvmlDeviceGetTotalEnergyConsumption = counter
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1-2"))


def test_energy_is_the_mean_of_many_calls(gpu, monkeypatch):
    """Each call takes 2,000 mJ here."""
    nvml(monkeypatch, lambda handle: 2000 * gpu.calls.count("work") if handle == "GPU-1-2" else None)
    assert harness.energy(work, seconds=0.01) == 2.0 and gpu.calls.count("work") > 1


def test_no_energy_without_nvml(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert harness.energy(work) is None and not gpu.calls

    def refuses(handle: str) -> int:
        raise sys.modules["pynvml"].NVMLError

    nvml(monkeypatch, refuses)
    assert harness.energy(work) is None
