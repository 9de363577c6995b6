"""One rank's share of a training step, counted without computing it: flops, bytes of memory, bytes received.

The step itself runs, `shard(SnippetParallel(Mirasol))` with AdamW as rank 0 of that many, on fake tensors and in a
fake process group: every storage, matmul and message is counted, and nothing is computed. What is counted is exact for
this code, but for what an allocator wastes and a kernel keeps for itself; long clips follow from short ones (`NEAR`).
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.flops import counted_ops
from mirasol_kernels import Ranks
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.parallel import SnippetParallel, shard

FPS, WORDS = 25, 256  # frames a second, which only the length of the sound depends on; tokens of text


def fake_model(config: MirasolConfig) -> Mirasol:
    """Within FakeTensorMode: a model whose parameters have shapes and no values."""
    with torch.device("meta"):  # initialisation looks at values, which a fake tensor refuses
        model = Mirasol(config)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape))
    return model


class Live(TorchDispatchMode):
    """Bytes of all storages that are alive, now and at most; what `fully_shard` receives; and flops, by the formulas of
    FlopCounterMode, which itself would take as long as all the rest: it tries to decompose every operator."""

    def __init__(self, formulas: dict[Any, Any]) -> None:
        super().__init__()
        self.now = self.received = self.flops = 0
        self.sizes: dict[int, int] = {}
        self.stage = self.layer = ""  # what runs: of the step, and of the model
        self.peaks: dict[str, int] = {}  # of each
        self.formulas = FlopCounterMode(display=False, custom_mapping=formulas).flop_registry

    def note(self, x: Any) -> None:
        if not isinstance(x, Tensor):
            return
        storage = (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()
        if storage._cdata not in self.sizes:
            weakref.finalize(storage, self.resize, storage._cdata)
        self.resize(storage._cdata, storage.nbytes())

    def resize(self, key: int, size: int | None = None) -> None:
        """None: it is gone."""
        self.now -= self.sizes.pop(key, 0)
        if size is not None:
            self.sizes[key] = size
            self.now += size
            where = f"{self.stage} {self.layer}"
            self.peaks[where] = max(self.peaks.get(where, 0), self.now)

    def enter(self, layer: str) -> None:
        self.layer = layer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # a fake tensor that is asked for its device, which is half of all calls
            return out
        tree_map(self.note, out)
        if formula := self.formulas.get(func.overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        if func.namespace == "c10d":  # a ring: all arrives but one's own; and as much, reduced on its way
            sizes = sorted(x.numel() * x.element_size() for x in args[:2] if isinstance(x, Tensor))
            if func._opname in ("_allgather_base_", "_reduce_scatter_base_"):
                self.received += sizes[1] - sizes[0]
        return out

    @contextmanager
    def watching(self) -> Iterator[None]:
        """`fully_shard` frees what it gathered by making storages empty."""
        resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self.sizes:
                self.resize(storage._cdata, size)
            return result

        with patch.object(torch.UntypedStorage, "resize_", noted), self:
            yield


def step(config: MirasolConfig, frames: int, gpus: int) -> dict[str, Any]:
    """Flops, bytes of memory and bytes received of rank 0 of `gpus` in one training step of one clip."""
    dist.init_process_group("fake", rank=0, world_size=gpus, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (gpus,))
        with ExitStack() as modes:
            warnings.simplefilter("ignore")
            mapping = modes.enter_context(counted_ops())
            modes.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
            return _step(config, frames, mesh, mapping)
    finally:
        dist.destroy_process_group()


def _step(config: MirasolConfig, frames: int, mesh: DeviceMesh, mapping: dict[Any, Any]) -> dict[str, Any]:
    gpus = mesh.size()
    size, snippets = config.video.size, -(-frames // config.video.frames)
    model, ranks, live = fake_model(config), Ranks(mesh), Live(mapping)
    parameters = sum(p.numel() for p in model.parameters())
    with live.watching():
        wrapped: nn.Module = shard(SnippetParallel(model, ranks), mesh) if gpus > 1 else model
        optimizer = torch.optim.AdamW(wrapped.parameters(), fused=True)
        video = torch.empty(1, 3, frames, size, size, dtype=torch.uint8)
        audio = torch.empty(1, frames * config.audio.sample_rate // FPS)
        text, age = torch.ones(1, WORDS, dtype=torch.int64), np.arange(snippets, 0, -1)[None]
        host = 0 if gpus == 1 else video.nbytes + audio.nbytes  # the whole clip is on the host, not on the device
        tree_map(live.note, list(wrapped.parameters()))
        for name, module in model.named_modules():
            if isinstance(module, nn.ModuleList):
                for i, layer in enumerate(module):  # also when it is computed again, in backward
                    layer.register_forward_pre_hook(lambda *_, where=f"{name}.{i}": live.enter(where))

        def once() -> None:
            live.stage, live.layer = "forward", ""
            with torch.autocast("cpu", torch.bfloat16):
                out = wrapped(video, audio)
                # Not as labels of `forward`, which looks at their values.
                logits = model.text(text, model.text.remember(out.latents, age))
                words = nn.functional.cross_entropy(logits.float().flatten(0, 1), text.flatten())
            live.stage = "backward"
            (out.loss + words).backward()
            live.stage, live.layer = "optimizer", ""
            optimizer.step()
            optimizer.zero_grad()

        for parameter in wrapped.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # it has its states from here on
        optimizer.zero_grad()
        resting, live.peaks, live.received, live.flops, ranks.received = live.now, {}, 0, 0, 0
        once()
        peaks = {where: peak - host for where, peak in live.peaks.items()}
    return {
        "gpus": gpus,
        "frames": frames,
        "snippets": snippets,
        "parameters": parameters,
        "flops": live.flops,
        "tokens_received": ranks.received,
        "parameters_received": live.received,
        "resting_bytes": resting - host,
        "peak_bytes": max(peaks.values()),
        "peaks": peaks,
    }


# Snippets of a rank with which steps are counted. In longer clips nothing new happens: flops are a
# polynomial of second degree in the snippets of a rank (attention of the latent model), bytes a line, and memory a line
# at each moment. Its peak is taken as the highest of lines of each layer of the model, forward and backward: too low,
# by less than 1 % where it was tested, if within a layer another moment becomes the highest. A layer is computed again
# in pieces of 512 tokens, the last of which does less when it is shorter: so the snippets go in steps of 512 compact
# tokens. With the Combiner in context "all" no such steps exist below 512 snippets: memory is as good (a piece is
# little), flops are not, and are to be counted in another way.
NEAR = (16, 32, 48)
APART = NEAR[1] - NEAR[0]


def near(config: MirasolConfig, gpus: int) -> list[dict[str, Any]]:
    return [step(config, n * gpus * config.video.frames, gpus) for n in NEAR]


def far(rows: Sequence[dict[str, Any]], snippets: int) -> dict[str, Any]:
    """What `step` would count with so many snippets of each rank, a multiple of APART, from `near`.

    bend: the largest of what memory of a layer differs from a line at NEAR, over the peak.
    """
    t = (snippets - NEAR[0]) // APART

    def at(a: int, b: int, c: int) -> int:
        return a + t * (b - a) + t * (t - 1) // 2 * (a - 2 * b + c)

    known = ("flops", "tokens_received", "parameters_received", "resting_bytes")
    peaks = {where: [row["peaks"][where] for row in rows] for where in rows[-1]["peaks"]}
    lines = {where: c + (t - 2) * (c - b) for where, (_, b, c) in peaks.items()}
    peak = max(lines.values())
    gpus, parameters = rows[0]["gpus"], rows[0]["parameters"]
    return {
        "gpus": gpus,
        "frames": snippets * gpus * rows[0]["frames"] // rows[0]["snippets"],
        "snippets": snippets * gpus,
        "parameters": parameters,
        **{key: at(*(row[key] for row in rows)) for key in known},
        "peak_bytes": peak,
        "peaks": lines,
        "bend": max(abs(a - 2 * b + c) for where, (a, b, c) in peaks.items() if lines[where] > 0.9 * peak) / peak,
    }
