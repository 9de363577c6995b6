"""The files of benchmarks/results, sorted by what they measured; of what was measured twice, the newest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import harness, headline

FOLDER = harness.ROOT / "benchmarks" / "results"
NAME = re.compile(r"(?P<machine>.+)-(?P<date>\d{4}-\d\d-\d\d)-(?P<what>.+)")
Report = dict[str, Any]


class Group(NamedTuple):
    """Of one machine and one day: all about one op in one dtype, or one sweep of the model, or one other table."""

    kind: str  # "op", "sweep", "parts" or "other"
    what: str  # the op and the stage of a check, the task of the model, or the name of the other table
    dtype: str
    machine: str  # as files are named
    date: str
    files: tuple[str, ...]
    report: Report  # rows, notes and memory of all files together; everything else is of the first

    @property
    def slug(self) -> str:
        words = f"{self.machine}-{self.what}-{self.dtype}"
        return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def parts(report: Report) -> Iterator[tuple[str, Report]]:
    """-> name, report: itself, or what each stage of a `gpu_check` measured."""
    if "stages" not in report:
        yield "", report
        return
    for stage in report["stages"]:
        if stage["result"] and ("rows" in stage["result"] or "steps" in stage["result"]):
            yield stage["name"], stage["result"]


def kinds(what: str, stage: str, report: Report) -> Iterator[tuple[str, str, str, Report]]:
    """-> kind, what, dtype, the report with its rows of that dtype."""
    if "op" in report:
        for dtype in dict.fromkeys(row["dtype"] for row in report["rows"]):
            mine = {key: [x for x in report[key] if x["dtype"] == dtype] for key in ("rows", "notes", "memory")}
            # What ran in different stages was not interleaved: it is not compared.
            # Nor is what ran with fewer instructions than the machine has.
            forced = report.get("forced", {}).get("MIRASOL_ISA")
            yield "op", ", ".join(filter(None, (report["op"], stage, forced))), dtype, report | mine
    elif "train" in report:
        task = "training step" if report["train"] else "forward pass"
        snippet = next((row["snippet"] for row in report["rows"] if "snippet" in row), 8)
        size = ", long clips" if headline.long_clips(report) else ""
        name = f"{report['preset']}{size}, {task}, snippets of {snippet}, {' and '.join(report['combiners'])}"
        yield "sweep", name, report.get("dtype", "float32"), report
    elif isinstance(report.get("steps"), list):
        yield "parts", f"{report['preset']}, training step by parts", report["dtype"], report
    else:  # a row per measurement, or one for all
        rows = report.get("rows") or [{key: x for key, x in report.items() if key not in ("machine", "ceilings")}]
        yield "other", what, "", report | {"rows": rows, "machine": report.get("machine", {})}


def groups(folder: Path = FOLDER) -> list[Group]:
    found: dict[tuple[str, ...], Group] = {}
    for path in sorted(folder.glob("*.json")):
        named = NAME.fullmatch(path.stem)
        if named is None:
            raise ValueError(f"{path.name}: expected a name like <machine>-<year>-<month>-<day>-<what>.json")
        for stage, part in parts(json.loads(path.read_text())):
            for kind, what, dtype, report in kinds(stage or named["what"], stage, part):
                group = Group(kind, what, dtype, named["machine"], named["date"], (path.name,), report)
                key = group[:4]
                before = found.get(key)
                if before is None or before.date < group.date:
                    found[key] = group
                elif before.date == group.date:
                    found[key] = joined(before, group)
    return list(found.values())


def joined(one: Group, other: Group) -> Group:
    """Both; of a call or a size that both have, the later file's: times of two runs are not compared."""
    of = {"op": ("case", "direction"), "sweep": ("combiner", "frames"), "parts": ("combiner", "frames")}.get(one.kind)

    def key(row: Any) -> tuple | None:
        return tuple(row.get(name) for name in of) if of is not None and isinstance(row, dict) else None

    again = {key(row) for name in ("rows", "steps") for row in other.report.get(name, ())} - {None}
    lists = {}
    for name, value in one.report.items():
        if isinstance(value, list):
            later = other.report.get(name, [])
            lists[name] = [row for row in value if key(row) not in again and row not in later] + later
    return one._replace(files=tuple(dict.fromkeys(one.files + other.files)), report=one.report | lists)
