"""Pictures of measurements, drawn from their JSON alone; readable on light and on dark pages."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator

from benchmarks.cases import NAMES
from benchmarks.harness import threads
from benchmarks.whole import AUTOMATIC, RECOMPUTING, in_order

INK = "#7d8590"  # a grey with enough contrast on white and on black; so are the colours
COLOURS = {
    "native": "#2f81f7",
    "triton": "#2f81f7",
    AUTOMATIC: "#2f81f7",
    "cuda": "#3fb950",
    "reference": "#db6d28",
    "compiled": "#a371f7",
    "mirasol-pytorch": "#f778ba",
}
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
    rows, machine = in_order(report["rows"]), report["machine"]
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
        colour, style = COLOURS[backend.removesuffix(RECOMPUTING)], STYLES[combiners.index(combiner)]
        axes.plot(
            x,
            y,
            color=colour,
            linestyle=style,
            marker="^" if RECOMPUTING in backend else "o",
            markersize=4,
            linewidth=1.8,
        )
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


PEER_COLOURS = ("#db6d28", "#3fb950", "#a371f7", "#d29922", "#f778ba", "#39c5cf", "#f85149", "#8b949e")


def draw_ratios(report: dict[str, Any], path: Path) -> bool:
    """A panel per dtype and direction: per case a bar per peer, how many times as long as ours it takes.

    On a logarithmic axis with 1 as the ground of all bars, so that twice as slow is drawn as large as twice as fast.
    False, and no picture, where ours or all others have no times.
    """
    ours = next((row["candidate"] for row in report["rows"] if row["ours"]), None)
    rows = [row for row in report["rows"] if row["candidate"] != ours]
    mine = {_call(row): row["seconds"] for row in report["rows"] if row["candidate"] == ours}
    ratios = {(*_call(row), row["candidate"]): row["seconds"] / mine[_call(row)] for row in rows if _call(row) in mine}
    if not ratios:
        return False
    dtypes, directions, peers = (list(dict.fromkeys(call[at] for call in ratios)) for at in (1, 2, 3))
    colours = dict(zip(peers, itertools.cycle(PEER_COLOURS), strict=False))
    heights = [
        max(sum(1 + len(bars) for bars in _bars(ratios, dtype, d, peers).values()) for d in directions)
        for dtype in dtypes
    ]
    machine = report["machine"]
    where = f"{machine.get('gpu', machine['cpu'])} ({threads(machine)}, {report['kernels']})"
    with plt.rc_context(PAGE):
        figure, grid = plt.subplots(
            len(dtypes),
            len(directions),
            figsize=(6.2 * len(directions), 1.4 + 0.16 * sum(heights) + 0.8 * len(dtypes)),
            height_ratios=heights,
            layout="constrained",
            squeeze=False,
        )
        figure.suptitle(f"{report['op']}: speed of {ours} over each peer\n{where}", fontsize=11)
        for dtype, line in zip(dtypes, grid, strict=False):
            for direction, axes in zip(directions, line, strict=False):
                axes.set_title(f"{dtype}, {NAMES[direction]}", fontsize=10)
                _ratio_panel(axes, _bars(ratios, dtype, direction, peers), colours)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)
    return True


def _call(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["case"], row["dtype"], row["direction"]


def _bars(
    ratios: dict[tuple[str, str, str, str], float], dtype: str, direction: str, peers: list[str]
) -> dict[str, list[tuple[str, float]]]:
    """Case -> (peer, ratio) of those who ran."""
    here = {(key[0], key[3]): ratio for key, ratio in ratios.items() if key[1:3] == (dtype, direction)}
    cases = dict.fromkeys(case for case, _ in here)
    return {case: [(peer, here[case, peer]) for peer in peers if (case, peer) in here] for case in cases}


def _ratio_panel(axes: Axes, bars: dict[str, list[tuple[str, float]]], colours: dict[str, str]) -> None:
    at, ticks = 0.0, []
    for case, those in bars.items():
        ticks.append((at + (len(those) - 1) / 2, case))
        for peer, ratio in those:
            axes.barh(at, ratio - 1, left=1, height=0.85, color=colours[peer])
            align, shift = ("left", 3) if ratio >= 1 else ("right", -3)
            axes.annotate(
                f"{ratio:.2f} {peer}",
                (ratio, at),
                xytext=(shift, 0),
                textcoords="offset points",
                ha=align,
                va="center",
                fontsize=6,
                color=colours[peer],
            )
            at += 1
        at += 1
    every = [ratio for those in bars.values() for _, ratio in those]
    axes.set_xscale("log", base=2)
    low, high = min(1.0, *every), max(1.0, *every)
    room = max(1.8, (high / low) ** 0.4)  # for the names
    axes.set_xlim(low / room if low < 1 else 0.8, high * room)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.axvline(1, color=INK, linewidth=1)
    axes.set_yticks([y for y, _ in ticks], [case for _, case in ticks], fontsize=8)
    axes.set_ylim(at - 0.5, -1)
    axes.set_xlabel("time of the peer / time of ours (1: equal, right of it ours is faster)", fontsize=8)


def draw_roofline(measured: Sequence[tuple[dict[str, Any], dict[str, Any]]], path: Path) -> None:
    """Every kernel of ours on one machine as a point under what that machine's GEMM and copy allow.

    measured: reports of `benchmarks.run` and the cases of their op. Filled is forward, hollow forward + backward.
    """
    dtypes = list(dict.fromkeys(row["dtype"] for report, _ in measured for row in report["rows"] if row["ours"]))
    machine = measured[0][0]["machine"]
    with plt.rc_context(PAGE):
        figure, panels = plt.subplots(
            1, max(1, len(dtypes)), figsize=(6.4 * max(1, len(dtypes)), 5), layout="constrained", squeeze=False
        )
        figure.suptitle(f"our kernels, {machine.get('gpu', machine['cpu'])} ({threads(machine)})", fontsize=11)
        for dtype, axes in zip(dtypes, panels[0], strict=False):
            _roof(axes, [(report, cases) for report, cases in measured if _has(report, dtype)], dtype)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)


def _has(report: dict[str, Any], dtype: str) -> bool:
    return any(row["dtype"] == dtype for row in report["rows"])


OP_COLOURS = {"block_causal_attention": "#2f81f7", "token_learner": "#db6d28", "latent_recurrence": "#3fb950"}


def _roof(axes: Axes, measured: Sequence[tuple[dict[str, Any], dict[str, Any]]], dtype: str) -> None:
    spots = []
    for report, cases in measured:
        for row in report["rows"]:
            case = cases.get(row["case"])
            if row["ours"] and row["dtype"] == dtype and case is not None and row["candidate"] != "against":
                flops = case.flops(row["direction"])
                x = flops / case.bytes(row["direction"], getattr(torch, dtype))
                spots.append((x, flops / row["seconds"] / 1e9, report["op"], row["case"], row["direction"]))
    limits = measured[0][0]["ceilings"]
    # Half precision may be widened on a CPU that has no instructions for it: what is faster is the roof.
    gemm = max(limits[f"gemm {name}"] for name in {dtype, "float32"} if f"gemm {name}" in limits) / 1e9
    copy = limits["copy"] / 1e9
    left, right = min([gemm / copy, *(x for x, *_ in spots)]) / 2, max([gemm / copy, *(x for x, *_ in spots)]) * 4
    axes.plot([left, gemm / copy, right], [left * copy, gemm, gemm], color=INK, linewidth=1.5)
    axes.annotate(f"GEMM {gemm:,.0f} Gflop/s", (right, gemm), ha="right", va="bottom", fontsize=8, color=INK)
    axes.annotate(f"copy {copy:,.0f} GB/s", (left, left * copy), va="top", fontsize=8, color=INK)
    axes.set_xscale("log")
    axes.set_yscale("log")
    reached = [y for _, y, *_ in spots]  # above the roof, too, where this machine's GEMM does not use all it has
    axes.set_ylim(min([left * copy, *reached]) / 3, max([gemm, *reached]) * 1.5)
    for formatted in (axes.xaxis, axes.yaxis):
        formatted.set_major_formatter(FuncFormatter(lambda at, _: f"{at:,g}"))
        formatted.set_minor_formatter(FuncFormatter(lambda at, _: ""))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for at, op in enumerate(dict.fromkeys(spot[2] for spot in spots)):
        place = (0.98, 0.03 + 0.05 * at)
        axes.annotate(op, place, xycoords="axes fraction", ha="right", fontsize=9, color=OP_COLOURS.get(op, INK))
    for x, y, op, _, direction in spots:
        colour = OP_COLOURS.get(op, INK)
        filled = colour if direction == "forward" else "none"
        axes.scatter([x], [y], s=22, facecolors=filled, edgecolors=colour, linewidths=1.2, zorder=3)
    _name_spots(axes, [spot[:4] for spot in spots if spot[4] == "forward"])
    axes.set_title(f"{dtype}; filled: forward, hollow: forward + backward", loc="left", fontsize=9)
    axes.set_xlabel("useful work per byte of inputs and results (flop/byte)")
    axes.set_ylabel("useful work per second (Gflop/s)")
    axes.grid(color=INK, alpha=0.25, linewidth=0.6)


def _name_spots(axes: Axes, spots: Sequence[tuple[float, float, str, str]]) -> None:
    """A name beside each, moved down where another is."""
    axes.figure.canvas.draw()
    taken: list[tuple[float, float, float]] = []  # left, right, height in points
    for x, y, op, case in sorted(spots, key=lambda spot: -spot[1]):
        left, top = axes.transData.transform((x, y)) * 72 / axes.figure.dpi + (5, 0)
        right, at = left + 3.6 * len(case), top
        while any(a < right and left < b and abs(at - height) < 7 for a, b, height in taken):
            at -= 1
        taken.append((left, right, at))
        colour, shift = OP_COLOURS.get(op, INK), (5, at - top)
        axes.annotate(case, (x, y), xytext=shift, textcoords="offset points", fontsize=6, color=colour, va="center")


def draw_needle(report: dict[str, Any], path: Path) -> None:
    """A panel per kind of question: right answers over the length of the clip, per variant, and chance."""
    from mirasol_model.needle import CHANCE

    rows = report["rows"]
    several = len({(row["seed"], row["minutes"]) for row in rows}) > 1  # then each says which it was
    minutes = " or ".join(f"{m:g}" for m in sorted({row["minutes"] for row in rows}))
    colours = list(itertools.islice(itertools.cycle(("#2f81f7", *PEER_COLOURS)), len(rows)))
    with plt.rc_context(PAGE):
        figure, grid = plt.subplots(1, len(CHANCE), figsize=(13, 4.2), sharey=True, layout="constrained")
        machine = rows[0]["machine"]
        figure.suptitle(
            f"Needle in a video: exact match on fresh clips, trained on {min(rows[0]['frames'])} to "
            f"{max(rows[0]['frames'])} frames for {minutes} min ({machine['cpu']}, 1 thread)",
            fontsize=11,
        )
        for (kind, chance), axes in zip(CHANCE.items(), grid, strict=True):
            for i, row in enumerate(rows):
                aside = 2 ** ((i - (len(rows) - 1) / 2) / 12)  # so that equal ones do not hide each other
                x = [int(frames) * aside for frames in row["exact"]]
                y = [exact[kind] for exact in row["exact"].values()]
                label = row["variant"] + (f", seed {row['seed']}, {row['minutes']:g} min" if several else "")
                axes.plot(x, y, color=colours[i], linewidth=0.8, marker="o", markersize=5, label=label)
            axes.axhline(chance, color=INK, linestyle="--", linewidth=1)
            axes.set_xscale("log", base=2)
            axes.set_xticks(sorted({int(frames) for row in rows for frames in row["exact"]}))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda at, _: f"{at:g}"))
            axes.minorticks_off()
            axes.set_ylim(0, 1.03)
            axes.set_title(kind, loc="left", fontsize=10)
            axes.set_xlabel("frames in the clip")
            axes.grid(color=INK, alpha=0.25, linewidth=0.6)
        figure.legend(*grid[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
        figure.savefig(path, dpi=150, transparent=True)
        plt.close(figure)
