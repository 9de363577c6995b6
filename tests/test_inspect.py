"""The C++ side driven from Python with no torch in the process: `_inspect`, which `make test` builds."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

MODULE = next((Path(__file__).parents[1] / "mirasol_kernels").glob("_inspect.*.so"), None)
pytestmark = pytest.mark.skipif(MODULE is None, reason="_inspect is not built: make test, with a C++ compiler")
ISAS = ("base", "avx2", "avx512", "avx512bf16", "amx")

SCRIPT = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("_inspect", {module!r})
_inspect = importlib.util.module_from_spec(spec)
spec.loader.exec_module(_inspect)
import numpy as np


def attend(q, k, v, seen, scale):
    s = np.where(seen, scale * (q @ k.swapaxes(2, 3)), -np.inf)
    top = s.max(-1, keepdims=True)
    p = np.exp(s - top)
    return p @ v / p.sum(-1, keepdims=True), np.log(p.sum(-1)) + top[..., 0]


def close(actual, low, exact):
    bound = 2 * np.abs(low - exact).max() + 4 * np.finfo(np.float32).eps * np.abs(exact).max()
    assert low.dtype == np.float32 and np.abs(actual - exact).max() <= bound


draw = np.random.default_rng(0)
q, k, v = (draw.standard_normal((2, heads, 35, d), dtype=np.float32) for heads, d in ((4, 20), (2, 20), (2, 7)))
snippet = np.arange(35) // 7
ends = 7 * np.arange(1, 6, dtype=np.int32)
ranges = np.stack([np.zeros_like(ends), ends], -1)[None, :, None, :]
tables = np.concatenate([[0], ends])[None].astype(np.int32), ranges
out, lse = _inspect.attention_forward(q, k, v, *tables, scale=0.25)
wide = [np.repeat(x, 2, axis=1) for x in (k, v)]
seen = snippet[:, None] >= snippet
low = attend(q, *wide, seen, np.float32(0.25))
exact = attend(*(x.astype(np.float64) for x in (q, *wide)), seen, 0.25)
close(out, low[0], exact[0]), close(lse, low[1], exact[1])
for threads in (2, 7):
    again = _inspect.attention_forward(q, k, v, *tables, scale=0.25, threads=threads)
    assert all(np.array_equal(a, b) for a, b in zip((out, lse), again))
try:
    _inspect.attention_forward(q, k[:1], v, *tables, scale=0.25)
except ValueError as error:
    assert "k: expected batch" in str(error)
else:
    raise AssertionError
assert min(_inspect.caches().values()) >= 0
plan = _inspect.attention_plan(batch=2, q_heads=4, kv_heads=2, q_len=35, k_len=35, dim=20, value_dim=7)
assert min(plan.values()) > 0
assert "torch" not in sys.modules
print(_inspect.isa())
"""


@pytest.mark.parametrize("isa", ISAS)
def test_the_raw_kernel_on_numpy_arrays(isa):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=str(MODULE))],
        env=os.environ | {"MIRASOL_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    used = done.stdout.strip()
    assert ISAS.index(used) <= ISAS.index(isa)
    if used != isa:
        pytest.skip(f"this CPU has no {isa}")


def test_it_is_a_module_of_the_package():
    assert importlib.util.find_spec("mirasol_kernels._inspect").origin == str(MODULE)
