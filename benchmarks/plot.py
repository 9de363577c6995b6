"""Pictures of measurements, drawn from their JSON alone; readable on light and on dark pages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.harness import threads

INK = "#7d8590"  # a grey with enough contrast on white and on black; so are the colours
COLOURS = {"native": "#2f81f7", "triton": "#2f81f7", "cuda": "#3fb950", "reference": "#db6d28"}
PAGE: dict[Any, Any] = dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
) | {
    "axes.spines.top": False,
    "axes.spines.right": False,
}
End = tuple[float, str, str, int]  # y, name, colour, x
STYLES = ("-", "--", ":", "-.", (0, (1, 3)))  # one per Combiner, in the order given


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels over the frames of a clip: time, and peak memory of a fresh process."""
    rows, machine = report["rows"], report["machine"]
    task = "training step" if report["train"] else "forward pass"
    combiners = ", ".join(dict.fromkeys(row["combiner"] for row in rows))
    where = f"{machine.get('gpu', machine['cpu'])} ({threads(machine)})"
    with plt.rc_context(PAGE):
        figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
        figure.suptitle(f"Mirasol {report['preset']}, Combiner {combiners}, {task}, batch 1, on {where}", fontsize=12)
        spread = ("seconds_low", "seconds_high")
        times = _panel(left, rows, "seconds", f"time of one {task} (s), shaded from 10 to 90 %", spread)
        peaks = _panel(right, rows, "peak_bytes", "peak memory of a fresh process (GB)", scale=1e-9)
        left.set_yscale("log")
        left.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        left.yaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
        left.minorticks_off()
        right.set_ylim(bottom=0)
        _label(left, times)
        _label(right, peaks)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)


def _panel(
    axes: Axes, rows: list[dict[str, Any]], value: str, label: str, spread: tuple[str, ...] = (), scale: float = 1.0
) -> list[End]:
    """-> where each line ends, for its name."""
    combiners = list(dict.fromkeys(row["combiner"] for row in rows))
    lines = list(dict.fromkeys((row["combiner"], row["backend"]) for row in rows))
    ends: list[End] = []
    for combiner, backend in lines:
        mine = [row for row in rows if (row["combiner"], row["backend"]) == (combiner, backend)]
        x, y = [row["frames"] for row in mine], [row[value] * scale for row in mine]
        colour, style = COLOURS[backend], STYLES[combiners.index(combiner)]
        axes.plot(x, y, color=colour, linestyle=style, marker="o", markersize=4, linewidth=1.8)
        if spread:
            low, high = ([row[name] * scale for row in mine] for name in spread)
            axes.fill_between(x, low, high, color=colour, alpha=0.2, linewidth=0)
        ends.append((y[-1], f"{backend}, {combiner}" if len(combiners) > 1 else backend, colour, x[-1]))
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({row["frames"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
    axes.minorticks_off()
    axes.set_xlabel("frames in the clip")
    axes.set_title(label, loc="left", fontsize=10)
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)
    return ends


def _label(axes: Axes, ends: list[End]) -> None:
    """Each line's name at its right end, pushed apart where ends meet."""
    axes.figure.canvas.draw()
    transform = axes.transData
    below = float("-inf")
    for y, name, colour, x in sorted(ends):
        at = max(transform.transform((x, y))[1], below + 15)
        shift = (at - transform.transform((x, y))[1]) * 72 / axes.figure.dpi
        label = axes.annotate(name, (x, y), xytext=(8, shift), textcoords="offset points", color=colour, va="center")
        label.set_annotation_clip(False)
        below = at
