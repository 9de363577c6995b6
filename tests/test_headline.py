"""Targets of the sweep: met, missed, within the spread, not measured."""

from __future__ import annotations

from benchmarks import headline
from benchmarks.headline import Target


def row(backend, seconds, step=1e9, spread=0.0, **more):
    return {
        "backend": backend, "seconds": seconds, "seconds_low": seconds - spread, "seconds_high": seconds + spread,
        "step_bytes": step, "peak_bytes": step + 1e9, "frames": 512, "combiner": "all", "snippet": 8, **more,
    }  # fmt: skip


def met(target, *rows):
    return headline.verdict(rows, target)[1]


def test_verdicts():
    ours, asked = row("native", 1.0, 1e9, limit=4.0), Target(2.0, 1.5, 1 / 3)
    eager, compiled = row("reference", 2.0, 3e9), row("compiled", 1.5)
    cells, said = headline.verdict([ours, eager, compiled], asked)
    assert said == "yes" and cells == ["2.00", "2", "4.00", "1.50", "1.5", "0.33", "0.33", "0.50"]
    assert met(asked, ours, row("reference", 1.9, 3e9), row("compiled", 1.4)) == "no: eager, compiled"
    assert met(asked, ours, row("reference", 2.0, 2e9), compiled) == "no: memory"
    assert met(asked, ours, row("reference", 1.9, 3e9, spread=0.2), compiled) == "no: eager (within the spread)"
    assert met(asked, ours, eager) == "not measured: compiled"
    assert met(asked) == "not measured: eager, compiled, memory"
    assert met(Target(1.0), ours, row("reference", 1.0)) == "yes"  # of memory nothing is asked
    spread = row("reference", 2.0, 2e9) | {"step_bytes_high": 4e9}
    assert met(asked, ours, spread, compiled) == "no: memory (within the spread)"
    again = row("native, recomputing", 0.5, 5e8)
    assert met(asked._replace(recomputing=True), again, eager, compiled) == "yes"


def test_every_target_has_a_line_and_the_last_report_counts():
    def report(train, *rows, preset="small"):
        return {"machine": {}, "preset": preset, "dtype": "float32", "train": train, "rows": list(rows)}

    old, new = report(True, row("native", 9.0), row("reference", 9.0)), report(True, row("native", 1.0))
    lines = headline.judged([old, new, report(True, row("native", 5.0), preset="base")], gpu=False)
    assert len(lines) == 2 * 2 * 5 + 1 and all(len(line) == len(headline.HEAD) for line in lines)
    assert lines[0][0] == "512 frames, training step, `all`" and lines[0][1] == ""  # measured anew, alone
    assert headline.judged([old], gpu=False)[0][1] == "1.00"
    assert [line[0] for line in headline.judged([], gpu=True)] == [
        "512 frames, training step, `all`", "512 frames, forward pass, `all`",
    ]  # fmt: skip
    assert not headline.concerned(report(True, row("native", 1.0, snippet=32)))
    assert not headline.concerned(report(True, row("native", 1.0, frames=1024)))
    assert headline.concerned(report(True, row("native", 1.0, frames=64))) and headline.concerned(report(True))


def test_what_a_terminal_gets():
    report = {"machine": {"gpu": "x"}, "preset": "base", "dtype": "bfloat16", "train": False}
    report["rows"] = [row("triton", 1.0, limit=3.0), row("reference", 2.5), row("compiled", 1.2)]
    assert headline.said(report) == (
        "512 frames, forward pass, all: 2.50 times eager (target 2, limit 3.00), 1.20 times compiled (target 1.3), "
        "1.00 of its memory, the process 1.00. Met: no: compiled"
    )
    assert headline.said(report | {"preset": "tiny"}) == ""
