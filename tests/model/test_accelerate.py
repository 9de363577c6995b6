"""Hugging Face accelerate with the configurations of examples/accelerate: two processes train as one does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed")

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "accelerate"


def said(*command: str, rows: int | None = None) -> list[str]:
    """The lines that `python *command examples/accelerate/train.py` prints."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [str(FOLDER / "train.py"), "--cpu", "--float64", *(["--rows", str(rows)] if rows else [])]
    done = subprocess.run(
        [sys.executable, *command, *script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


# The script, as it runs in one of as many processes as a configuration says.
ONE_OF_MANY = """
import accelerate, runpy, sys
accelerate.Accelerator.num_processes = int(sys.argv[1])
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def losses(lines: list[str]) -> list[float]:
    return [float(line.split()[-1]) for line in lines if line.startswith("step")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_as_many_processes_as_it_says(kind: str) -> None:
    processes = re.search(r"^num_processes: (\d+)$", (FOLDER / f"{kind}.yaml").read_text(), re.M)[1]
    assert len(losses(said("-c", ONE_OF_MANY, processes))) == 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_train_as_one(kind: str, tmp_path: Path) -> None:
    text = (FOLDER / f"{kind}.yaml").read_text()
    for ours, here in (
        ("num_processes: 8", "num_processes: 2"),
        ("mixed_precision: bf16", 'mixed_precision: "no"'),
        ("use_cpu: false", "use_cpu: true"),
    ):
        text = text.replace(ours, here)
    (tmp_path / "two.yaml").write_text(text)
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "two.yaml")]
    launch += ["--main_process_port", "0"]
    if kind == "fsdp2":
        launch += [str(Path(__file__).with_name("sharded_on_cpu.py"))]
    lines = said(*launch, rows=2)
    two, one = losses(lines), losses(said(rows=4))
    assert kind == "ddp" or lines.count("in shards: 8 modules and the whole") == 2
    assert len(one) == 3 and one[2] < one[0]
    assert all(abs(a - b) <= 1e-12 * b for a, b in zip(two, one, strict=True)), (two, one)
