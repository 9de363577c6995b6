"""Results as text and pictures: docs/results.md with all of them, and the tables of README.md between its markers.

python -m benchmarks.report [--check]      --check writes nothing and fails where a text would change

README.md has `<!-- report:NAME -->` and `<!-- /report -->`; what stands between them is made here, for each NAME of
`SECTIONS`, from the newest results. Nothing in a table is typed by hand, and who loses is shown as who wins.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import harness, headline, tables
from benchmarks.cases import DIRECTIONS, NAMES
from benchmarks.report_model import headline_table, parts_tables, sweep_table
from benchmarks.results import FOLDER, Group, Report, groups
from benchmarks.tables import Lines, number, table

DOCS = harness.ROOT / "docs"
README = harness.ROOT / "README.md"
MARKED = re.compile(r"(<!-- report:(\w+) -->\n).*?(<!-- /report -->)", re.S)


def files_of(group: Group) -> str:
    return ", ".join(f"`benchmarks/results/{name}`" for name in group.files)


def where(report: Report) -> str:
    machine = report["machine"]
    if not machine:
        return "a machine that its file does not name"
    chip = machine.get("gpu") or f"{machine['cpu']}, {machine['isa']}, {harness.threads(machine)}"
    return f"{chip}, torch {machine['torch']}" + (f", Triton {machine['triton']}" if machine.get("gpu") else "")


# ------------------------------------------------------------------------------------------------------------ ops


def label(op: str, case: str) -> str:
    """Who has this shape, and the shape."""
    found = cases_of(op).get(case)
    if found is None:  # there was such a case when this was measured
        return case
    return re.sub(r": \d+ queries x \d+ keys, [\d.]+% seen", "", f"{found.who}, {found}")


def cases_of(op: str) -> dict[str, Any]:
    from benchmarks.run import suite

    return suite(op)[1]


def calls(report: Report) -> dict[str, dict[str, dict[str, Any]]]:
    """case -> direction -> candidate -> row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(row["case"], {}).setdefault(row["direction"], {})[row["candidate"]] = row
    return found


def ours_of(rows: dict[str, Any]) -> Any:
    return next((row for row in rows.values() if row["ours"]), None)


def ratios(rows: dict[str, Any]) -> dict[str, float]:
    """Peer -> how many times as long as ours it takes, the fastest first."""
    ours = ours_of(rows)
    found = {name: row["seconds"] / ours["seconds"] for name, row in rows.items() if not row["ours"]} if ours else {}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def op_table(group: Group, each: bool = False) -> Lines:
    """Milliseconds of ours, its share of the floor, and how many times as long the best peer takes, or each."""
    found, shown = calls(group.report), list(DIRECTIONS)
    peers = {
        direction: list(dict.fromkeys(peer for by in found.values() for peer in ratios(by.get(direction, {}))))
        for direction in shown
    }
    head = [""]
    for direction in shown:
        head += [f"{NAMES[direction]}, ms", "of floor", *(peers[direction] if each else ["best peer"])]
    rows: list[list[str]] = []
    means: dict[tuple[str, str, str], list[float]] = {}
    for case, by in found.items():
        cells = [label(group.report["op"], case)]
        for direction in shown:
            mine = by.get(direction, {})
            ours, against = ours_of(mine), ratios(mine)
            cells += [number(ours["seconds"] * 1e3), f"{ours['of_floor']:.0%}"] if ours else ["", ""]
            for name, ratio in against.items():
                means.setdefault((ours["kind"], direction, name), []).append(ratio)
            if against:
                means.setdefault((ours["kind"], direction, ""), []).append(next(iter(against.values())))
            best = [f"{ratio:.2f} {name}" for name, ratio in against.items()][:1] or [""]
            cells += [f"{against[peer]:.2f}" if peer in against else "" for peer in peers[direction]] if each else best
        rows.append(cells)
    for kind in dict.fromkeys(kind for kind, _, _ in means):
        cells = [f"geometric mean, {kind}"]
        for direction in shown:
            wanted = peers[direction] if each else [""]
            of = [means.get((kind, direction, name)) for name in wanted]
            cells += ["", "", *(f"**{tables.geometric_mean(x):.2f}**" if x else "" for x in of)]
        rows.append(cells)
    return table(head, rows)


def losses(group: Group) -> Lines:
    """Every call in which a peer is faster."""
    found = []
    for case, by in calls(group.report).items():
        for direction, rows in by.items():
            for name, ratio in ratios(rows).items():
                if ratio < 1:
                    found.append([label(group.report["op"], case), NAMES[direction], name, f"{ratio:.2f}"])
    if not found:
        return ["No peer is faster in any of these calls."]
    return ["Slower than a peer:", "", *table(["", "", "peer", "its time / ours"], found, 3)]


