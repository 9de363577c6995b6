"""GPU code without a GPU: Triton's kernels run in its interpreter, and compile for the chips that we mean to serve."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mirasol_kernels import SnippetLayout, _native
from mirasol_kernels._dispatch import Op, use_backend
from mirasol_kernels.block_causal_attention import op
from mirasol_kernels.latent_recurrence import TokenTuringParameters
from mirasol_kernels.latent_recurrence import op as latent_recurrence
from mirasol_kernels.token_learner import op as token_learner
from tests.gpu_code import SHARED, examined, library_resources

ROOT = Path(__file__).parents[1]
ABSENT = next(b.absent for b in op.OP.backends if b.name == "triton")
pytestmark = pytest.mark.skipif(ABSENT is not None, reason=f"triton: {ABSENT}")

DIMS = (64, 80, 96, 128, 256)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
BITS = ("float32", "float16")
KINDS = ("-tokens-", "-state-")  # with what is around them in an id: problems have such names, too
INTERPRETED = [
    *[("interpreted", part) for part in ("budget and float32", "budget and float16", "tiles_of_the_table")],
    *[("interpreted", part) for part in ("decode or leak", "drawn")],
    *[("interpreted_token_learner", f"budget and {kind} and {bits}") for kind in KINDS for bits in BITS],
    *[("interpreted_token_learner", part) for part in ("regimes or chunks or tiles_of", "leak or reads_only", "drawn")],
    *[("interpreted_latent_recurrence", part) for part in ("budget or large or reads or leak or launches", "shapes")],
]
KERNELS = ("forward", "decode", "backward_q", "backward_kv")


@pytest.mark.slow
@pytest.mark.parametrize(("file", "part"), INTERPRETED)
def test_interpreted(file: str, part: str) -> None:
    """tests/<file>.py, in a process that tells Triton to interpret before it is imported."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"tests/{file}.py", "-k", part],
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


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED)
@pytest.mark.parametrize("kernel", KERNELS)
def test_compiled(kernel: str, capability: int, record_property: Any) -> None:
    """Every configuration compiles as at a launch, fits the chip, uses its tensor cores and spills in no loop."""
    from mirasol_kernels._triton import Machine

    used: dict[str, list[str]] = {}
    for dim in DIMS:
        for dtype in DTYPES:
            for launch in launches(kernel, dim, dtype, Machine(capability, 100)):
                what = f"{launch.kernel.__name__} for {capability}, D {dim}, {dtype}"
                merges = launch.kernel.__name__ == "merge"
                figures = examined(launch, capability, what, tensor_cores=dtype != torch.float32 and not merges)
                if merges:
                    continue
                tile = f"{launch.arguments['ROWS']}x{launch.arguments['KEYS']}"
                tile += f"/{launch.options['num_warps']}/{launch.options['num_stages']}"
                used.setdefault(f"{str(dtype)[6:]} {tile}", []).append(f"D{dim} {figures}")
    table = "; ".join(f"{tile}: {', '.join(figures)}" for tile, figures in used.items())
    record_property("summary", f"{kernel} {capability}, rows x keys/warps/stages, registers·stack·KB: {table}")


def test_every_configuration_resolves() -> None:
    """Any head size, any dtype, chips in the table and others of their kind."""
    from mirasol_kernels._triton import Machine
    from mirasol_kernels.block_causal_attention.triton_config import config_of

    for kernel in KERNELS:
        for capability in (*SHARED, 87, 101, 103, 110, 121, 130):
            for dtype in DTYPES:
                for dim in range(1, 257):
                    config = config_of(kernel, dim, dtype, Machine(capability, 100))
                    assert all(n & (n - 1) == 0 and n >= 16 for n in (config.rows, config.keys))


# Shapes (c, k, h) of token_learner and for which chips they are compiled: what `token_learner.COMPILED` rests on.
# Every chip gets both regimes, and float32; h 128 and 256 only some.
LEARNED: dict[tuple[int, int, int], dict[torch.dtype, tuple[int, ...]]] = {
    (768, 32, 64): {
        torch.bfloat16: token_learner.COMPILED,
        torch.float32: token_learner.COMPILED,
        torch.float16: (90,),
    },
    (2048, 512, 64): {torch.bfloat16: token_learner.COMPILED},
    (192, 8, 64): {torch.bfloat16: (90,)},
    (768, 32, 128): {torch.bfloat16: (80, 120)},
    (768, 32, 256): {torch.bfloat16: (90, 100)},
}


