"""Runs of test_train_on_several.py: in float64, one after the other, each on several processes, some of them killed.

python -m tests.model.distributed_runs FOLDER      all of `RUNS`; prints how each process ended
python -m tests.model.distributed_runs CONFIG      one run in this process, or as one that torchrun started

Processes are forked from this one, which has imported torch for all of them.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from mirasol_model import train
from tests.model.runs import kill_at, write_config

CLIPS = 12  # of a step, on all processes
UNMASKED = {"preset": "tiny", "change": {"latent": {"mask_ratio": 0.0}, "recompute": "snippet"}}
ALIKE: dict[str, Any] = {"model": UNMASKED, "data": {"train": {"length": 24, "alike": True}}}
# Clips of two lengths, of which one in four is silent, one at a time: processes differ in what they have a use for.
UNLIKE: dict[str, Any] = {"data": {"train": {"length": 24}}, "batch": 1}


class Run(NamedTuple):
    name: str
    processes: int
    shard: str
    moment: str = ""  # at which every process is killed
    begun: str = ""  # the run that it goes on with
    like: dict[str, Any] = ALIKE


# A step has two backward passes. Checkpoints are written after steps 2 and 4, the last.
RUNS = (
    Run("one", 1, "ddp"),
    Run("fsdp on two, killed", 2, "fsdp", moment="backward:5"),
    Run("then fsdp on two", 2, "fsdp", begun="fsdp on two, killed"),
    Run("then ddp on three", 3, "ddp", begun="fsdp on two, killed"),
    Run("then one", 1, "ddp", begun="fsdp on two, killed"),
    Run("ddp on three, killed", 3, "ddp", moment="backward:5"),
    Run("then fsdp on three", 3, "fsdp", begun="ddp on three, killed"),
    Run("unlike, ddp on three", 3, "ddp", like=UNLIKE),
    Run("unlike, fsdp on three", 3, "fsdp", like=UNLIKE),
)


def config_of(folder: Path, run: Run) -> Path:
    model = run.like.get("model")
    if model is None:  # begins with what a sharded run has exported
        start = str(folder / "then fsdp on two" / "run" / "model")
        model = {"start": start, "preset": None, "change": UNMASKED["change"]}
    values = {"batch": CLIPS // 2 // run.processes, "accumulation": 2, "steps": 4, "evaluate_every": 4, "save_every": 2}
    return write_config(folder / run.name, **{**values, **run.like, "model": model, "shard": run.shard})


def ends(config: Path, processes: int, moment: str) -> list[int]:
    """How each of the processes of a run ended: 0, or minus the signal."""
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            os.environ["RANK"] = str(rank)
            where = {"init_method": f"file://{config}.at", "rank": rank, "world_size": processes}
            dist.init_process_group = functools.partial(dist.init_process_group, **where)
            if moment:
                what, number = moment.split(":")
                kill_at(what, int(number))
            os._exit(one(config))
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def one(config: Path) -> int:
    torch.set_default_dtype(torch.float64)
    return train.main(["--config", str(config)])


def main(what: str) -> None:
    folder = Path(what)
    if folder.is_file():
        one(folder)
        return
    for run in RUNS:
        if run.begun:
            shutil.copytree(folder / run.begun / "run", folder / run.name / "run")
        codes = ends(config_of(folder, run), run.processes, run.moment)
        print(json.dumps({"name": run.name, "codes": codes}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
