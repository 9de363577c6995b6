"""What `benchmarks.gpu_check` runs, in order.

On "cpu", which is for its tests, small things of the same kind.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import harness

WORK = harness.ROOT / "build" / "gpu-check"
SANITIZERS = ("memcheck", "racecheck")
# In the order of their worth: where time runs short, the last are missing.
SHAPES = {
    "attention": "combiner_64 wan_1b vjepa2_ac_8 magi_32k combiner_64_last small_snippets latent window_sink "
    "text_images short_clips wan_teacher magi_8k magi_16k decode_256 decode_1 decode_32 decode_8 "
    "wan_decode longlive2_text wan_14b longlive2 magi",
    "attention-more": "longlive2_decode wan_first_frame prefix_answer magi_decode longlive vjepa2_plan actions "
    "vjepa2_ac_extrinsics",
    "attention-flex": "combiner_64 wan_1b vjepa2_ac_8 magi_32k latent window_sink text_images magi_8k",
    "token-learner": "snippets writes snippets_1280",
    "token-learner-compile": "snippets writes",
    "recurrence": "machine_512 machine_384 machine_512_batch machine_768 block machine_384_batch machine_768_batch "
    "block_batch block_long",
    "recurrence-compile": "machine_512 machine_384",
}
NOT_FLEX = ["dense_mask", "per_snippet", "cudnn_per_snippet", "flash_attn", "xformers"]  # what compiles comes later


PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
TESTS = 90  # seconds
NO_PLUGINS = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}


class Stage(NamedTuple):
    name: str
    seconds: float  # after which it is stopped, together with what those before it left
    command: Sequence[str]
    result: Path | None = None  # JSON that the command writes as it goes
    missing: str | None = None  # why it cannot run here
    environment: Mapping[str, str] = {}
    refusal: str | None = None  # what it prints where this machine does not let it work: that is no failure


def stages(device: str) -> list[Stage]:
    ours = "triton" if device == "cuda" else "native"
    others = NOT_FLEX if device == "cuda" else ["dense_mask", "per_snippet"]
    steps = ["ours", *(["cuda"] if device == "cuda" else []), "eager", "checkpoint_step", "checkpoint_segment"]
    return [
        build(device),
        tests(),
        op("attention", "block_causal_attention", 80, device, "bfloat16", "--peer", ours, *others),
        op("token-learner", "token_learner", 16, device, "bfloat16", "--peer", ours, "reference", "eager"),
        op("recurrence", "latent_recurrence", 24, device, "float32", "--peer", *steps),
        model("forward", 16, device, "--combiner", "all"),
        model("training", 22, device, "--combiner", "all", "--train"),
        model("compiled", 60, device, "--train", "--compile", lengths=1),  # one size: every other is compiled anew
        by_parts(16, device),
        layers(25, device),
        op("attention-flex", "block_causal_attention", 24, device, "bfloat16", "--no-memory", "--peer", ours, "flex"),
        op("token-learner-compile", "token_learner", 11, device, "bfloat16", "--no-memory", "--peer", ours, "compile"),
        op(
            "recurrence-compile", "latent_recurrence", 11, device, "float32", "--no-memory", "--peer", "ours", "compile"
        ),
        *(sanitizer(tool) for tool in SANITIZERS),
        # If anything is left:
        model("compiled-forward", 0, device, "--compile", lengths=1),
        model("combiners", 0, device, "--combiner", "current", "ttm", "perceiver", "token_learner", "--train"),
        op("attention-more", "block_causal_attention", 0, device, "bfloat16", "--peer", ours, *others),
    ]


def build(device: str) -> Stage:
    """The CUDA kernels, into the tree. The CPU's have no part in this check."""
    tools = {tool: tool_of(tool) for tool in ("cmake", "nvcc", "ninja")}
    absent = [tool for tool in (("cmake", "nvcc") if device == "cuda" else ("cmake",)) if tools[tool] is None]
    into = harness.ROOT / "mirasol_kernels" if device == "cuda" else WORK / "built"
    settings = {
        "MIRASOL_LIBRARY": device, "MIRASOL_TORCH": Path(torch.__file__).parent, "MIRASOL_TESTS": "OFF",
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": into,
    }  # fmt: skip
    environment = {}
    if device == "cuda":
        settings["CMAKE_CUDA_COMPILER"] = tools["nvcc"]
        environment = {"TORCH_CUDA_ARCH_LIST": architecture(torch.cuda.get_device_capability())}
    folder = str(WORK / f"cmake-{device}")
    configure = [tools["cmake"] or "cmake", "--fresh", "-S", str(harness.ROOT), "-B", folder]
    configure += [*(["-GNinja"] if tools["ninja"] else []), *(f"-D{key}={x}" for key, x in settings.items())]
    make = ["cmake", "--build", folder, "--target", f"native_{device}", "--parallel", str(os.cpu_count())]
    command = ["sh", "-c", f"{shlex.join(configure)} && {shlex.join(make)}"]
    missing = f"not here: {', '.join(absent)}" if absent else None
    return Stage("build", 70, command, missing=missing, environment=environment)


