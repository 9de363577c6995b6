"""What the sweep has to show, and whether it does: ours against the same model on the references."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from benchmarks.whole import AUTOMATIC, COMBINERS, COMPILED, RECOMPUTING

Row = dict[str, Any]
OURS = ("native", "triton", AUTOMATIC)
HEAD = ("", "times eager", "at least", "limit of our ops", "times compiled", "at least", "memory of the step / eager's",
        "at most", "memory of the process / eager's", "met")  # fmt: skip


class Target(NamedTuple):
    """None: nothing is asked."""

    eager: float
    compiled: float | None = None
    memory: float | None = None  # what a step adds to a process, as a share of what the reference's step adds
    recomputing: bool = False  # ours with recompute="snippet", the reference as it is


def targets(gpu: bool) -> Iterator[tuple[int, bool, str, Target]]:
    """-> frames, whether a training step, Combiner, what is asked. On a CPU `small` in float32, on a GPU `base` in
    bfloat16, snippets of 8."""
    for train in (True, False):
        if gpu:
            yield 512, train, "all", Target(2.0, 1.3)
            continue
        for combiner in COMBINERS:
            yield 512, train, combiner, Target(2.0, 1.5, 1 / 3) if combiner == "all" else Target(1.0, memory=1.0)
            if train and combiner == "all":
                yield 512, train, combiner, Target(2.0, 1.5, 1 / 3, recomputing=True)
    for train in (True, False):
        for combiner in () if gpu else COMBINERS:
            yield 16, train, combiner, Target(1.0)


def concerned(report: Row) -> bool:
    """Whether there are targets for such a sweep."""
    what = ("base", "bfloat16") if report["machine"].get("gpu") else ("small", "float32")
    usual = all(row.get("snippet", 8) == 8 for row in report["rows"]) and not long_clips(report)
    return (report["preset"], report.get("dtype", "float32")) == what and usual


def long_clips(report: Row) -> bool:
    """Whether all that was measured is longer than what there are targets for."""
    return min((row["frames"] for row in report["rows"]), default=0) > 512


def verdict(rows: Sequence[Row], target: Target) -> tuple[list[str], str]:
    """rows: of one size, Combiner and task -> cells of `HEAD` without the first and the last; the last: whether it is
    met, and if not, in what."""
    by = {row["backend"]: row for row in rows}
    mine = [name + RECOMPUTING * target.recomputing for name in OURS]
    ours, eager, compiled = next((by[name] for name in mine if name in by), None), by.get("reference"), by.get(COMPILED)
    failed, unknown = [], []

    def faster(name: str, than: Row | None, least: float | None) -> list[str]:
        cells = ["", "" if least is None else f"{least:g}"]
        if ours is None or than is None:
            unknown.extend([name] * (least is not None))
            return cells
        ratio = than["seconds"] / ours["seconds"]
        if least is not None and ratio < least:
            within = than["seconds_high"] / ours["seconds_low"] >= least
            failed.append(f"{name} (within the spread)" if within else name)
        return [f"{ratio:.2f}", *cells[1:]]

    def share(key: str) -> float | None:
        return ours[key] / max(eager[key], 1) if ours is not None and eager is not None else None

    cells = faster("eager", eager, target.eager)
    cells.append(f"{ours['limit']:.2f}" if ours is not None and ours.get("limit") else "")
    cells += faster("compiled", compiled, target.compiled)
    step, process = share("step_bytes"), share("peak_bytes")
    if target.memory is not None:
        if ours is None or eager is None:
            unknown.append("memory")
        elif ours["step_bytes"] > target.memory * eager["step_bytes"]:
            within = ours["step_bytes"] <= target.memory * eager.get("step_bytes_high", 0)
            failed.append("memory (within the spread)" if within else "memory")
    most = "" if target.memory is None else f"{target.memory:.2g}"
    cells += ["" if step is None else f"{step:.2f}", most, "" if process is None else f"{process:.2f}"]
    said = [f"no: {', '.join(failed)}"] if failed else []
    said += [f"not measured: {', '.join(unknown)}"] if unknown else []
    return cells, "; ".join(said) or "yes"


def judged(reports: Sequence[Row], gpu: bool) -> list[list[str]]:
    """A line of `HEAD` for each target. reports: sweeps of one machine; of what several measured, the last counts."""
    measured: dict[tuple[int, bool, str], list[Row]] = {}
    for report in filter(concerned, reports):
        found: dict[tuple[int, bool, str], list[Row]] = {}
        for row in report["rows"]:
            found.setdefault((row["frames"], report["train"], row["combiner"]), []).append(row)
        measured |= found
    lines = []
    for frames, train, combiner, target in targets(gpu):
        cells, met = verdict(measured.get((frames, train, combiner), []), target)
        task = "training step" if train else "forward pass"
        lines.append([f"{frames} frames, {task}, `{combiner}`{RECOMPUTING * target.recomputing}", *cells, met])
    return lines


def said(report: Row) -> str:
    """For a terminal: the targets that this sweep has measured anything of."""
    if not concerned(report):
        return ""
    lines = []
    for what, eager, least, limit, compiled, of_compiled, step, most, process, met in judged(
        [report], bool(report["machine"].get("gpu"))
    ):
        if eager:
            parts = [f"{eager} times eager (target {least}" + (f", limit {limit})" if limit else ")")]
            parts += [f"{compiled} times compiled" + (f" (target {of_compiled})" if of_compiled else "")] * bool(
                compiled
            )
            parts.append(f"{step} of its memory" + (f" (target {most})" if most else "") + f", the process {process}")
            lines.append(f"{what.replace('`', '')}: {', '.join(parts)}. Met: {met}")
    return "\n".join(lines)
