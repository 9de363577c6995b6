"""The whole model's measurements as text: the sweep, what it has to show, and a step part by part."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks import headline, parts
from benchmarks.results import Group
from benchmarks.tables import Lines, number, table
from benchmarks.whole import in_order


def sweep_table(group: Group) -> Lines:
    head = ["frames", "Combiner", "who", "ms", "10 .. 90 %", "frames/s", "times the reference", "limit of our ops",
            "peak MB", "step MB", "joule", "error"]  # fmt: skip
    rows, found = [], in_order(group.report["rows"])
    reference = {(r["frames"], r["combiner"]): r["seconds"] for r in found if r["backend"] == "reference"}
    for row in found:
        base = reference.get((row["frames"], row["combiner"]))
        rows.append(
            [f"{row['frames']:,}", row["combiner"], row["backend"], number(row["seconds"] * 1e3),
             f"{number(row['seconds_low'] * 1e3)} .. {number(row['seconds_high'] * 1e3)}",
             number(row["frames_per_second"]), f"{base / row['seconds']:.2f}" if base else "",
             f"{row['limit']:.2f}" if row.get("limit") else "", f"{row['peak_bytes'] / 1e6:,.0f}",
             f"{row['step_bytes'] / 1e6:,.0f}", number(row["joules"]) if row.get("joules") else "",
             "" if row["error"] is None else f"{row['error']:.1e}"]
        )  # fmt: skip
    kept = [i for i in range(len(head)) if any(cells[i] for cells in rows)]
    return table([head[i] for i in kept], [[cells[i] for i in kept] for cells in rows], 3)


def headline_table(sweeps: Sequence[Group]) -> Lines:
    """sweeps: of one machine. Nothing where no target is for what they measured."""
    reports = [group.report for group in sorted(sweeps, key=lambda group: group.date)]
    if not any(map(headline.concerned, reports)):
        return []
    lines = headline.judged(reports, bool(reports[0]["machine"].get("gpu")))
    met = sum(line[-1] == "yes" for line in lines)
    files = sorted({f"`{name}`" for group in sweeps if headline.concerned(group.report) for name in group.files})
    said = f"{met} of {len(lines)} lines met; below 1 the reference is faster. From {', '.join(files)}:"
    rows = [[line[0], line[-1], *line[1:-1]] for line in lines]  # words to the left
    return [said, "", *table([headline.HEAD[0], headline.HEAD[-1], *headline.HEAD[1:-1]], rows, 2)]


def parts_tables(group: Group) -> Lines:
    lines: Lines = []
    for step in group.report["steps"]:
        what = (
            f"{group.report['preset']}, {step['frames']} frames, Combiner `{step['combiner']}`, {group.report['dtype']}"
        )
        times = f"{number(step['seconds'] * 1e3)} ms a step, {number(step['without_stamps'] * 1e3)} without stamps"
        lines += [f"{what}: {times}; {parts.next_factor(step['rows'])}.", ""]
        lines += [*table(parts.HEAD, list(parts.cells(step["rows"]))), ""]
    return lines[:-1]
