"""A fresh process that imports the package: what it loads, what it says, and what it can still do."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "mirasol_kernels"

CALL = """
import torch
import mirasol_kernels as mk
x = torch.randn(1, 2, 6, 8)
layout = mk.SnippetLayout.uniform(2, 3)
assert torch.isfinite(mk.block_causal_attention(x, x, x, layout)).all()
"""


def python(code: str, home: Path = PACKAGE.parent) -> subprocess.CompletedProcess:
    done = subprocess.run([sys.executable, "-c", code], cwd=home, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_import_loads_torch_and_little_else():
    code = "import sys, torch; before = set(sys.modules); import mirasol_kernels; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in python(code).stdout.split()}
    assert "mirasol_kernels" in loaded
    assert not loaded & {"triton", "mirasol_model", "benchmarks", "matplotlib", "av", "huggingface_hub", "transformers"}


def test_import_without_triton_or_numpy_extras():
    blocked = "import sys; sys.modules |= dict.fromkeys(['triton', 'av', 'matplotlib', 'safetensors', 'tokenizers'])\n"
    python(blocked + CALL)


@pytest.mark.parametrize("missing", ["huggingface_hub", "tokenizers"])
def test_without_its_extra_the_model_says_what_to_install(missing):
    code = f"import sys; sys.modules[{missing!r}] = None\nfrom mirasol_model import Mirasol, tokens"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert said.startswith("ModuleNotFoundError: ") and said.endswith("pip install 'mirasol-kernels[model]'")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """The package without its compiled libraries."""
    shutil.copytree(
        PACKAGE, tmp_path / "mirasol_kernels", ignore=shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    )
    return tmp_path


@pytest.mark.parametrize(
    ("report", "reason"),
    [({"cpu": "no C++ compiler", "cuda": "no CUDA toolkit (nvcc)"}, "no C++ compiler"), (None, "not built")],
)
def test_without_compiled_kernels_one_warning_with_the_reason(bare, report, reason):
    if report:
        (bare / "mirasol_kernels/_build.json").write_text(json.dumps(report))
    said = python(CALL * 2, bare).stderr
    assert said.count("UserWarning") == said.count(f"no compiled cpu kernels ({reason}); PyTorch runs instead") == 1


def test_a_library_that_does_not_load_is_a_reason(bare):
    (bare / "mirasol_kernels/_native_cpu.so").write_bytes(b"not a library" * 99)
    code = CALL + "print(mk.explain(mk.block_causal_attention, x, x, x, layout)['native'])"
    done = python(code, bare)
    assert "_native_cpu.so did not load: " in done.stdout and "invalid ELF header" in done.stdout
    assert done.stderr.count("UserWarning") == 1


def test_the_report(bare):
    (bare / "mirasol_kernels/_build.json").write_text(json.dumps({"cpu": "build failed: no such luck"}))
    done = subprocess.run([sys.executable, "-m", "mirasol_kernels"], cwd=bare, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr.count("UserWarning") == 1
    for line in ("cpu kernels      build failed: no such luck", "  native         build failed: no such luck"):
        assert line in done.stdout
    assert "--force-reinstall" in done.stdout and "\nblock_causal_attention\n" in done.stdout


def test_the_report_checks_every_case():
    command = [sys.executable, "-m", "mirasol_kernels", "--check"]
    done = subprocess.run(command, cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "FAILED" not in done.stdout, done.stdout + done.stderr
