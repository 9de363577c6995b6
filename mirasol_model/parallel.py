"""A model on several processes of torch.distributed: its clips shared out by rows, or one clip by snippets; and
checkpoints that any number of processes can go on from.

    mesh = init_device_mesh("cuda", (8,))
    model = shard(Mirasol(config), mesh)                                     # every rank its own rows
    model = shard(SnippetParallel(Mirasol(config), Ranks(mesh)), mesh)       # every rank its own snippets of all rows
    optimizer = torch.optim.AdamW(model.parameters())                        # after shard
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from mirasol_kernels import Ranks, snippet_owners
from mirasol_model.model import Mirasol, MirasolOutput
from mirasol_model.spread import Spread


class SnippetParallel(nn.Module):
    """Mirasol on clips whose snippets are shared out among ranks: each encodes and combines its own.

    What ranks tell each other: the latents h of all snippets (m tokens each); in every layer of the latent model, and
    of the Combiner in context "all", keys and values in a ring; with the TTM as Combiner, the softmax states of its
    input. The recurrence of the TTM and the text decoder run on every rank alike.

    Every rank is given the same arguments, those of `Mirasol.forward`, best on the host: of video and audio only its
    own snippets go to the model's device. Results are those of one process: loss, losses, logits and latents, whole on
    every rank. The mean over ranks of the gradients that backward leaves is the gradient of one process, and taking it
    is what `shard` is for. Ranks must draw equal random numbers (mask_ratio) and have equal parameters.

    Raises ValueError if there are more ranks than snippets.
    """

    def __init__(self, model: Mirasol, ranks: Ranks):
        super().__init__()
        self.model, self.ranks = model, ranks

    def forward(
        self, video: Tensor | None, audio: Tensor | None, text: Tensor | None = None, **more: Any
    ) -> MirasolOutput:
        clips = self.model.read(video, audio, text, **more)
        snippets = clips.frames.shape[1]
        if snippets < self.ranks.size:
            raise ValueError(
                f"SnippetParallel: video, audio: expected a snippet for each of {self.ranks.size} ranks, got {snippets}"
            )
        owners = snippet_owners(snippets, self.ranks.size)
        spread = Spread(self.ranks, owners, self.model.counts(clips))
        return self.model.predict(clips, text, more.get("labels"), spread)


def shard(model: Mirasol | SnippetParallel, mesh: DeviceMesh, kind: Literal["ddp", "fsdp"] = "fsdp") -> nn.Module:
    """The model for training on the ranks of a one-dimensional mesh; gradients are the mean over them.

    "ddp" keeps all parameters on every rank (DistributedDataParallel, which this wraps around the model); "fsdp" keeps
    a share of them, and gathers a layer when it runs (`fully_shard`, in place). Make the optimiser afterwards.
    Raises ValueError naming the argument.
    """
    if mesh.ndim != 1:
        raise ValueError(f"shard: mesh: expected one dimension, got {mesh.ndim}")
    if kind not in ("ddp", "fsdp"):
        raise ValueError(f"shard: kind: expected 'ddp' or 'fsdp', got {kind!r}")
    if kind == "ddp":  # a batch may lack a modality or the text, and with them parameters
        return DistributedDataParallel(model, device_mesh=mesh, find_unused_parameters=True)
    mirasol = bare(model)
    for module in list(mirasol.modules()):
        for layer in module if isinstance(module, nn.ModuleList) else ():
            fully_shard(layer, mesh=mesh)
    fully_shard(mirasol, mesh=mesh)
    # What is called from outside beside `forward`, and gathers parameters too.
    calls = [(mirasol, name) for name in ("encode", "answer", "generate")]
    calls += [(mirasol, "predict")] if isinstance(model, SnippetParallel) else []
    for part, name in [*calls, *((block, "remember") for block in mirasol.text.blocks)]:
        register_fsdp_forward_method(part, name)
    return model


def bare(model: nn.Module) -> Mirasol:
    """The model without what was wrapped around it."""
    while isinstance(model, DistributedDataParallel | SnippetParallel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.model
    assert isinstance(model, Mirasol)
    return model


def save(folder: Path | str, model: nn.Module, optimizer: Optimizer) -> None:
    """Model and optimiser in torch.distributed.checkpoint's format. Every rank calls it, and writes its share.

    Until its last file, `.metadata`, is there, the checkpoint is incomplete, and `load` refuses it.
    """
    dcp.save(_state(model, optimizer), checkpoint_id=folder, no_dist=not dist.is_initialized())


def load(folder: Path | str, model: nn.Module, optimizer: Optimizer) -> None:
    """Go on from what `save` wrote, on as many ranks as there are now, sharded as they are now, or in one process.

    Raises ValueError if that is not complete, or of another model, before anything changes.
    """
    if not (Path(folder) / ".metadata").exists():
        raise ValueError(f"load: folder: expected a complete checkpoint, got {folder} without .metadata")
    state = _state(model, optimizer)
    saved = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    if missing := [name for name in state["model"] if f"model.{name}" not in saved]:
        raise ValueError(f"load: folder: expected a checkpoint of this model, got one without {', '.join(missing)}")
    # A parameter that had no gradient so far has no state in the checkpoint, and is given none here.
    planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
    dcp.load(state, checkpoint_id=folder, planner=planner, no_dist=not dist.is_initialized())
    set_state_dict(
        bare(model),
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(strict=False),
    )
    for name, parameter in bare(model).named_parameters():
        if not any(key.startswith(f"optimizer.state.{name}.") for key in saved):
            optimizer.state.pop(parameter, None)


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    of_model, of_optimizer = get_state_dict(bare(model), optimizer)
    return {"model": of_model, "optimizer": of_optimizer}
