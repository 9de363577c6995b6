"""Rows of `benchmarks.contest` as text, and what they come to."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.cases import NAMES
from benchmarks.harness import threads

Row = dict[str, Any]
Lines = list[str]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> Lines:
    """left: columns of words, the rest are of numbers."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return [re.sub(r"\| +(?=\|)", "| ", f"| {' | '.join(cells)} |") for cells in (head, rule, *rows)]


def number(x: float) -> str:
    """Three digits, or all before the point."""
    if x == 0 or x >= 99.95:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 9.995 else f"{x:.2f}" if x >= 0.0995 else f"{x:.2g}"


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def groups(rows: Sequence[Row], *keys: str) -> Iterator[tuple[tuple, list[Row]]]:
    """Rows alike in `keys`, in order of appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    yield from found.items()


def spread(numbers: dict[str, float]) -> dict[str, Any]:
    """Ratios by case -> their geometric mean, the least, and whose that is."""
    worst = min(numbers, key=numbers.__getitem__)
    return {"mean": geometric_mean(list(numbers.values())), "least": numbers[worst], "least_case": worst}


def summarise(rows: Sequence[Row]) -> list[Row]:
    """Per kind of case, dtype and direction and for each of ours: how many times as fast as the best peer of each case,
    and as each peer where both ran."""
    found = []
    for (kind, dtype, direction), alike in groups(rows, "kind", "dtype", "direction"):
        seconds = {(row["case"], row["candidate"]): row["seconds"] for row in alike}
        peers = list(dict.fromkeys(row["candidate"] for row in alike if not row["ours"]))
        for name in dict.fromkeys(row["candidate"] for row in alike if row["ours"]):
            mine = {row["case"]: row for row in alike if row["candidate"] == name}
            others = list(dict.fromkeys(row["candidate"] for row in alike if row["candidate"] != name))
            ratios = {
                other: {
                    case: seconds[case, other] / row["seconds"]
                    for case, row in mine.items()
                    if (case, other) in seconds
                }
                for other in others
            }
            rivals = {case: {p: ratios[p][case] for p in peers if case in ratios[p]} for case in mine}
            best = {case: min(those, key=those.__getitem__) for case, those in rivals.items() if those}
            found.append(
                {
                    "kind": kind,
                    "dtype": dtype,
                    "direction": direction,
                    "ours": name,
                    "cases": len(mine),
                    "best": best,
                    "of_best": spread({case: ratios[peer][case] for case, peer in best.items()}) if best else None,
                    "of_each": {other: spread(those) for other, those in ratios.items() if those},
                    "of_floor": [min(r["of_floor"] for r in mine.values()), max(r["of_floor"] for r in mine.values())],
                }
            )
    return found


def introduction(report: Row) -> str:
    machine, limits = report["machine"], report["ceilings"]
    where = f"{machine.get('gpu', machine['cpu'])}, {threads(machine)}, torch {machine['isa']}"
    gemm = ", ".join(f"{name} {rate / 1e9:,.0f} Gflop/s" for name, rate in limits.items() if name != "copy")
    return "\n".join(
        (
            f"{report['op']} against everybody who can do it, on {where}, ours {report['kernels']}",
            f"torch {machine['torch']}; {gemm}, copy {limits['copy'] / 1e9:,.0f} GB/s",
            "medians of interleaved rounds; Gflop/s of useful work; floor: the least time at these rates;",
            "error: largest difference from float64 over results and gradients, relative to the largest value",
        )
    )


def block(case: Any, rows: Sequence[Row], notes: Sequence[Row], direction: str, dtype: str) -> str:
    """One case, dtype and direction."""
    work = case.flops(direction) / 1e9
    lines = [
        f"{case.name}, {dtype}, {NAMES[direction]}: {case.who}, {case}, {work:,.3g} Gflop",
        f"  {'':<20} {'ms':>9} {'10 .. 90 %':>19} {'rounds':>6} {'Gflop/s':>9} {'of floor':>8} {'ratio':>7} "
        f"{'error':>8}",
    ]
    first = next((row for row in rows if row["ours"]), None)
    for row in rows:
        low_high = f"{row['seconds_low'] * 1e3:,.2f} .. {row['seconds_high'] * 1e3:,.2f}"
        ratio = f"{row['seconds'] / first['seconds']:.2f}x" if first and row is not first else ""
        lines.append(
            f"  {row['candidate']:<20} {row['seconds'] * 1e3:>9,.2f} {low_high:>19} {row['rounds']:>6} "
            f"{row['flops_per_second'] / 1e9:>9,.1f} {row['of_floor']:>8.0%} {ratio:>7} "
            f"{max(row['errors'].values()):>8.1e}"
            + (f"  {row['graph_seconds'] * 1e3:,.3f} ms in a CUDA graph" if "graph_seconds" in row else "")
        )
    lines += [f"  {note['name']:<20} {note['reason']}" for note in notes]
    if rows and not rows[0]["checked"].startswith("all "):
        lines.append(f"  float64 on {rows[0]['checked']}")
    return "\n".join(lines) + "\n"


def summary(report: Row) -> str:
    lines = []
    for found in report["summary"]:
        if found["ours"] == "against":  # it stands among those that native is compared with
            continue
        what = f"{found['kind']}, {found['dtype']}, {NAMES[found['direction']]}: {found['ours']}"
        low, high = found["of_floor"]
        lines.append(f"{what}, {low:.0%} to {high:.0%} of the floor")
        if found["of_best"]:
            counts = Counter(found["best"].values()).most_common()
            those = f"best peer ({', '.join(f'{name} {count}' for name, count in counts)})"
            lines.append(_against(those, found["of_best"]))
        lines += [_against(name, ratio) for name, ratio in found["of_each"].items()]
    for (case, dtype, direction), rows in groups(report["memory"], "case", "dtype", "direction"):
        lines.append(f"memory of a call and of what it keeps prepared, {case}, {dtype}, {NAMES[direction]}:")
        lines += [f"  {row['candidate']:<20} {row['bytes'] / 1e6:>8,.0f} MB" for row in rows]
    return "\n".join(lines)


def _against(name: str, ratio: Row) -> str:
    return f"  {ratio['mean']:>6.2f}x {name}, at least {ratio['least']:.2f}x ({ratio['least_case']})"
