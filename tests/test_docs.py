"""The site: its code runs and says the truth, it builds without a warning, and it asks nothing of any other host."""

from __future__ import annotations

import ast
import builtins
import re
import subprocess
import sys
import types
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from tests.numerics import assert_within_budget

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for path in (ROOT / "docs").glob("*.md") if "```python" in path.read_text())


class BlockDiagonalMask(list):
    """What the page says of xformers, which runs on GPUs only: a token sees those of its own sequence."""

    from_seqlens = classmethod(lambda cls, lengths: cls(lengths))


def memory_efficient_attention(q, k, v, attn_bias):
    owner = torch.arange(len(attn_bias)).repeat_interleave(torch.tensor(attn_bias))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return sdpa(q, k, v, attn_mask=owner[:, None] == owner).transpose(1, 2)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> None:
    ops, biases = types.ModuleType("xformers.ops"), types.ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention, biases.BlockDiagonalMask = memory_efficient_attention, BlockDiagonalMask
    for name in ("xformers", "xformers.ops.fmha"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha.attn_bias", biases)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code(page: Path, xformers: None) -> None:
    """A page is one program; wherever it has both a `before` and an `after`, they are the same to rounding."""
    names: dict[str, object] = {}
    compared = 0
    for block in re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.M | re.S):
        exec(compile(block, f"<{page.stem}>", "exec"), names)
        before, after = names.get("before"), names.get("after")
        if isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor):
            assert_within_budget(after, before, before.double())
            del names["before"], names["after"]
            compared += 1
    assert "before" not in names and compared == page.read_text().count("before = ")


def test_code_that_needs_more_than_a_test_has() -> None:
    """Published weights, many GPUs: such blocks are fenced as `py`; what they import of ours is there, and every name
    that they read they have bound."""
    found = 0
    for page in (ROOT / "docs").glob("*.md"):
        bound = set(dir(builtins))
        for block in re.findall(r"^```py\n(.*?)^```$", page.read_text(), re.M | re.S):
            nodes = list(ast.walk(ast.parse(block)))
            bound |= {(node.asname or node.name).split(".")[0] for node in nodes if isinstance(node, ast.alias)}
            bound |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
            bound |= {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
            bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            assert {node.id for node in nodes if isinstance(node, ast.Name)} <= bound, page.name
            for line in re.findall(r"^from mirasol_.*$", block, re.M):
                exec(line, {})
                found += 1
    assert found >= 4


# -------------------------------------------------------------------- the site


class Page(HTMLParser):
    """What a page shows, what it links to, what it loads."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.names: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.names.add(given.get("id", ""))
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "preload", "preconnect", "icon"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {path: Page(path) for path in out.rglob("*.html")}


@pytest.mark.slow
def test_no_link_is_broken(site: dict[Path, Page]) -> None:
    checked = 0
    for path, page in site.items():
        if path.name == "404.html":  # its links are those of a site at a root
            continue
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                continue
            target, _, anchor = link.partition("#")
            found = (path.parent / target).resolve() if target else path
            found = found / "index.html" if found.is_dir() else found
            assert found.exists(), f"{path.name}: {link}"
            assert not anchor or found not in site or anchor in site[found].names, f"{path.name}: {link}"
            checked += 1
    assert checked > 200


@pytest.mark.slow
def test_nothing_is_loaded_from_elsewhere(site: dict[Path, Page]) -> None:
    for path, page in site.items():
        assert not [load for load in page.loads if re.match(r"(https?:)?//", load)], path.name
    styles = [path.read_text() for path in next(iter(site)).parents[0].rglob("*.css")]
    assert not any(re.search(r"url\(['\"]?https?:", text) for text in styles)


@pytest.mark.slow
def test_what_is_on_it(site: dict[Path, Page]) -> None:
    """Every public name in the reference, every op's mathematics, and the masks."""
    import mirasol_kernels
    import mirasol_model

    by_page = {path.stem: path.read_text() for path in site}
    anchors = {name for page in site.values() for name in page.names}
    for name in (*mirasol_kernels.__all__, *mirasol_model.__all__, "Stream", "read_clip", "TrainConfig"):
        assert any(anchor.endswith(f".{name}") for anchor in anchors), name
    assert all(path.parent.name in by_page for path in (ROOT / "mirasol_kernels").glob("*/api.py"))
    assert by_page["masks"].count("<svg") >= 12
