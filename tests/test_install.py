"""`pip install` in every situation that a user may be in, each in an environment of its own.

The environments see the packages of this one through links, so that nothing is downloaded but the build requirements.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="links and libraries of Linux")]

ROOT = Path(__file__).parents[1]
PACKAGED = ("mirasol_kernels", "mirasol_model", "csrc")
OPTIMISED = {"CMAKE_BUILD_TYPE": ""}  # as users build; else Debug, in a fifth of the time: the way of a build is tried
NO_TOOLKIT = "no CUDA toolkit (nvcc)"
compiled = pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "c++")), reason="no C++ compiler")

CALL = """
import torch, mirasol_kernels as mk
x, layout = torch.randn(1, 2, 6, 8), mk.SnippetLayout.uniform(2, 3)
said = mk.explain(mk.block_causal_attention, x, x, x, layout)
assert torch.isfinite(mk.block_causal_attention(x, x, x, layout)).all()
print(mk.__file__, said, sep="\\n")
"""


class Environment:
    """A virtual environment that has every package of this one except the package under test."""

    def __init__(self, home: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True)
        self.python = home / "bin/python"
        self.site = home / Path(sysconfig.get_path("purelib")).relative_to(sys.prefix)
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if "mirasol" not in entry.name:
                (self.site / entry.name).symlink_to(entry)
        self.home = home

    def run(self, *command: object, ok: bool | None = True, **environment: str) -> str:
        """Output and errors of `python command`; ok: whether it must succeed, None if either will do."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith("MIRASOL_") and k != "PYTHONPATH"}
        clean["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"  # cmake and ninja, where the system has none
        clean |= {"CMAKE_BUILD_TYPE": "Debug", "TORCH_CUDA_ARCH_LIST": "8.0"}  # one chip: how it builds is tried
        done = subprocess.run(
            [str(self.python), *map(str, command)],
            cwd=self.home,  # not the repository: what is installed must be what is found
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert ok is None or (done.returncode == 0) == ok, done.stdout
        return done.stdout

    def pip(self, *arguments: object, ok: bool | None = True, **environment: str) -> str:
        return self.run("-m", "pip", *arguments, ok=ok, **environment)

    def install(self, *arguments: object, ok: bool | None = True, **environment: str) -> str:
        return self.pip("install", "--no-build-isolation", "--no-deps", *arguments, ok=ok, **environment)

    def native_runs(self) -> str:
        """Assert that the compiled kernels serve a call, without a warning; the path of what was imported."""
        home, said = self.run("-W", "error::UserWarning", "-c", CALL).splitlines()[-2:]
        assert "'native': 'runs'" in said
        return home

    def pure(self) -> str:
        """Assert that the reference serves a call, with one warning; the reason in it."""
        said = self.run("-c", CALL)
        warnings = re.findall(r"UserWarning: mirasol_kernels: no compiled cpu kernels \((.*)\); PyTorch runs", said)
        assert len(warnings) == 1 and f"'native': {warnings[0]!r}" in said, said
        assert not list(self.site.glob("mirasol_kernels/_native_cpu.so"))
        return warnings[0]

    def report(self) -> dict[str, str]:
        return json.loads((self.site / "mirasol_kernels/_build.json").read_text())


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "env")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The sources as in a fresh clone."""
    home = tmp_path / "tree"
    left_out = shutil.ignore_patterns("*.so", "_build.json", "__pycache__")
    for name in PACKAGED:
        shutil.copytree(ROOT / name, home / name, ignore=left_out)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, home)
    return home


@pytest.fixture
def empty(tmp_path: Path) -> str:
    """A PATH on which there is nothing."""
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty")


@compiled
def test_isolated(env, tree):
    said = env.pip("install", "-v", tree)
    assert not re.search(r"(Collecting|Downloading) torch\b", said)  # the one on the disk is found
    assert Path(env.native_runs()).is_relative_to(env.site)
    assert env.report()["cpu"] == "built"


@compiled
def test_wheel_without_build_isolation(env, tree, tmp_path):
    # What earlier builds left behind must stay out of a wheel.
    (tree / "mirasol_kernels/_inspect.so").touch()
    (tree / "build/lib/mirasol_kernels").mkdir(parents=True)
    (tree / "build/lib/mirasol_kernels/stale.py").touch()
    env.pip("wheel", "--no-build-isolation", "--no-deps", "-w", tmp_path, tree, MIRASOL_BUILD="cpu", **OPTIMISED)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl")
    files = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in files} == {"mirasol_kernels", "mirasol_model"}
    sources = {str(p.relative_to(ROOT)) for folder in PACKAGED[:2] for p in (ROOT / folder).rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == sources
    libraries = [name for name in files if ".so" in name]
    assert libraries == ["mirasol_kernels/_native_cpu.so"]
    assert any(name.endswith("LICENSE") for name in files)

    # Any Linux of glibc 2.28 or newer, with nothing but torch's own library left to be found at run time.
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    plat = f"manylinux_2_28_{platform.machine()}"
    repair = ("-m", "auditwheel", "repair", "--plat", plat, "--exclude", "libtorch_cpu.so", "-w", tmp_path / "r", wheel)
    env.run(*repair, PATH=tools)
    (repaired,) = (tmp_path / "r").glob("*.whl")
    assert [name for name in zipfile.ZipFile(repaired).namelist() if ".so" in name] == libraries
    env.install(repaired)
    env.native_runs()


@compiled
def test_editable(env, tree):
    env.install("--editable", tree, MIRASOL_BUILD="cpu")
    assert Path(env.native_runs()) == tree / "mirasol_kernels/__init__.py"
    env.install("--editable", tree, MIRASOL_BUILD="none")  # and the library of before is not loaded any more
    assert env.pure() == "MIRASOL_BUILD=none"


@compiled
def test_sdist(env, tree, tmp_path):
    (tree / "mirasol_kernels/_native_cpu.so").touch()
    (tree / "mirasol_kernels/_build.json").touch()
    env.run("-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, tree)
    (sdist,) = tmp_path.glob("*.tar.gz")
    env.install(sdist, MIRASOL_BUILD="cpu")
    env.native_runs()


def test_no_compiler(env, tree, empty):
    env.pip("install", tree, PATH=empty, CXX="")
    assert env.pure() == "no C++ compiler"
    assert "Root-Is-Purelib: true" in next(env.site.glob("mirasol_kernels-*/WHEEL")).read_text()


def test_broken_compiler(env, tree, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'fatal error: out of order' >&2\nexit 1\n")
    compiler.chmod(0o755)
    env.install(tree, CXX=str(compiler))
    assert re.match(r"build failed: CMake Error .* compiler", env.pure())
    assert "Tag: py3-none-any" in next(env.site.glob("mirasol_kernels-*/WHEEL")).read_text()


def test_no_cmake(env, tree, empty):
    env.install(tree, PATH=empty, CXX=sys.executable)  # some program: nothing gets as far as calling it
    assert env.pure() == "build failed: cmake is not installed, and --no-build-isolation does not install it"


@compiled
@pytest.mark.parametrize("mode", ["auto", "cpu"])
def test_broken_source(env, tree, mode):
    with (tree / "csrc/common/isa.cpp").open("a") as file:
        file.write("nonsense;\n")
    said = env.install(tree, ok=mode == "auto", MIRASOL_BUILD=mode)
    reason = env.pure() if mode == "auto" else said
    assert re.search(r"csrc/common/isa.cpp:\d+:\d+: error: .nonsense. does not name a type", reason)
    assert mode == "auto" or "MIRASOL_BUILD=cpu was asked for, but: cpu:" in said


def test_what_is_asked_for_is_built_or_fails(env, tree, empty):
    said = env.install(tree, ok=False, MIRASOL_BUILD="cpu", PATH=empty, CXX="")
    assert "MIRASOL_BUILD=cpu was asked for, but: no C++ compiler" in said
    said = env.install(tree, ok=False, MIRASOL_BUILD="gpu")
    assert "MIRASOL_BUILD: expected auto, cpu, cuda or none, got 'gpu'" in said


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_not_linux(env, tree, system):
    """setup.py in a process that was told it runs elsewhere, after setuptools has looked for itself."""
    wheel = (
        "import os, runpy, sys, setuptools.command.bdist_wheel, setuptools.command.build_ext, setuptools.build_meta\n"
        f"os.chdir({str(tree)!r})\n"
        f"sys.platform, sys.argv = {system!r}, ['setup.py', '-q', 'bdist_wheel', '-d', {str(env.home)!r}]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    env.run("-c", wheel)
    (built,) = env.home.glob("*-py3-none-any.whl")
    env.install(built)
    assert env.pure() == f"compiled kernels exist for Linux only, this is {system}"


@compiled
def test_cuda_beside_any_torch(env, tree):
    """Built without a GPU and beside a CPU build of torch, it loads: the same file serves a machine that has one."""
    said = env.install(tree, ok=None, MIRASOL_BUILD="cuda")
    if NO_TOOLKIT in said:
        pytest.skip(NO_TOOLKIT)
    env.native_runs()
    assert env.report() == {"cpu": "built", "cuda": "built"}
    said = env.run("-m", "mirasol_kernels")
    assert re.search(r"^cuda kernels +compiled and loaded$", said, re.M), said
    library = (env.site / "mirasol_kernels/_native_cuda.so").read_bytes()
    assert b"libcudart.so" not in library and b"libtorch_cuda" not in library


@compiled
def test_a_broken_cuda_kernel_leaves_the_cpu_library(env, tree):
    with next(tree.glob("csrc/*/cuda.cu")).open("a") as file:
        file.write("nonsense;\n")
    env.install(tree)
    if env.report()["cuda"] == NO_TOOLKIT:
        pytest.skip(NO_TOOLKIT)
    env.native_runs()
    assert env.report()["cpu"] == "built" and re.match(r"build failed: csrc/.*cuda.cu.*error", env.report()["cuda"])
