"""The house's rules that a reader relies on: dependencies point one way, files are short."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "mirasol_kernels"
ROOMS = {path.parent.name for path in KERNELS.glob("*/api.py")}
LONGEST = 450  # about 400: a longer file holds a second idea

# What a file of a room may not import from its own room: the definition knows no kernels, kernels know no definition.
FORBIDDEN = {
    "reference": {"api", "op", "backward", "triton", "cases"},
    "backward": {"api", "op", "triton", "cases"},
    "op": {"api", "reference", "cases"},
    "triton": {"api", "op", "reference", "backward", "cases"},  # and triton_*
    "api": {"triton", "cases"},
}


def sources(*folders: str, suffixes: tuple[str, ...] = (".py",)) -> list[Path]:
    return [p for folder in folders for p in sorted((ROOT / folder).rglob("*")) if p.suffix in suffixes]


def imports(path: Path, *, lazy: bool = True) -> Iterator[str]:
    """Every module and name that a file imports, dotted; `lazy` includes those inside functions."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree) if lazy else tree.body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def exported(package: str) -> set[str]:
    """`__all__` of a package, read and not imported."""
    for node in ast.parse((ROOT / package.replace(".", "/") / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return set(ast.literal_eval(node.value))
    return set()


def module_of(path: Path) -> list[str]:
    return list(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", sources("mirasol_kernels"), ids=lambda p: str(p.relative_to(KERNELS)))
def test_kernels(path):
    own = module_of(path)
    room = own[1] if own[1] in ROOMS else None
    for name in imports(path):
        head, *rest = name.split(".")
        assert head not in {"mirasol_model", "benchmarks", "tests"}, f"{path.name} imports {name}"
        if head != "mirasol_kernels" or not rest:
            continue
        if own[1] in {"_from_mask", "_native", "_ranges", "_triton"}:
            assert rest[0].startswith("_"), f"{path.name} imports {name}"
        if own[1] == "_dispatch":
            assert rest[0] == "_native", f"_dispatch imports {name}"
        if room and rest[0] in ROOMS - {room}:  # another room: through its door
            assert len(rest) == 2 and rest[1] in exported(f"mirasol_kernels.{rest[0]}"), f"{path.name} imports {name}"
        if room and rest[0] == room:
            kind = "triton" if own[-1].startswith("triton_") else own[-1]
            assert rest[1] not in FORBIDDEN.get(kind, ()), f"{path} imports {name}"
        if own[1] in {"layout", "_dispatch", "_native", "_check"}:
            assert rest[0] not in ROOMS, f"{path.name} imports {name}"


@pytest.mark.parametrize("path", sources("mirasol_kernels", "mirasol_model"), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_triton_before_a_kernel_runs(path):
    if path.stem == "_triton" or path.stem.split("_")[0] == "triton":
        return
    eager = [name for name in imports(path, lazy=False) if "triton" in name.split(".")]
    assert not eager, f"{path.name} imports {eager}"


@pytest.mark.parametrize("path", sources("mirasol_model"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_model_uses_public_names_only(path):
    public = exported("mirasol_kernels")
    for name in imports(path):
        head, *rest = name.split(".")
        assert head not in {"benchmarks", "tests"}, f"{path.name} imports {name}"
        if head == "mirasol_kernels":
            assert len(rest) == 1 and rest[0] in public, f"{path.name} imports {name}"


NATIVE = sources("csrc", suffixes=(".h", ".cpp", ".cu", ".cuh"))


@pytest.mark.parametrize("path", NATIVE, ids=lambda p: str(p.relative_to(ROOT)))
def test_csrc(path):
    included = re.findall(r'^\s*#\s*include\s*["<]([^">]+)', path.read_text(), re.M)
    folder = path.parent.name
    for name in included:
        first = name.split("/")[0]
        if first in {"torch", "ATen", "c10"} or name == "Python.h":
            assert path.name.startswith("bind_"), f"{path.name} includes {name}: only bind_* know torch"
        if first == "pybind11":
            assert folder == "inspect", f"{path.name} includes {name}"
        if (ROOT / "csrc" / first).is_dir() and folder != "inspect":
            assert first in {folder, "common"}, f"{path.name} includes {name}: another room"
        assert "bind_" not in name, f"{path.name} includes {name}"


def test_files_are_short():
    native = (".py", ".h", ".cpp", ".cu", ".cuh")
    folders = ("mirasol_kernels", "mirasol_model", "benchmarks", "csrc", "tests", "examples")
    lengths = {p.relative_to(ROOT): len(p.read_text().splitlines()) for p in sources(*folders, suffixes=native)}
    assert not {str(p): n for p, n in lengths.items() if n > LONGEST}


def test_one_word_names_an_op_everywhere():
    for room in ROOMS:
        assert (ROOT / f"tests/ops/test_{room}.py").exists(), room
        assert room in exported(f"mirasol_kernels.{room}"), room
    listed = re.search(r"^set\(OPS ([^)]*)\)", (ROOT / "CMakeLists.txt").read_text(), re.M).group(1).split()
    assert sorted(listed) == sorted(p.parent.name for p in ROOT.glob("csrc/*/kernel.h"))
    assert set(listed) <= ROOMS