def architecture(capability: tuple[int, int]) -> str:
    """As TORCH_CUDA_ARCH_LIST names it; Hopper's own instructions need the a."""
    major, minor = capability
    return f"{major}.{minor}" + "a" * (major == 9)


def tests() -> Stage:
    """The files in which anything is marked as needing a GPU, with no plugins but those we name. Where there is no
    pytest, every op's cases against float64, which needs nothing."""
    if without("pytest"):
        return Stage("tests", TESTS, [sys.executable, "-m", "mirasol_kernels", "--check"])
    files = sorted(
        (harness.ROOT / "tests").rglob("test_*.py"), key=lambda file: (file.stem != "test_every_backend", file)
    )
    marked = [str(file.relative_to(harness.ROOT)) for file in files if "mark.gpu" in file.read_text()]
    parallel = [] if without("xdist") else ["-p", "xdist.plugin", "-n", str(workers_here())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "--color=no", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *parallel, *marked]
    deterministic = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    return Stage("tests", TESTS, command, environment=deterministic | NO_PLUGINS)


def workers_here() -> int:
    """Most of the time goes to compiling some 330 kernels of Triton, of which each process does one at a time."""
    return max(1, min(14, (os.cpu_count() or 1) - 2))


def op(name: str, of: str, seconds: float, device: str, dtype: str, *options: str) -> Stage:
    out = WORK / name
    command = [sys.executable, "-m", "benchmarks.run", of, "--device", device, "--no-tests", "--keep-going"]
    command += ["--dtype", dtype, "--seconds", "1", "--out", str(out), *options]
    command += ["--case", *SHAPES[name].split()] if device == "cuda" else ["--quick"]
    return Stage(name, seconds, command, out / f"{of}.json")


def size(device: str, lengths: int = 2) -> list[str]:
    """With so many of the lengths, the one that there are targets for first: a length is saved when it is whole."""
    if device != "cuda":
        return ["tiny", "--frames", "8"]
    return ["base", "--dtype", "bfloat16", "--frames", *("512", "64")[:lengths]]


def model(name: str, seconds: float, device: str, *options: str, lengths: int = 2) -> Stage:
    out = WORK / name
    command = [sys.executable, "-m", "benchmarks.sweep", "--clip", "noise", "--preset", *size(device, lengths)]
    command += ["--keep-going"]
    return Stage(name, seconds, [*command, "--out", str(out), *options], out / "sweep.json", without("huggingface_hub"))


def by_parts(seconds: float, device: str) -> Stage:
    """A training step part by part, with the time of decoding where PyAV is here."""
    out, clip = WORK / "parts", ["--clip", "noise"] if without("av") else []
    command = [sys.executable, "-m", "benchmarks.parts", "--preset", *size(device), "--combiner", "all", *clip]
    command += ["--seconds", "2", "--out", str(out)]
    return Stage("parts", seconds, command, out / "parts.json", without("huggingface_hub"))


def layers(seconds: float, device: str) -> Stage:
    """The layers of a training step of 3b, in calls as large as 1 to 64 GPUs make them: for `benchmarks.scale`."""
    out, preset, frames = WORK / "layers", *(("3b", "4096") if device == "cuda" else ("tiny", "256"))
    command = [sys.executable, "-m", "benchmarks.layer_times", "--preset", preset, "--frames", frames]
    command += ["--seconds", "2", "--out", str(out)]
    return Stage("layers", seconds, command, out / f"layers-{preset}.json", without("huggingface_hub"))


def sanitizer(tool: str) -> Stage:
    """Every kernel once, small, each tensor an allocation of its own."""
    found = tool_of("compute-sanitizer")
    missing = None if found else "there is no compute-sanitizer"
    command = [found or "compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
    command += [sys.executable, "-m", "benchmarks.gpu_kernels"]
    each_its_own = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    refusal = "(Device not supported|Failed to initialize|Unable to (find|attach|open))"
    return Stage(tool, 20, command, missing=missing, environment=each_its_own, refusal=refusal)


def tool_of(name: str) -> str | None:
    """A program of this Python's environment, of the PATH, or of the CUDA toolkit in its usual place."""
    return shutil.which(name, path=os.pathsep.join([PATH, "/usr/local/cuda/bin"]))


def without(*packages: str) -> str | None:
    absent = [name for name in packages if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else None