def learner_launches(c: int, k: int, h: int, dtype: torch.dtype, machine: Any, *, bare: bool = False) -> list:
    """What forward and backward of 16 rows of 326 tokens launch.  bare: all of them count, none has a place, and the
    result is a state."""
    from mirasol_kernels.token_learner import triton, triton_backward

    def empty(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(*sizes, dtype=dtype, device="meta")

    weights = empty(c), empty(c), empty(h, c), empty(h), empty(k, h), empty(k)
    table, valid = (None, None) if bare else (empty(326, c), empty(16, 1, dtype=torch.int64))
    call = [empty(16, 326, c)], [table], *weights, valid, bare, 1e-6, not bare
    maximum, total, pooled = results = token_learner._fake_fwd(*call)
    args = pooled, total if bare else None, maximum, total, None if bare else pooled, *call
    return [
        *triton.forward_launches(*call, *results, machine=machine),
        *triton_backward.backward_launches(*args, token_learner._fake_bwd(*args), machine=machine),
    ]


def learner_refuses(c: int, h: int, k: int, dtype: torch.dtype = torch.float32, want: str | None = None) -> str | None:
    shapes = (c,), (c,), (h, c), (h,), (k, h), (k,)
    return token_learner._triton((), *(torch.empty(shape, dtype=dtype) for shape in shapes), want)


@pytest.mark.slow
@pytest.mark.parametrize("capability", token_learner.COMPILED)
def test_token_learner_compiled(capability: int, record_property: Any) -> None:
    """As test_compiled.  Its loops over tokens hold loops over channels: of the former only the inner part is looked at
    for spills."""
    from mirasol_kernels._triton import Machine

    lines = []
    for (c, k, h), dtypes in LEARNED.items():
        for dtype, capabilities in dtypes.items():
            if capability not in capabilities:
                continue
            machine = Machine(capability, 100)
            done = learner_launches(c, k, h, dtype, machine)
            if h == 64 and dtype == torch.bfloat16:
                done += learner_launches(c, k, h, dtype, machine, bare=True)
            for launch in done:
                name = launch.kernel.__name__
                multiplies = name in ("layer", "pool", "gradient", "weights")
                what = f"{name} for {capability}, c {c}, k {k}, h {h}, {dtype}"
                figures = examined(launch, capability, what, tensor_cores=multiplies and dtype != torch.float32)
                if multiplies:
                    lines.append(f"{name} {c},{k},{h} {str(dtype)[6:]} {figures}")
    record_property("summary", f"token_learner {capability}, registers·stack·KB: {'; '.join(lines)}")


def test_every_token_learner_tile_resolves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any sizes that are not refused, any dtype, any chip: no step wants what a product of tiles cannot be."""
    from mirasol_kernels._triton import Machine
    from mirasol_kernels.token_learner.triton_config import slots_of, tile_of

    for capability in (*SHARED, 87, 101, 103, 110, 121, 130):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: divmod(found, 10))
        for dtype in DTYPES:
            for h in (1, 16, 17, 64, 128, 129, 256):
                if learner_refuses(8, h, 8, dtype, "triton") is not None:
                    assert h > 128 and (dtype == torch.float32 or capability // 10 not in (9, 10))
                    continue
                for kernel in ("layer", "pool", "gradient", "weights"):
                    tile = tile_of(kernel, h, dtype, Machine(capability, 100))
                    assert all(n & (n - 1) == 0 and n >= 16 for n in (tile.tokens, tile.channels))
                for k in (1, 8, 17, 96, 512):
                    slots = slots_of(k, h, dtype)
                    assert slots & (slots - 1) == 0 and slots >= 16


CUDA_ABSENT = next(b.absent for b in op.OP.backends if b.name == "cuda")
# Threads of a block.
CUDA_KERNELS = {
    "forward_kernel": 128,
    "backward_query_kernel": 128,
    "backward_key_kernel": 128,
    "recurrence_kernel": 512,
}


@pytest.mark.skipif(CUDA_ABSENT is not None, reason=f"cuda: {CUDA_ABSENT}")
def test_cuda_library_spills_nothing(record_property: Any) -> None:
    """Of every kernel and both chips; a block's threads also find registers enough.  Shared memory of the recurrence is
    asked for at the launch: ctest says what fits."""
    found = library_resources(_native.HOME / "_native_cuda.so")
    for arch in ("sm_80", "sm_90a"):
        assert {kernel for kernel, compiled_for in found if compiled_for == arch} == set(CUDA_KERNELS)
    for (kernel, arch), (registers, stack) in found.items():
        assert stack == 0, f"{kernel} for {arch}: spills, {stack} bytes"
        assert -(-registers // 8) * 8 * CUDA_KERNELS[kernel] <= 65536, f"{kernel} for {arch}: {registers} registers"
    figures = ", ".join(f"{kernel} {arch} {registers}" for (kernel, arch), (registers, _) in found.items())
    record_property("summary", f"compiled CUDA kernels, registers: {figures}")


# (memory slots, tokens read, c) of latent_recurrence, for videos so few and so many that both linear tiles are used.
RECURRED = {(64, 8, 512): 4, (96, 32, 768): 64}


def recurrence_launches(slots: int, read: int, c: int, batch: int, machine: Any) -> list:
    """What a step launches: a processor of one block, 64 hidden units, 8 heads, mlp 512, with tables."""
    from mirasol_kernels.latent_recurrence import triton

    p = TokenTuringParameters.init(c, slots, read, heads=8, tokens=1, device="meta")
    memory, *states = (
        torch.empty(batch, *sizes, device="meta")
        for sizes in ((slots, c), *((1, k, *more) for k in (read, slots) for more in ((), (), (c,))))
    )
    tables = [torch.empty(n, c, device="meta") for n in (slots, slots, read, read)]
    call = memory, states[:3], states[3:], latent_recurrence.weights_of(p), tables, 8, False
    return triton.forward_launches(*call, *latent_recurrence._fake_fwd(*call), machine=machine)


@pytest.mark.slow
@pytest.mark.parametrize("capability", latent_recurrence.COMPILED)
def test_latent_recurrence_compiled(capability: int, record_property: Any) -> None:
    """As test_compiled; of linear layers, only those that differ in more than a width."""
    from mirasol_kernels._triton import Machine

    lines = []
    for sizes, batch in RECURRED.items():
        looked_at = set()
        for launch in recurrence_launches(*sizes, batch, Machine(capability, 100)):
            name, given = launch.kernel.__name__, launch.arguments
            kind = name, given.get("NORM"), given.get("ROWS"), given.get("READ")
            if kind not in looked_at:
                looked_at.add(kind)
                what = f"{name} for {capability}, {sizes}"
                lines.append(
                    f"{name} {','.join(map(str, sizes))} {examined(launch, capability, what, tensor_cores=False)}"
                )
    record_property("summary", f"latent_recurrence {capability}, registers·stack·KB: {'; '.join(lines)}")


def test_every_latent_recurrence_tile_resolves() -> None:
    """Any sizes: no step wants what a product of tiles cannot be."""
    from mirasol_kernels.latent_recurrence import triton_config as config

    tiles = [config.linear_tile(rows, 64, 100) for rows in (1, 10**6)]
    tiles += [config.attend_tile(read, head) for read in (1, 16, 17, 64, 500) for head in (1, 64, 65, 256)]
    for tile in (*tiles, config.SCORE, config.POOL):
        assert all(n & (n - 1) == 0 and n >= 16 for n in tile[:3])


def test_what_the_fused_steps_refuse_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(
        width: int = 64, hidden: int = 64, heads: int = 4, memory_mode: str = "TL", want: Any = None
    ) -> str | None:
        p = TokenTuringParameters.init(
            width, 3, 2, mlp=16, hidden=hidden, heads=heads, memory_mode=memory_mode, device="meta"
        )
        memory, x = torch.empty(1, 3, width), torch.empty(1, 1, 2, width)
        return latent_recurrence._triton(memory, (x,), p, want)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert said(memory_mode="MHA") == "memory mode TL of the standard unit only"
    assert said() == "compute capability below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert said() is said(2048, 128, 8) is None
    for sizes in ((2056, 64, 257), (64, 129, 4), (512, 64, 1)):
        assert said(*sizes) == "c up to 2048, hidden up to 128 and heads up to 256 wide only"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    assert said() == "not yet compiled for this GPU in tests: runs only if asked for by name"
    assert said(want="triton") is None
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert said() == "NVIDIA GPUs only"


def test_what_triton_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(1, 1, 1, 8)
    learner = learner_refuses
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert op._triton(x.double()) == learner(8, 8, 8, torch.float64) == "no float64"
    assert op._triton(x) == learner(8, 8, 8) == "compute capability below 8.0"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert op._triton(x) is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert learner(2048, 256, 512, torch.bfloat16) is learner(2048, 128, 512) is learner(1, 1, 1) is None
    narrow = "h up to 128 only in float32 and where neither wgmma nor tcgen05 multiplies"
    assert learner(8, 129, 8) == learner(8, 129, 8, want="triton") == narrow
    for capability in ((8, 0), (8, 6), (8, 9), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert learner(2048, 128, 512) is None
        assert learner(8, 129, 8, torch.bfloat16) == learner(8, 129, 8, torch.bfloat16, "triton") == narrow
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 7))
    assert learner(8, 8, 8) == "not yet compiled for this GPU in tests: runs only if asked for by name"
    with use_backend("triton"):
        assert learner(8, 8, 8) is None
    for sizes in ((2049, 8, 8), (8, 257, 8), (8, 8, 513), (0, 8, 8)):
        assert learner(*sizes) == "c up to 2048, h up to 256 and k up to 512 only"
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert op._triton(x) == learner(8, 8, 8) == "NVIDIA GPUs only"


def test_triton_comes_before_cuda() -> None:
    for each in Op.all:
        names = [b.name for b in each.backends if b.device == "cuda"]
        assert names == sorted(names, key=["triton", "cuda"].index)
