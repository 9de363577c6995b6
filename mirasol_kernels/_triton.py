"""What Triton kernels of any op share: the machine, a launch as a value, tiles, products, units of the exponential."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# exp(x) = exp2(x log2(e)): the chip has exp2 only, so scores are kept in units of log2 from the start.
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# -2 sqrt(2/pi) log2(e), and that times 0.044715: exp(-2t) of the tanh GELU is exp2(LINEAR z + CUBIC z^3).
LINEAR = tl.constexpr(-2.302208198144325)
CUBIC = tl.constexpr(-0.1029432395800235)


class Machine(NamedTuple):
    """What a choice may depend on besides shapes."""

    capability: int  # 80 is 8.0
    processors: int  # streaming multiprocessors

    @classmethod
    @functools.cache
    def of(cls, device: torch.device) -> Machine:
        major, minor = torch.cuda.get_device_capability(device)
        return cls(10 * major + minor, torch.cuda.get_device_properties(device).multi_processor_count)


def like(capability: int) -> int:
    """The one of 80, 86, 90, 100 and 120, for which the ops have tiles, that has a chip's instructions, and no more
    shared memory than it."""
    if capability in (80, 86, 90, 100, 120):
        return capability
    return {8: 80 if capability == 87 else 86, 9: 90, 10: 100}.get(capability // 10, 120 if capability > 120 else 86)


class Config(NamedTuple):
    """Tile of `rows` query rows by `keys` keys, and how the compiler shall spread and pipeline it."""

    rows: int
    keys: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """A kernel and everything it is launched with.  A value, so that what tests compile is what runs."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]  # tensors, numbers and constants by the kernel's names
    options: dict[str, int]  # num_warps, num_stages

    def run(self) -> None:
        self.kernel[self.grid](**self.arguments, **self.options)


def options(config: Config) -> dict[str, int]:
    return {"num_warps": config.warps, "num_stages": config.stages}


def compiled(launch: Launch, capability: int) -> Any:
    """The kernel of `launch` compiled for a GPU that need not be here (80 is compute capability 8.0)."""
    source, target, _, options = source_of(launch, capability)
    return triton.compile(source, target=target, options=options.__dict__)


def source_of(launch: Launch, capability: int) -> tuple[Any, Any, Any, Any]:
    """What Triton compiles for `launch`, with the target, its backend and the options.

    Triton's own binder sorts the arguments into constants, aligned and other ones, as it does at a launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    target, kernel = GPUTarget("cuda", capability, 32), launch.kernel
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = binder(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(
        backend, launch.options, bound, specialization, launch.options
    )
    return ASTSource(kernel, signature, constants, attributes), target, backend, options


def near(x: Tensor) -> Tensor:
    """x (B, H, N, D), copied if its rows are so far apart that an offset within a tile leaves 32 bits."""
    return x if x.stride(2) < 1 << 23 else x.contiguous()


def power_of_two(n: int, least: int = 16) -> int:
    """The least power of two that holds n; a product of tiles needs 16."""
    return max(least, 1 << (n - 1).bit_length())


@triton.jit
def load_rows(
    x, stride, start, stop, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TAIL: tl.constexpr
):  # -> (ROWS, BLOCK_D)
    """Rows start .. start+ROWS-1 of x (N, D); zeros past D and, with TAIL, from row `stop` on, which is not read."""
    row, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    pointers = x + start.to(tl.int64) * stride + (row[:, None] * stride + d[None, :])
    if TAIL:
        mask = start + row[:, None] < stop
        if D != BLOCK_D:
            mask = mask & (d[None, :] < D)
        return tl.load(pointers, mask=mask, other=0.0)
    if D != BLOCK_D:
        return tl.load(pointers, mask=d[None, :] < D, other=0.0)
    return tl.load(pointers)


@triton.jit
def load_matrix(
    x, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # -> (len(row), len(column))
    """Of x (ROWS, COLUMNS), contiguous; zeros outside."""
    at = x + row[:, None] * COLUMNS + column[None, :]
    if ROWS % BLOCK_R or COLUMNS % BLOCK_C:
        return tl.load(at, mask=(row < ROWS)[:, None] & (column < COLUMNS)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def load_vector(x, index, N: tl.constexpr, BLOCK: tl.constexpr):
    if N % BLOCK:
        return tl.load(x + index, mask=index < N, other=0.0)
    return tl.load(x + index)


@triton.jit
def add_product(acc, a, b):
    """acc + a b.  In float32 a sum of c or n terms, one after another, would round worse than a blocked product of the
    reference: every product starts from 0.  Subtracted, because an addition Triton folds into the chain."""
    if a.dtype == tl.float32:
        return acc - tl.dot(-a, b, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def share_of(z):
    """(1 + tanh t) / 2 = 1 / (1 + exp(-2t)) with t = sqrt(2/pi) (z + 0.044715 z^3): neither cancels nor overflows."""
    return 1 / (1 + tl.exp2(z * (z * z * CUBIC + LINEAR)))
