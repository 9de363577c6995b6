"""Training on several processes is training on one: DDP and FSDP2, killed, and gone on with on another number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorboard", reason="runs are logged to TensorBoard")

from safetensors.torch import load_file

from mirasol_model import Mirasol
from tests.model.distributed_runs import RUNS, config_of
from tests.model.runs import rows_of
from tests.numerics import assert_close_fp64

pytestmark = pytest.mark.slow


def program(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs."""
    folder = tmp_path_factory.mktemp("runs")
    said = program("tests.model.distributed_runs", str(folder))
    ended = [json.loads(line)["codes"] for line in said.splitlines() if line.startswith("{")]
    assert ended == [[-signal.SIGKILL if run.moment else 0] * run.processes for run in RUNS]
    return folder


def same(folder: Path, one: str, other: str) -> None:
    """Two runs are equal to rounding: everything in their logs, and the weights they end with."""
    rows, others = rows_of(folder / one), rows_of(folder / other)
    for got, want in zip(rows, others, strict=True):
        assert got.keys() == want.keys()
        for name, value in want.items():
            if isinstance(value, float):
                assert_close_fp64(*(torch.tensor(x, dtype=torch.float64) for x in (got[name], value)), what=name)
            else:
                assert got[name] == value, name
    weights, expected = (load_file(folder / name / "run" / "model" / "model.safetensors") for name in (one, other))
    assert weights.keys() == expected.keys()
    for name, want in expected.items():
        assert_close_fp64(weights[name], want, what=name)


def test_a_run_on_several_processes_killed_and_resumed_on_others_is_that_of_one(folder: Path) -> None:
    """Two batches to a step, recomputed by snippets, with clips of one kind, so that means over ranks are those over
    clips; and more questions for one process than for another."""
    for run in RUNS:
        if run.begun:
            same(folder, run.name, "one")
    rows = rows_of(folder / "one")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 4] and rows[-1]["of"] == {"all": 5, "early": 2, "late": 3}
    killed = folder / "fsdp on two, killed" / "run"
    assert [path.name for path in (killed / "checkpoints").iterdir()] == ["step-00000002"]
    assert len(list((killed / "checkpoints" / "step-00000002").glob("*.distcp"))) == 2  # from each its share


def test_clips_of_all_kinds_train_alike_however_the_parameters_are_shared_out(folder: Path) -> None:
    """Lengths differ between processes, some have no sound, in a step nobody has: then no process waits for another,
    and what nobody has a use for does not move. They begin with what a sharded run has exported."""
    same(folder, "unlike, fsdp on three", "unlike, ddp on three")
    audio = [row["audio"] for row in rows_of(folder / "unlike, ddp on three") if "loss" in row]
    assert audio.count(None) == 1


def test_what_a_sharded_run_exports_is_a_model(folder: Path) -> None:
    exported = folder / "then fsdp on three" / "run" / "model"
    assert (exported / "tokenizer.json").exists()
    made = Mirasol.from_pretrained(exported)
    weights = load_file(exported / "model.safetensors")
    assert all(torch.equal(x, weights[name].to(x.dtype)) for name, x in made.state_dict().items())


def test_under_torchrun(folder: Path) -> None:
    """What `torchrun -m mirasol_model.train` does: it goes on with a run, on two processes."""
    run = next(run for run in RUNS if run.name == "then fsdp on two")._replace(name="torchrun")
    shutil.copytree(folder / run.begun / "run", folder / run.name / "run")
    config = config_of(folder, run)
    program(
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "--module",
        "tests.model.distributed_runs",
        str(config),
    )
    same(folder, "torchrun", "one")
