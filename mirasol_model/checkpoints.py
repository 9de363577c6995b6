"""Checkpoints of a run: written whole or not at all, the last few kept, by torch.distributed.checkpoint, so that what n
processes saved another number can load."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

NAME = re.compile(r"step-(\d+)")


def steps(folder: Path) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    found = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any], keep: int) -> None:
    """Write folder/step-<step> and remove all but the last `keep`. Every process of the group calls it.

    All is written and synced under another name, which is then changed, and that is synced: a reader, and a run that is
    resumed after it was killed, sees either all of a checkpoint or nothing.
    """
    whole, growing, leaving = path_of(folder, step), folder / "growing", folder / "leaving"
    if first():
        for rest in (growing, leaving):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        growing.mkdir(parents=True)
    meet()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "progress": progress}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a single process is what is meant
        dcp.save(state, storage_writer=dcp.FileSystemWriter(growing, sync_files=True))
    if first():
        sync(growing)
        growing.rename(whole)
        sync(folder)
        for old in steps(folder)[:-keep]:
            path_of(folder, old).rename(leaving)  # what is called a step is whole, at every moment
            shutil.rmtree(leaving)
    meet()


def load(folder: Path, step: int, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any]) -> None:
    """Bring model, optimiser and the tensors of `progress` to where they were. Every process of the group calls it."""
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "progress": progress}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(state, storage_reader=dcp.FileSystemReader(path_of(folder, step)))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)


def sync(folder: Path) -> None:
    """What was renamed or made in a folder is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def first() -> bool:
    """Whether this process is the one that writes what there is one of."""
    return not dist.is_initialized() or dist.get_rank() == 0


def meet() -> None:
    """Wait for every process of the group."""
    if dist.is_initialized():
        dist.barrier()
