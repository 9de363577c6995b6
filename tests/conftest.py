"""Every test starts from the same seed, and memory that nobody wrote holds NaN."""

import contextlib
import importlib.util
import os
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest
import torch

if importlib.util.find_spec("hypothesis"):  # `make gpu-check` runs where it may be absent
    import hypothesis

    # Derandomised: a red run is red again for whoever looks at it. A found failure becomes a named case. Constants out
    # of modules that a process happens to have loaded, which xdist makes another set each time, are not drawn either:
    # by private names, which other versions may not have.
    with contextlib.suppress(ImportError, AttributeError):
        from hypothesis.internal.conjecture import providers

        providers.HypothesisProvider._local_constants = providers.Constants()
    hypothesis.settings.register_profile(
        "mirasol",
        derandomize=True,
        deadline=None,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
    )
    hypothesis.settings.load_profile("mirasol")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("MIRASOL_CI") and not os.environ.get("MIRASOL_GOLDEN"):
        raise pytest.UsageError("MIRASOL_CI is set but MIRASOL_GOLDEN is not: CI must not skip the golden data")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many cases hypothesis drew: tests record ("drawn cases", (of what, kind, number)); and ("summary", line)."""
    drawn: dict[str, Counter[str]] = defaultdict(Counter)
    for report in terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", []):
        for name, value in report.user_properties:
            if name == "drawn cases":
                what, kind, number = value
                drawn[what][kind] += number
            if name == "summary":
                terminalreporter.write_line(value)
    for what, kinds in drawn.items():
        each = ", ".join(f"{kind} {number}" for kind, number in kinds.items())
        terminalreporter.write_line(f"drawn cases of {what}: {kinds.total()} ({each})")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    """`torch.empty` returns NaN, so that a kernel that leaves an output unwritten is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True, warn_only=True)  # the filling is tied to this switch
    yield
    torch.utils.deterministic.fill_uninitialized_memory = before[0]
    torch.use_deterministic_algorithms(before[1])
