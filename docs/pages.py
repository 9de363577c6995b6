"""What the site is made of beside docs/*.md: hooks of mkdocs, and an extension of mkdocstrings.

Pages whose source is elsewhere are made at build time, so that nothing is written twice: README.md and NOTES.md, the
README of every op, and the pictures of masks, drawn from the layouts themselves.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from mirasol_kernels import SnippetLayout
from mirasol_kernels.integrations.video_diffusion import chunk_causal, teacher_forcing, text_per_chunk

ROOT = Path(__file__).parents[1]
PAGES = {"index.md": "README.md", "notes.md": "NOTES.md", "contributing.md": "CONTRIBUTING.md"}
LINKS = {source: page for page, source in PAGES.items()}

# Layouts small enough to see every snippet, and what they are for.
MASKS = {
    "Snippets": [
        ("SnippetLayout.uniform(6, 4)", "Block-causal: a snippet sees itself and all before it."),
        ("SnippetLayout.uniform(12, 2, window=3, sink=1)", "The last three snippets, and the first."),
        ("SnippetLayout.uniform(6, 4, q_tokens=1)", "Only the last token of each snippet asks."),
        ("SnippetLayout.ragged([5, 1, 9, 3, 6])", "Snippets of any length."),
    ],
    "Training": [
        ("SnippetLayout.teacher_forcing([4] * 4)", "[clean | noisy]: noisy sees earlier clean snippets and itself."),
        (
            "SnippetLayout.packed([SnippetLayout.uniform(3, 4), SnippetLayout.uniform(2, 5)])",
            "Two videos in one sequence.",
        ),
        (
            "SnippetLayout.from_block_ids([-1, -1, 0, 0, 0, 0, -1, -1, -1, 1, 1, 1, 1, -1, -1])",
            "Text and images: causal, or of one image.",
        ),
        (
            "SnippetLayout.cross([4, 4, 4], [6, 3, 5], upto=[1, 2, 3])",
            "Cross-attention: queries of a snippet see the keys of theirs and of earlier ones.",
        ),
    ],
    "Causal video diffusion": [
        ("chunk_causal(13, 2, 4, independent_first_frame=True)", "The first frame alone, then chunks of four."),
        ("chunk_causal(12, 2, 3, local_attn_size=7, sink_size=1)", "Seven frames, one of them the sink."),
        ("teacher_forcing(9, 2, 3, local_attn_size=7, sink_size=1)", "The same for [clean | noisy]."),
        ("text_per_chunk([6, 6, 6], [5, 4], prompts=[0, 0, 1])", "Text: the third chunk is under another prompt."),
    ],
}
NAMES = {
    "SnippetLayout": SnippetLayout,
    "chunk_causal": chunk_causal,
    "teacher_forcing": teacher_forcing,
    "text_per_chunk": text_per_chunk,
}
LIST_ITEM = re.compile(r"(?:[a-z_]\w*(?:, )?)+(?: \([^)]*\))?: ")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    if (ROOT / "docs" / "results.md").exists():  # written by `python -m benchmarks.report`
        config.nav.insert(-2, {"Results": "results.md"})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    made = {page: relinked((ROOT / source).read_text()) for page, source in PAGES.items()}
    for room in sorted((ROOT / "mirasol_kernels").glob("*/api.py")):
        made[f"ops/{room.parent.name}.md"] = (room.parent / "README.md").read_text()
    made["masks.md"] = masks()
    for page, content in made.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lists and tables may follow a paragraph at once on GitHub; here they want an empty line before."""
    lines: list[str] = []
    code = False
    for line in markdown.splitlines():
        begins = re.match(r"\||- |\d+\. ", line)
        if begins and not code and lines and lines[-1].strip() and not re.match(r"\||- |\d+\. | ", lines[-1]):
            lines.append("")
        code ^= line.startswith("```")
        lines.append(line)
    return "\n".join(lines)


def relinked(text: str) -> str:
    """Links of a file at the root, as pages of the site have them; a file that is no page is only named."""

    def link(match: re.Match) -> str:
        label, target = match.groups()
        target = target.removeprefix("docs/")
        if target.startswith(("http", "#")) or (ROOT / "docs" / target).exists():
            return f"[{label}]({target})"
        return f"[{label}]({LINKS[target]})" if target in LINKS else label

    return re.sub(r"\[([^\]]*)\]\(([^)]*)\)", link, text)


def masks() -> str:
    text = (
        "# Masks\nQueries down, keys across. A layout is a table of a few ranges per snippet, never a mask; "
        "`layout.picture()` draws these in text.\n"
    )
    for title, layouts in MASKS.items():
        figures = [
            f"<figure>{drawn(eval(code, NAMES))}<figcaption>{meaning}</figcaption></figure>"
            for code, meaning in layouts
        ]
        text += f'\n## {title}\n<div class="masks">\n{"".join(figures)}\n</div>\n\n```python\n'
        text += "\n".join(code for code, _ in layouts) + "\n```\n"
    return text


def drawn(layout: SnippetLayout) -> str:
    """An SVG: one rectangle per group of rows and range of keys."""
    tables, parts = layout.tables(), []
    for offsets, groups in zip(tables.q_offsets.tolist(), tables.k_ranges.tolist(), strict=True):
        for begin, end, ranges in zip(offsets, offsets[1:], groups, strict=False):
            parts += [
                f'<rect x="{i}" y="{begin}" width="{j - i}" height="{end - begin}"/>'
                for i, j in ranges
                if begin < end and i < j
            ]
    size = f"{layout.k_len} {layout.q_len}"
    frame = f'<rect class="frame" width="{layout.k_len}" height="{layout.q_len}"/>'
    return f'<svg class="mask" viewBox="0 0 {size}" role="img">{frame}{"".join(parts)}</svg>'


class Arguments(griffe.Extension):
    """Paragraphs of our docstrings that begin with `name: ` are list items on the page."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value)


def listed(text: str) -> str:
    """`name: meaning` at the head of a line becomes an item; what continues it is indented."""
    lines, inside = [], False
    for line in text.splitlines():
        if LIST_ITEM.match(line):
            names, meaning = line.split(": ", 1)
            lines += [*([] if inside else [""]), f"- `{names}`: {meaning}"]
            inside = True
        else:
            inside = inside and bool(line.strip())
            lines.append(f"    {line}" if inside else line)
    return "\n".join(lines)
