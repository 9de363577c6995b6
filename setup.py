"""Build driver.

It decides which native libraries to attempt on this machine, lets CMake build them and writes down what came of it.
Sources and flags are CMakeLists.txt's; name, version and dependencies are pyproject.toml's.

    MIRASOL_BUILD=auto   (default) what this machine can build; what fails is left out, with the reason
                  cpu    the CPU kernels, or an error
                  cuda   the CPU and the CUDA kernels, or an error
                  none   pure Python

The usual variables hold too: CXX, CUDACXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
MODE = os.environ.get("MIRASOL_BUILD", "auto").lower()
EXPLICIT = {"auto": (), "none": (), "cpu": ("cpu",), "cuda": ("cpu", "cuda")}  # built, or the install fails
LEAST_TORCH = (2, 10)
if MODE not in EXPLICIT:
    raise SystemExit(f"MIRASOL_BUILD: expected auto, cpu, cuda or none, got {MODE!r}")


def find_torch() -> Path | None:
    """The torch that this package will run with.

    pip's isolated build hides site-packages from `import`, not from the disk; and importing torch to ask would fail
    there.  Any torch's headers do, since the ABI is the stable one, but this one need not be downloaded.
    """
    spec = importlib.util.find_spec("torch")
    homes = [Path(spec.origin).parent] if spec and spec.origin else []
    sites = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    homes += [Path(home, "torch") for home in [*sites, site.getusersitepackages()]]
    return next((home for home in homes if torch_version(home) >= LEAST_TORCH), None)


def torch_version(home: Path) -> tuple[int, ...]:
    source = home / "version.py"
    found = re.search(r"__version__ = ['\"](\d+)\.(\d+)", source.read_text()) if source.exists() else None
    return tuple(map(int, found.groups())) if found else ()


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    guesses = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next((found for guess in guesses if guess and (found := shutil.which(guess))), None)


def find_compiler() -> str | None:
    guesses = [shlex.split(os.environ["CXX"])[0]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for guess in guesses if (found := shutil.which(guess))), None)


def usable(tool: str, least: tuple[int, ...] = ()) -> bool:
    """Whether `tool` runs here and is new enough.  One from the hidden site-packages is on the PATH and fails."""
    try:
        said = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    return tuple(map(int, re.findall(r"\d+", said)[: len(least)])) >= least


def missing(library: str) -> str | None:
    """Why `library` ("cpu" or "cuda") is not attempted here, or None."""
    if MODE == "none":
        return "MIRASOL_BUILD=none"
    if sys.platform != "linux":
        return f"compiled kernels exist for Linux only, this is {sys.platform}"
    if not find_compiler():
        return "no C++ compiler"
    if library == "cuda":
        if MODE == "cpu":
            return "MIRASOL_BUILD=cpu"
        if not find_nvcc():
            return "no CUDA toolkit (nvcc)"
    return None


WANTED = [library for library in ("cpu", "cuda") if not missing(library)]
REPORT = {library: missing(library) or "not built" for library in ("cpu", "cuda")}
for library in EXPLICIT[MODE]:
    if library not in WANTED:
        raise SystemExit(f"MIRASOL_BUILD={MODE} was asked for, but: {missing(library)}")


def build_requirements() -> list[str]:
    """What pip installs for the build besides pyproject.toml's list: only what is not here already."""
    if not WANTED:
        return []
    tools = [] if usable("cmake", (3, 24)) else ["cmake>=3.24"]
    tools += [] if usable("ninja") else ["ninja"]
    return tools + ([] if find_torch() else [f"torch>={LEAST_TORCH[0]}.{LEAST_TORCH[1]}"])


def run(*command: object) -> None:
    """Run, show the output, and fail with the first line that tells an error."""
    try:
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except FileNotFoundError:
        raise RuntimeError(f"{command[0]} is not installed, and --no-build-isolation does not install it") from None
    print(done.stdout, flush=True)
    if done.returncode:
        lines = [line.strip().replace(f"{ROOT}/", "") for line in done.stdout.splitlines() if line.strip()]
        at = next((i for i, line in enumerate(lines) if re.search(r"\berror\b", line, re.I)), len(lines) - 1)
        wordless = lines[at : at + 1] and lines[at].startswith("CMake Error")  # CMake says the reason in the line below
        raise RuntimeError(" ".join(lines[at : at + 1 + bool(wordless)])[:300] or f"{command[0]} failed")


def build(library: str, work: Path, out: Path) -> None:
    torch = find_torch()
    if torch is None:
        raise RuntimeError("torch not found; install torch first, then use --no-build-isolation")
    configure = [f"-DMIRASOL_LIBRARY={library}", f"-DMIRASOL_TORCH={torch}", "-DMIRASOL_TESTS=OFF"]
    configure.append(f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={out}")
    if library == "cuda":
        configure.append(f"-DCMAKE_CUDA_COMPILER={find_nvcc()}")
    if usable("ninja"):
        configure.append("-GNinja")
    # --fresh: the cache of an earlier isolated build names tools that are gone
    run("cmake", "--fresh", "-S", ROOT, "-B", work, *configure)
    jobs = os.environ.get("MAX_JOBS") or len(os.sched_getaffinity(0))
    run("cmake", "--build", work, "--target", f"native_{library}", "--parallel", jobs)


def write_report(package: Path) -> None:
    """`_build.json`: what was built and why the rest was not, for the package to tell its user.

    pip shows nothing of an install that succeeds, so a warning printed here would be lost.
    """
    package.mkdir(parents=True, exist_ok=True)
    for library, said in REPORT.items():
        if said != "built":  # an earlier build's would be loaded all the same
            (package / f"_native_{library}.so").unlink(missing_ok=True)
    (package / "_build.json").write_text(json.dumps(REPORT, indent=1) + "\n")


class BuildPy(build_py):
    def run(self):
        if not self.editable_mode:  # setuptools packs whatever an earlier build left there
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()
        write_report((ROOT if self.editable_mode else Path(self.build_lib)) / "mirasol_kernels")


class BuildExt(build_ext):
    def get_ext_filename(self, name):  # no Python ABI in the name: the libraries use no Python API
        return f"{name.replace('.', '/')}.so"

    def build_extension(self, ext):
        library = ext.name.rsplit("_", 1)[1]
        try:
            out = Path(self.get_ext_fullpath(ext.name)).resolve().parent
            build(library, Path(self.build_temp, library).resolve(), out)
            REPORT[library] = "built"
        except RuntimeError as error:
            if library in EXPLICIT[MODE]:
                raise SystemExit(f"MIRASOL_BUILD={MODE} was asked for, but: {library}: {error}") from error
            REPORT[library] = f"build failed: {error}"

    def run(self):
        super().run()
        write_report((ROOT if self.inplace else Path(self.build_lib)) / "mirasol_kernels")


class Wheel(bdist_wheel):
    def get_tag(self):  # one wheel for every Python, and for every machine when nothing native is in it
        return "py3", "none", super().get_tag()[2] if "built" in REPORT.values() else "any"


setup(
    # optional: setuptools then does not look for the output of a build that failed
    ext_modules=[Extension(f"mirasol_kernels._native_{library}", sources=[], optional=True) for library in WANTED],
    cmdclass={"build_py": BuildPy, "build_ext": BuildExt, "bdist_wheel": Wheel},
    setup_requires=build_requirements(),
)
