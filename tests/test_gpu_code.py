"""GPU code without a GPU: Triton's kernels run in its interpreter, and compile for the chips that we mean to serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from mirasol_kernels import SnippetLayout
from mirasol_kernels._dispatch import Op
from mirasol_kernels.block_causal_attention import op

ROOT = Path(__file__).parents[1]
ABSENT = next(b.absent for b in op.OP.backends if b.name == "triton")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"triton: {ABSENT}")

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of shared memory that a program may have
DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# All of them are 384 compilations of about 2 s; who runs the tests at hand compiles a third.
COMPILED = DTYPES if os.environ.get("MIRASOL_CI") else DTYPES[:1]
KERNELS = ("forward", "decode", "backward_q", "backward_kv")


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", ["budget and float32", "budget and float16", "tiles_of_the_table", "decode or leak", "drawn"]
)
def test_interpreted(part: str) -> None:
    """tests/interpreted.py, in a process that tells Triton to interpret before it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted.py", "-k", part],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"\d+ passed", done.stdout) and "skipped" not in done.stdout, done.stdout


def launches(kernel: str, dim: int, dtype: torch.dtype, machine: Any) -> list:
    """What a call of (B, N, H, D) tensors launches, 8 query heads on 2 key heads; decoding asks for 4 rows."""
    from mirasol_kernels.block_causal_attention import triton, triton_backward

    layout = SnippetLayout.uniform(4, 1024, q_tokens=1 if kernel == "decode" else None, window=2, sink=1)
    tables = [table.to("meta") for table in layout.tables()]
    q, k, v = (
        torch.empty(2, n, heads, dim, dtype=dtype, device="meta").transpose(1, 2)
        for n, heads in ((layout.q_len, 8), (layout.k_len, 2), (layout.k_len, 2))
    )
    results = op._fake_fwd(q, k, v, *tables[:2], dim**-0.5)
    if kernel in ("forward", "decode"):
        return triton.forward_launches(q, k, v, *tables[:2], dim**-0.5, *results, machine=machine)
    args = results[0], results[1], q, k, v, *results, *tables, dim**-0.5
    both = triton_backward.backward_launches(*args, *op._fake_bwd(*args), machine=machine)
    return [launch for launch in both if launch.kernel.__name__ == kernel]


def cuobjdump(binary: bytes, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(binary: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, where spilled registers lie."""
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", cuobjdump(binary, "-res-usage")).groups()
    return int(registers), int(stack)


def spills_in_loops(binary: bytes) -> int:
    """Instructions that spill or fetch a register in an innermost loop that multiplies.

    What is left lies outside them: numbers of the walk that are put aside before the loops and fetched after them.
    """
    sass = cuobjdump(binary, "-sass")
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)]
    jumps = [(int(to, 16), at) for at, text in code for to in re.findall(r"\bBRA\b.*?0x([0-9a-f]+)", text)]
    loops = [(first, last) for first, last in jumps if first < last]
    count = 0
    for first, last in loops:
        if any(first <= a and b <= last for a, b in loops if (a, b) != (first, last)):
            continue  # not innermost
        body = [text for at, text in code if first <= at <= last]
        if any(re.search("MMA|FFMA", text) for text in body):
            count += sum(re.search(r"\b(LDL|STL)", text) is not None for text in body)
    return count


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel: str, capability: int, record_property: Any) -> None:
    """Every configuration compiles as at a launch, fits the chip, uses its tensor cores and spills in no loop."""
    from mirasol_kernels._triton import compiled
    from mirasol_kernels.block_causal_attention.triton_config import Machine

    used: dict[str, list[str]] = {}
    for dim in DIMS:
        for dtype in COMPILED:
            for launch in launches(kernel, dim, dtype, Machine(capability, 100)):
                what = f"{launch.kernel.__name__} for {capability}, D {dim}, {dtype}"
                binary = compiled(launch, capability)
                registers, stack = resources(binary.asm["cubin"])
                assert stack == 0 or spills_in_loops(binary.asm["cubin"]) == 0, f"{what}: spills, {stack} bytes"
                shared = binary.metadata.shared / 1024
                assert shared <= SHARED[capability], f"{what}: {shared:.0f} KB of shared memory"
                assert getattr(binary.metadata, "tmem_size", 0) <= 512, f"{what}: tensor memory, would trap"
                if launch.kernel.__name__ == "merge":
                    continue
                if dtype != torch.float32:
                    assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", binary.asm["ptx"]), f"{what}: no tensor cores"
                tile = f"{launch.arguments['ROWS']}x{launch.arguments['KEYS']}"
                tile += f"/{launch.options['num_warps']}/{launch.options['num_stages']}"
                used.setdefault(f"{str(dtype)[6:]} {tile}", []).append(f"D{dim} {registers}·{stack}·{shared:.0f}")
    table = "; ".join(f"{tile}: {', '.join(figures)}" for tile, figures in used.items())
    record_property("summary", f"{kernel} {capability}, rows x keys/warps/stages, registers·stack·KB: {table}")


def test_every_configuration_resolves() -> None:
    """Any head size, any dtype, chips in the table and others of their kind."""
    from mirasol_kernels.block_causal_attention.triton_config import Machine, config_of

    for kernel in KERNELS:
        for capability in (*SHARED, 87, 101, 103, 110, 121, 130):
            for dtype in DTYPES:
                for dim in range(1, 257):
                    config = config_of(kernel, dim, dtype, Machine(capability, 100))
                    assert all(n & (n - 1) == 0 and n >= 16 for n in (config.rows, config.keys))


def test_what_triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1, 1, 8)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert op._triton(x.double()) == "no float64"
    assert op._triton(x) == "compute capability below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert op._triton(x) is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert op._triton(x) == "NVIDIA GPUs only"


def test_triton_comes_before_cuda() -> None:
    for each in Op.all:
        names = [b.name for b in each.backends if b.device == "cuda"]
        assert names == sorted(names, key=["triton", "cuda"].index)
