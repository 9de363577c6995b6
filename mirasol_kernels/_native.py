"""Load the compiled libraries, once, and say once why one is absent."""

import functools
import json
import warnings
from pathlib import Path

import torch

HOME = Path(__file__).parent


def build_report() -> dict[str, str]:
    """What setup.py wrote down when this package was installed: library -> "built" or the reason it is not."""
    report = HOME / "_build.json"
    return json.loads(report.read_text()) if report.exists() else {}


@functools.cache
def missing(library: str) -> str | None:
    """None once `_native_<library>.so` (library: "cpu" or "cuda") is loaded, else the reason it is not.

    Warns when the absence costs speed: without the CPU library always, without the CUDA library where a GPU is.
    """
    reason = _load(library)
    if reason and (library == "cpu" or torch.cuda.is_available()):
        warnings.warn(
            f"mirasol_kernels: no compiled {library} kernels ({reason}); PyTorch runs instead: same results, slower. "
            "`python -m mirasol_kernels` tells more.",
            stacklevel=2,
        )
    return reason


def _load(library: str) -> str | None:
    path = HOME / f"_native_{library}.so"
    if not path.exists():
        return build_report().get(library, "not built")
    try:
        torch.ops.load_library(path)
    except OSError as error:  # a torch older than the stable ABI it was built for, another platform, ...
        return f"{path.name} did not load: {error.__cause__ or error}"
    return None
