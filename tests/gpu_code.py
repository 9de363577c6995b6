"""What a compiled kernel uses of the chip that it was compiled for, read from the binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of shared memory that a program may have


def examined(launch: Any, capability: int, what: str, *, tensor_cores: bool) -> str:
    """Compiles as a launch would; asserts that the result fits the chip, uses its tensor cores if asked, and spills in
    no loop.  Returns registers, bytes of stack and KB of shared memory, in short."""
    from mirasol_kernels._triton import compiled

    binary = compiled(launch, capability)
    registers, stack = resources(binary.asm["cubin"])
    assert stack == 0 or spills_in_loops(binary.asm["cubin"]) == 0, f"{what}: spills, {stack} bytes"
    shared = binary.metadata.shared / 1024
    assert shared <= SHARED[capability], f"{what}: {shared:.0f} KB of shared memory"
    assert getattr(binary.metadata, "tmem_size", 0) <= 512, f"{what}: tensor memory, would trap"
    if tensor_cores:
        assert re.search(r"mma\.sync|wgmma|tcgen05\.mma", binary.asm["ptx"]), f"{what}: no tensor cores"
    return f"{registers}·{stack}·{shared:.0f}"


def read(launch: Any, capability: int) -> None:
    """The kernel through the front end alone, some 0.1 s: it raises what a launch would before anything is compiled."""
    from triton._C.libtriton import ir

    from mirasol_kernels._triton import source_of

    source, target, backend, options = source_of(launch, capability)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, options, backend.get_codegen_implementation(options), backend.get_module_map(), context)


def cuobjdump(binary: bytes, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        return cuobjdump_of(Path(file.name), option)


def cuobjdump_of(file: Path, option: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout


def library_resources(library: Path) -> dict[tuple[str, str], tuple[int, int]]:
    """(kernel, "sm_80", ...) -> registers of a thread and bytes of its stack, of a compiled CUDA library."""
    found = {}
    for part in re.split(r"^arch = ", cuobjdump_of(library, "-res-usage"), flags=re.M)[1:]:
        arch = part.split()[0]
        for name, registers, stack in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", part):
            (kernel,) = re.findall(r"\d([a-z_]+_kernel)E", name)
            found[kernel, arch] = int(registers), int(stack)
    return found


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