def everybody(group: Group) -> Lines:
    """Every time that was taken, with its spread and its error."""
    rows = []
    for row in group.report["rows"]:
        spread = f"{number(row['seconds_low'] * 1e3)} .. {number(row['seconds_high'] * 1e3)}"
        graph = number(row["graph_seconds"] * 1e3) if "graph_seconds" in row else ""
        rows.append(
            [label(group.report["op"], row["case"]), NAMES[row["direction"]], row["candidate"],
             number(row["seconds"] * 1e3), spread, graph, f"{row['of_floor']:.0%}",
             f"{max(row['errors'].values()):.1e}"]
        )  # fmt: skip
    head = ["", "", "who", "ms", "10 .. 90 %", "in a CUDA graph, ms", "of floor", "error"]
    if not any(cells[5] for cells in rows):
        head, rows = head[:5] + head[6:], [cells[:5] + cells[6:] for cells in rows]
    return table(head, rows, 3)


def absent(group: Group) -> Lines:
    """Who has no time, and why: each reason once."""
    reasons: dict[tuple[str, str], int] = {}
    for note in group.report["notes"]:
        key = note["name"], note["reason"]
        reasons[key] = reasons.get(key, 0) + 1
    return [f"- {name}: {reason} ({count} calls)" for (name, reason), count in reasons.items()]


def memory(group: Group) -> Lines:
    rows = [
        [
            label(group.report["op"], row["case"]),
            NAMES[row["direction"]],
            row["candidate"],
            f"{row['bytes'] / 1e6:,.0f}",
        ]
        for row in group.report["memory"]
    ]
    return table(["", "", "who", "MB of a call and what it keeps prepared"], rows, 3) if rows else []


# --------------------------------------------------------------------------------------------------------- others


def other_table(group: Group) -> Lines:
    """Whatever a file holds: a column per key, numbers as they are."""
    flat = [dict(flattened(row)) for row in group.report["rows"]]
    head = list(dict.fromkeys(key for row in flat for key in row))
    rows = [[cell(row.get(key)) for key in head] for row in flat]
    words = 0
    while words < len(head) and not any(isinstance(row.get(head[words]), int | float) for row in flat):
        words += 1
    return table(head, rows, words)


def flattened(row: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, dict):
            yield from flattened(value, f"{prefix}{key} ")
        else:
            yield f"{prefix}{key}", value


def cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return f"{len(value)} values"
    return (
        f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "" if value is None else str(value)
    )


# ---------------------------------------------------------------------------------------------------------- texts


def newest(found: Sequence[Group], kind: str, what: str, dtype: str, gpu: bool = False) -> Group:
    mine = [g for g in found if g.kind == kind and g.dtype == dtype and f"{g.what}, ".startswith(what and f"{what}, ")]
    mine = [g for g in mine if gpu == bool(g.report["machine"].get("gpu"))]
    if not mine:
        raise ValueError(
            f"report: benchmarks/results has nothing of {what!r} in {dtype} on a {'GPU' if gpu else 'CPU'}"
        )
    return max(mine, key=lambda g: (g.date, g.machine))


def op_section(op: str, found: Sequence[Group], each: bool = False) -> Lines:
    free = [group for group in found if not group.report.get("forced", {}).get("MIRASOL_ISA")]
    group = newest(free, "op", op, "float32")  # with all the instructions that the machine has
    said = (
        f"Float32, {where(group.report)}; milliseconds of ours, the share of this machine's floor, and how many times "
    )
    said += "as long each peer takes." if each else "as long the best peer takes."
    picture = f"![Time of each peer over ours](docs/{group.slug}.png)"
    return [said, f"From {files_of(group)}:", "", *op_table(group, each), "", *losses(group), "", picture]


def sweep_section(found: Sequence[Group]) -> Lines:
    group = newest(found, "sweep", "small, forward pass, snippets of 8, all", "float32")
    report, picture = group.report, f"![Time and peak memory over frames](docs/{group.slug}.png)"
    said = f"`{report['clip']}`, batch 1, float32, {where(report)}. From {files_of(group)}:"
    return [said, "", *sweep_table(group), "", picture]


def headline_section(found: Sequence[Group]) -> Lines:
    """Of the machine whose sweeps are the newest."""
    sweeps = [group for group in found if group.kind == "sweep" and headline.concerned(group.report)]
    machine = newest(sweeps, "sweep", "small", "float32").machine
    return headline_table([group for group in sweeps if group.machine == machine])


def parts_section(found: Sequence[Group]) -> Lines:
    group = newest(found, "parts", "", "float32")
    return [f"{where(group.report)}. From {files_of(group)}:", "", *parts_tables(group)]


