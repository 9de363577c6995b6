"""Checkpoints: written whole or not at all, the last few kept, by torch.distributed.checkpoint, so that what some
processes saved another number can go on from, sharded in another way or in one process.

    save("checkpoints", 100, model, optimizer)      # every process, and each writes its share
    step = load("checkpoints", model, optimizer)    # the last one; None where there is none

The model is a `Mirasol`, or what `mirasol_model.parallel` made of one.
"""

from __future__ import annotations

import os
import re
import shutil
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.optim import Optimizer

from mirasol_model.config import MirasolConfig
from mirasol_model.parallel import bare

NAME = re.compile(r"step-(\d+)")
CONFIG = "config.json"  # of the model, beside its tensors


def steps(folder: Path | str) -> list[int]:
    """Steps of the whole checkpoints, ascending."""
    folder = Path(folder)
    found = [NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def path_of(folder: Path | str, step: int) -> Path:
    return Path(folder) / f"step-{step:08d}"


def save(
    folder: Path | str,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    progress: Mapping[str, Tensor] | None = None,
    *,
    keep: int = 3,
) -> None:
    """Write folder/step-<step> and remove all but the last `keep`. Every process of the group calls it.

    progress: tensors that are saved beside model and optimiser, the same on every process.
    All is written and synced under another name, which is then changed, and that is synced: a reader, and a run that is
    resumed after it was killed, sees either all of a checkpoint or nothing.
    Raises ValueError if there is a checkpoint of that step, or of a later one.
    """
    folder = Path(folder)
    whole, growing, leaving = path_of(folder, step), folder / "growing", folder / "leaving"
    if keep < 1:
        raise ValueError(f"save: keep: expected at least 1, got {keep}")
    if (there := steps(folder)) and step <= there[-1]:  # which would count as the last, and this one be removed
        raise ValueError(f"save: step: expected one after {there[-1]}, the last checkpoint in {folder}, got {step}")
    meet()
    if first():
        for rest in (growing, leaving):  # of a run that was killed
            shutil.rmtree(rest, ignore_errors=True)
        growing.mkdir(parents=True)
    meet()
    weights, moments = get_state_dict(bare(model), optimizer)
    state = {"model": weights, "optimizer": moments, "progress": dict(progress or {})}
    with _alone_or_not():
        dcp.save(state, storage_writer=dcp.FileSystemWriter(growing, sync_files=True))
    if first():
        with (growing / CONFIG).open("w") as file:
            file.write(bare(model).config.to_json())
            file.flush()
            os.fsync(file.fileno())
        sync(growing)
        growing.rename(whole)
        sync(folder)
        for old in steps(folder)[:-keep]:
            path_of(folder, old).rename(leaving)  # what is called a step is whole, at every moment
            shutil.rmtree(leaving)
    meet()


def load(
    folder: Path | str, model: nn.Module, optimizer: Optimizer, progress: Mapping[str, Tensor] | None = None
) -> int | None:
    """Bring model, optimiser and the tensors of `progress` to where they were when the last checkpoint was saved.

    Every process of the group calls it, as many as there are now. -> its step; None if there is no checkpoint.
    Raises ValueError if that is not complete, or of another model, before anything of them changes.
    """
    if not (done := steps(folder)):
        return None
    path = path_of(folder, done[-1])
    saved = _complete(path)
    sizes = {f"model.{name}": tuple(x.shape) for name, x in bare(model).state_dict().items()}
    found = {name: tuple(x.size) for name, x in saved.items() if name.startswith("model.")}
    if wrong := [name for name in {**sizes, **found} if sizes.get(name) != found.get(name)]:
        name, more = wrong[0], f" (and {len(wrong) - 1} others)" if len(wrong) > 1 else ""
        expected, got = (f"{of[name]}" if name in of else "no such parameter" for of in (sizes, found))
        raise ValueError(f"load: folder: {path} is of another model: {name}: expected {expected}, got {got}{more}")
    # Shapes do not say it all: heads, windows, what a Combiner looks at. Older checkpoints have no configuration.
    if (path / CONFIG).is_file():
        was = MirasolConfig.from_json((path / CONFIG).read_text())
        if different := was.differences(bare(model).config):
            raise ValueError(
                f"load: folder: {path} is of another model: expected what it was saved with, got {different}"
            )
    for name in progress or ():
        if f"progress.{name}" not in saved:
            raise ValueError(f"load: progress: expected names that {path} has, got {name!r}")
    weights, moments = get_state_dict(bare(model), optimizer)
    state = {"model": weights, "optimizer": moments, "progress": dict(progress or {})}
    # A parameter that had no gradient before the checkpoint has no state in it, and is given none here.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    with _alone_or_not():
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), planner=planner)
    set_state_dict(
        bare(model),
        optimizer,
        model_state_dict=weights,
        optim_state_dict=moments,
        options=StateDictOptions(strict=False),
    )
    for name, parameter in bare(model).named_parameters():
        if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
            optimizer.state.pop(parameter, None)
    return done[-1]


@contextmanager
def _alone_or_not() -> Iterator[None]:
    """It warns of being used by a single process, which is what is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _complete(path: Path) -> dict[str, Any]:
    """What a checkpoint holds, by name; ValueError if a part of a file is missing, as after a copy that broke off."""
    if not (path / ".metadata").is_file():
        raise ValueError(f"load: folder: expected a complete checkpoint, got {path} without .metadata")
    metadata: Metadata = dcp.FileSystemReader(path).read_metadata()
    ends: dict[str, int] = defaultdict(int)
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends[place.relative_path], place.offset + place.length)
    for name, end in ends.items():
        size = (path / name).stat().st_size if (path / name).is_file() else 0
        if size < end:
            raise ValueError(f"load: folder: expected {end} bytes in {path / name}, got {size}")
    return metadata.state_dict_metadata


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
