"""Tests that need several processes: `run` starts them, `world` is what each of them begins with."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[1]
PATIENCE = 1200  # seconds; on a machine that others use, too


def run(module: str, processes: int, folder: Path, *args: str) -> list[str]:
    """What `python -m module *args` says in each process, all of which must succeed."""
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    # A file, since a port that was free may be taken meanwhile.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes), "RENDEZVOUS": str(folder / "at")}
    workers = [
        subprocess.Popen(
            [sys.executable, "-m", module, *args],
            cwd=ROOT,
            env={**environment, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [worker.communicate(timeout=PATIENCE)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * processes, "\n".join(said)
    return said


@contextmanager
def world() -> Iterator[int]:
    """The process group of all processes that `run` has started -> this one's rank."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['RENDEZVOUS']}",
        rank=rank,
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        yield rank
        dist.barrier()
    finally:
        gc.collect()  # a DistributedDataParallel that outlives the group may hang: mirasol_model.train.processes
        dist.destroy_process_group()
