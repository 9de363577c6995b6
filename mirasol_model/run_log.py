"""What a run says while it trains: a progress bar, a JSONL file, TensorBoard; and a plot of its curves at the end."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter
except ImportError as error:
    raise ImportError("training needs TensorBoard and matplotlib: pip install 'mirasol-kernels[train]'") from error
from tqdm import tqdm


def read_rows(file: Path, upto: int | None = None) -> list[dict[str, Any]]:
    """The rows of a log, without those past step `upto`, nor what a killed process left of its last line."""
    if not file.exists():
        return []
    lines = file.read_text().split("\n")[:-1]  # a whole line ends with a newline
    rows = [json.loads(line) for line in lines]
    return [row for row in rows if upto is None or row["step"] <= upto]


class RunLog:
    """log.jsonl: a row per step, {"step", "loss", its parts, ...}, and one per evaluation, {"step", "exact": ...}."""

    def __init__(self, folder: Path, step: int, steps: int):
        """step: the last one that counts; what a run that was killed wrote after it is taken back."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.path = folder, folder / "log.jsonl"
        kept = read_rows(self.path, step)
        again = folder / "log.jsonl.new"
        again.write_text("".join(json.dumps(row) + "\n" for row in kept))
        again.replace(self.path)
        self.file = self.path.open("a")
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self.bar = tqdm(total=steps, initial=step, unit="step", dynamic_ncols=True)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Rows with "step" and numbers, or mappings of numbers."""
        for row in rows:
            self.file.write(json.dumps(row) + "\n")
            for name, value in row.items():
                for key, number in value.items() if isinstance(value, dict) else [("", value)]:
                    if name != "step" and number is not None:
                        self.board.add_scalar(f"{name}/{key}" if key else name, number, row["step"])
            if "loss" in row:
                self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
                self.bar.update(row["step"] - self.bar.n)
        self.file.flush()  # a killed process loses nothing that was written

    def say(self, line: str) -> None:
        """To the terminal, above the bar."""
        self.bar.write(line)

    def sync(self) -> None:
        """All rows so far are on the disk, before a checkpoint says that their steps are done."""
        os.fsync(self.file.fileno())

    def close(self) -> None:
        self.bar.close()
        self.board.close()
        self.file.close()


def plot(folder: Path) -> Path:
    """curves.png: the losses, and what evaluation found, over steps."""
    rows = read_rows(folder / "log.jsonl")
    trained, tested = [row for row in rows if "loss" in row], [row for row in rows if "exact" in row]
    figure = Figure(figsize=(8, 4 if not tested else 7), layout="constrained")
    axes = figure.subplots(2 if tested else 1, squeeze=False)[:, 0]
    for name in ("loss", "text", "latent", "video", "audio"):
        points = [(row["step"], row[name]) for row in trained if row[name] is not None]
        if points:
            axes[0].plot(*zip(*points, strict=True), label=name, linewidth=2 if name == "loss" else 1)
    axes[0].set(xlabel="step", ylabel="loss", yscale="log")
    axes[0].legend()
    if tested:
        for kind in sorted({kind for row in tested for kind in row["exact"]}):
            points = [(row["step"], row["exact"][kind]) for row in tested if kind in row["exact"]]
            axes[1].plot(*zip(*points, strict=True), marker="o", label=kind)
        axes[1].set(xlabel="step", ylabel="exact match", ylim=(-0.02, 1.02))
        axes[1].legend()
    figure.savefig(folder / "curves.png", dpi=120)
    return folder / "curves.png"
