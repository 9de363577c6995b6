"""A model on several processes of torch.distributed: its clips shared out by rows, or one clip by snippets.

    mesh = init_device_mesh("cuda", (8,))
    model = shard(Mirasol(config), mesh)                                     # every rank its own rows
    model = shard(SnippetParallel(Mirasol(config), Ranks(mesh)), mesh)       # every rank its own snippets of all rows
    optimizer = torch.optim.AdamW(model.parameters())                        # after shard

`mirasol_model.checkpoints` saves and loads what is sharded.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

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
    a share of them (`fully_shard`, in place). Make the optimiser afterwards.

    "fsdp" gathers a block of the latent model and of the text decoder when it runs, which it does once in each forward
    pass, whatever the clips; all other parts, which run as often as a clip has snippets or not at all, are gathered
    once in each step, and their gradients reduced once. So ranks wait for each other equally often when their clips
    differ in length or lack a modality; but all have text or none has.
    Raises ValueError naming the argument.
    """
    if mesh.ndim != 1:
        raise ValueError(f"shard: mesh: expected one dimension, got {mesh.ndim}")
    if kind not in ("ddp", "fsdp"):
        raise ValueError(f"shard: kind: expected 'ddp' or 'fsdp', got {kind!r}")
    if kind == "ddp":  # a batch may lack a modality or the text, and with them parameters
        return DistributedDataParallel(model, device_mesh=mesh, find_unused_parameters=True)
    mirasol = bare(model)
    # It warns of outputs that are views, which must not be written to: nothing here does that.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    # Keys and values of the clip are made before the text runs: of them alone, else a block would be gathered twice.
    keys = [block.key_value for block in mirasol.text.blocks]
    layers = [*mirasol.latent.blocks, *keys, *mirasol.text.blocks]
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    names = [name for name, parameter in mirasol.named_parameters() if parameter not in inside]
    _use_alike(mirasol, names, mesh.get_group())
    fully_shard(mirasol, mesh=mesh)
    # What is called from outside beside `forward`, and gathers parameters too; none of them within another.
    for name in ("encode", "answer", *(["predict"] if isinstance(model, SnippetParallel) else [])):
        register_fsdp_forward_method(mirasol, name)
    return model


class _Use(torch.autograd.Function):
    """Zero, of a zero that has a gradient. Its backward gives gradients of zeros to parameters that have none here but
    on other ranks. Made before all other nodes, it runs after them; and parameters are not its inputs,
    for their gradients would wait for it."""

    @staticmethod
    def forward(ctx: Any, zero: Tensor, group: Any, parameters: Sequence[Tensor]) -> Tensor:
        ctx.group, ctx.parameters = group, parameters
        return zero.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        here = [parameter.grad is not None for parameter in ctx.parameters]
        anywhere = torch.tensor(here, dtype=torch.int32, device=grad.device)
        dist.all_reduce(anywhere, dist.ReduceOp.MAX, ctx.group)
        for parameter, used in zip(ctx.parameters, anywhere.tolist(), strict=True):
            if used and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return None, None, None


def _use_alike(model: Mirasol, names: Sequence[str], group: Any) -> None:
    """After backward the parameters of these names have a gradient on all ranks or on none: `fully_shard` reduces what
    has one, and ranks that reduce different parameters wait for each other, or worse."""
    forward = model.forward

    def alike(*args: Any, **kwargs: Any) -> MirasolOutput:
        parameters = [model.get_parameter(name) for name in names]
        zero = _Use.apply(parameters[0].new_zeros((), requires_grad=True), group, parameters)
        out = forward(*args, **kwargs)
        return out if out.loss is None else out._replace(loss=out.loss + zero)

    model.forward = alike  # type: ignore[method-assign]


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Within, every rank of "fsdp" has all parameters, and calls the model as it likes, without waiting for the others.

    For evaluation: without gradients no other memory is large, and a rank has more to ask, or to say, than another.
    Every rank of the group enters and leaves it. It does nothing for other models.
    """
    layers = [module for module in model.modules() if isinstance(module, FSDPModule)]
    root = bare(model)
    for layer in layers:
        layer.set_reshard_after_forward(False, recurse=False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(layer is not root, recurse=False)
            layer.reshard()


def bare(model: nn.Module) -> Mirasol:
    """The model without what was wrapped around it."""
    while isinstance(model, DistributedDataParallel | SnippetParallel):
        model = model.module if isinstance(model, DistributedDataParallel) else model.model
    assert isinstance(model, Mirasol)
    return model
