"""python -m mirasol_kernels [--check]: what is here, what is not, and why."""

import argparse
import ctypes
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from mirasol_kernels import _check, _native
from mirasol_kernels._dispatch import Op, explain

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def instruction_set() -> str:
    """The one the compiled CPU kernels use, and what MIRASOL_ISA asked for."""
    if _native.missing("cpu"):
        return "none, there are no compiled CPU kernels"
    library = ctypes.CDLL(str(_native.HOME / "_native_cpu.so"))
    library.mirasol_isa.restype = ctypes.c_char_p
    chosen, asked = library.mirasol_isa().decode(), os.environ.get("MIRASOL_ISA")
    if not asked:
        return chosen
    return f"{chosen} (MIRASOL_ISA={asked}" + (")" if asked == chosen else ": not on this CPU, or unknown)")


def gpus() -> Iterator[str]:
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"{found.name}, capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def report() -> None:
    numbers = {name: version(name) for name in ("mirasol-kernels", "torch", "triton", "numpy")}
    rows = {
        "versions": ", ".join(f"{name} {number}" for name, number in numbers.items()),
        "python": f"{platform.python_version()} on {platform.platform()}",
        "cpu": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "instruction set": instruction_set(),
        "gpu": "; ".join(gpus()) or "none",
        "cpu kernels": _native.missing("cpu") or "compiled and loaded",
        "cuda kernels": _native.missing("cuda") or "compiled and loaded",
    }
    for what, said in rows.items():
        print(f"{what:16} {said}")
    if "no C++ compiler" in rows["cpu kernels"] or "build failed" in rows["cpu kernels"]:
        print(f"{'':16} once that is mended: pip install --no-cache-dir --force-reinstall --no-deps mirasol-kernels")
    for op in Op.all:
        print(f"\n{op.name}")
        for backend, said in op.explain().items():
            device = next((f", {b.device} tensors" for b in op.backends if b.name == backend), "")
            print(f"  {backend:14} {said}{device if said == 'runs' else ''}")


def check() -> bool:
    """Run every op's cases on every backend that is here, forward and backward, against the reference in float64."""
    good, kinds = True, ["cpu"] + ["cuda"] * torch.cuda.is_available()
    for op, backend in [(o, b) for o in Op.all for b in o.backends]:
        if op.cases is None or backend.absent or backend.device not in kinds:
            continue
        print(f"\n{op.name}: {backend.name}")
        for dtype in DTYPES:
            worst, refused = {}, set()
            for case in op.cases.cases(backend.device, dtype):
                said = explain(case.call, **_check.leaves(case), backend=backend.name)[backend.name]
                if said == "runs":
                    worst[case.name] = max(_check.check(case, backend.name).values(), default=0.0)
                else:
                    refused.add(said)
            failed = [name for name, share in worst.items() if not share <= 1]
            good &= not failed
            most = f"{len(worst)} cases, largest error {max(worst.values()):.0%} of its budget" if worst else ""
            said = "; ".join(filter(None, [most, *(f"refused: {reason}" for reason in sorted(refused))]))
            print(f"  {str(dtype).removeprefix('torch.'):10} {said}" + "".join(f"\n    FAILED {x}" for x in failed))
    return good


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mirasol_kernels", description=__doc__)
    parser.add_argument("--check", action="store_true", help="also run every op's cases on this machine")
    arguments = parser.parse_args()
    report()
    return 0 if not arguments.check or check() else 1


if __name__ == "__main__":
    sys.exit(main())