SECTIONS: dict[str, Callable[[Sequence[Group]], Lines]] = {
    "sweep": sweep_section,
    "attention": partial(op_section, "block_causal_attention"),
    "token_learner": partial(op_section, "token_learner"),
    "recurrence": partial(op_section, "latent_recurrence", each=True),
    "headline": headline_section,
    "parts": parts_section,
}


def readme(text: str, found: Sequence[Group]) -> str:
    """The text with its marked sections made anew."""

    def made(match: re.Match) -> str:
        if match[2] not in SECTIONS:
            raise ValueError(f"README.md: report:{match[2]}: expected one of {', '.join(SECTIONS)}")
        return match[1] + "\n".join(SECTIONS[match[2]](found)) + "\n" + match[3]

    return MARKED.sub(made, text)


INTRODUCTION = """# Results

Made by `python -m benchmarks.report` from `benchmarks/results/`; of what was measured twice on a machine, the newest.
Times are medians of interleaved rounds, ratios are a peer's time over ours (below 1 the peer is faster), "of floor" is
the least time that this machine's own GEMM and copy rates allow over the time taken, and an error is the largest
difference from float64, relative to the largest value.
"""


def document(found: Sequence[Group]) -> str:
    lines = [INTRODUCTION]
    for group in sorted(
        found, key=lambda g: (("op", "sweep", "parts", "other").index(g.kind), g.what, g.machine, g.dtype)
    ):
        report, machine = group.report, group.report["machine"]
        commit = f"commit {machine['commit'][:10]}" if machine.get("commit") else "no commit known"
        facts = [where(report), group.date, commit + (", changed" if machine.get("dirty") else ""), files_of(group)]
        lines += [f"## {group.what}{', ' if group.dtype else ''}{group.dtype}, {group.machine}", "", "; ".join(facts)]
        if limits := report.get("ceilings"):
            gemm = [f"{name} {rate / 1e9:,.0f} Gflop/s" for name, rate in limits.items() if name != "copy"]
            lines.append(f"This machine: {', '.join(gemm)}, copy {limits['copy'] / 1e9:,.0f} GB/s")
        lines.append("")
        if group.kind == "op":
            for part in (op_table(group), losses(group), absent(group), everybody(group), memory(group)):
                lines += [*part, ""] if part else []
            lines += [f"![Time of each peer over ours]({group.slug}.png)", ""]
        elif group.kind == "sweep":
            lines += [*sweep_table(group), "", *(f"- {note}" for note in report["notes"]), ""]
            lines += [f"![Time and peak memory over frames]({group.slug}.png)", ""]
        elif group.kind == "parts":
            lines += [*parts_tables(group), ""]
        else:
            lines += [*other_table(group), ""]
    for machine in sorted({group.machine for group in found if group.kind == "sweep"}):
        mine = [group for group in found if group.kind == "sweep" and group.machine == machine]
        if verdicts := headline_table(mine):
            lines += [f"## What the sweep has to show, {machine}", "", *verdicts, ""]
    for slug, name in rooflines(found):
        lines += [f"## Every kernel under the roof of {name}", "", f"![Roofline]({slug}.png)", ""]
    return "\n".join(lines).rstrip() + "\n"


def rooflines(found: Sequence[Group]) -> list[tuple[str, str]]:
    """-> name of the picture, machine: one for each that ran an op."""
    return [(f"{machine}-roofline", machine) for machine in sorted({g.machine for g in found if g.kind == "op"})]


def draw(found: Sequence[Group], docs: Path) -> None:
    from benchmarks import plot

    for group in found:
        if group.kind == "op":
            plot.draw_ratios(group.report, docs / f"{group.slug}.png")
        elif group.kind == "sweep" and group.report["rows"]:
            plot.draw(group.report, docs / f"{group.slug}.png")
    for slug, machine in rooflines(found):
        mine = [group for group in found if group.kind == "op" and group.machine == machine]
        plot.draw_roofline([(group.report, cases_of(group.report["op"])) for group in mine], docs / f"{slug}.png")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a text would change")
    options = parser.parse_args(arguments)
    try:
        found = groups(FOLDER)
        texts = {README: readme(README.read_text(), found), DOCS / "results.md": document(found)}
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if options.check:
        for path in stale:
            print(f"{path.name} is not what python -m benchmarks.report writes", file=sys.stderr)
        return int(bool(stale))
    draw(found, DOCS)
    for path, text in texts.items():
        path.write_text(text)
    print(f"wrote {', '.join(path.name for path in texts)} and their pictures in {DOCS.name}/")
    return 0


if __name__ == "__main__":
    sys.exit(main())
