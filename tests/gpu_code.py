"""What a compiled kernel uses of the chip that it was compiled for, read from the binary.

Compilation is most of the time that tests would take, and its result depends on nothing but what goes in: so what came
out is kept in compiled.tsv, under a hash of that.  What is not there is compiled; `make compiled` writes the file anew.
Of what is there, every twentieth is compiled all the same and compared, another twentieth each day.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # KB of shared memory that a program may have


RECORD = Path(__file__).with_name("compiled.tsv")
# `make compiled`: the file that gets a line for each kernel that is compiled, in place of what RECORD says.
RECORDING = os.environ.get("MIRASOL_RECORD_COMPILED")


class Use(NamedTuple):
    """Of a chip, by a compiled kernel."""

    registers: int
    stack: int  # bytes, where spilled registers lie
    loop_spills: int
    shared: int  # bytes
    tensor_memory: int  # columns; past 512 the kernel would trap
    tensor_cores: int  # 1 where it multiplies on them


def examined(launch: Any, capability: int, what: str, *, tensor_cores: bool) -> str:
    """Compiles as a launch would; asserts that the result fits the chip, uses its tensor cores if asked, and spills in
    no loop.  Returns registers, bytes of stack and KB of shared memory, in short."""
    use = use_of(launch, capability, what)
    assert use.stack == 0 or use.loop_spills == 0, f"{what}: spills, {use.stack} bytes"
    assert use.shared <= 1024 * SHARED[capability], f"{what}: {use.shared} bytes of shared memory"
    assert use.tensor_memory <= 512, f"{what}: tensor memory, would trap"
    assert use.tensor_cores or not tensor_cores, f"{what}: no tensor cores"
    return f"{use.registers}·{use.stack}·{use.shared / 1024:.0f}"


def use_of(launch: Any, capability: int, what: str) -> Use:
    """From the record, where it knows the kernel, or compiled."""
    key = key_of(launch, capability)
    known = None if RECORDING else recorded().get(key)
    if known and int(key, 16) % 20 != datetime.date.today().toordinal() % 20:
        return known
    use = compiled_use(launch, capability)
    assert known in (None, use), f"{what}: compiled.tsv says {known}, compiled is {use}"
    if RECORDING:
        with open(RECORDING, "a") as file:  # a line at once: several processes write
            file.write("\t".join((what, key, *map(str, use))) + "\n")
    return use


@functools.cache
def recorded() -> dict[str, Use]:
    lines = RECORD.read_text().splitlines() if RECORD.exists() else []
    return {key: Use(*map(int, use)) for _, key, *use in (line.split("\t") for line in lines)}


def key_of(launch: Any, capability: int) -> str:
    """Of all that a compiler starts from: the kernel as the front end reads it, without its place in a file."""
    import triton

    module, options = read(launch, capability)
    told = {name: value for name, value in vars(options).items() if name != "extern_libs"}  # their paths differ
    return hashlib.sha256(repr((triton.__version__, capability, told, module)).encode()).hexdigest()[:16]


def compiled_use(launch: Any, capability: int) -> Use:
    from mirasol_kernels._triton import compiled

    binary = compiled(launch, capability)
    registers, stack = resources(binary.asm["cubin"])
    return Use(
        registers,
        stack,
        spills_in_loops(binary.asm["cubin"]) if stack else 0,
        binary.metadata.shared,
        getattr(binary.metadata, "tmem_size", 0),
        int(re.search(r"mma\.sync|wgmma|tcgen05\.mma", binary.asm["ptx"]) is not None),
    )


def read(launch: Any, capability: int) -> tuple[str, Any]:
    """The kernel through the front end alone, some 0.1 s: it raises what a launch would before anything is compiled.
    Returns what it reads, and the compiler's options."""
    from triton._C.libtriton import ir

    from mirasol_kernels._triton import source_of

    source, target, backend, options = source_of(launch, capability)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    code = backend.get_codegen_implementation(options), backend.get_module_map()
    return str(source.make_ir(target, options, *code, context)), options


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
