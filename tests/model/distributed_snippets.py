"""A process of test_parallel.py: clips whose snippets lie on two and on three ranks, against one process.

python -m tests.model.distributed_snippets
"""

from __future__ import annotations

import re
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from mirasol_kernels import Ranks, use_backend
from mirasol_kernels._check import farthest
from mirasol_model import Mirasol, MirasolOutput
from mirasol_model.parallel import SnippetParallel, shard
from tests.model.clips import VARIANTS, clip, model, words
from tests.numerics import assert_close_fp64, assert_within_budget
from tests.processes import world

Call = dict[str, Any]


def calls() -> dict[str, Call]:
    """7 snippets of 4 frames: shared out evenly neither among 2 nor among 3 ranks."""
    video, audio = clip(28, 2)
    text = words(2)
    whole = {"video": video, "audio": audio, "text": text, "labels": text}
    ragged = {"frames": [26, 9], "has_audio": [False, True], "text": text, "labels": text}
    return {
        "whole": whole,
        "ragged": {"video": video[:, :, :26], "audio": audio[:, : 26 * 640], **ragged},
        "video": {"video": video, "audio": None},
        "audio": {"video": None, "audio": audio, "frames": 28},
    }


def results(wrapped: torch.nn.Module, bare: Mirasol, call: Call, mean_over: int = 1) -> dict[str, torch.Tensor]:
    """Everything that comes out, and the gradient of every parameter; mean_over: ranks whose mean is still to take."""
    bare.zero_grad()
    torch.manual_seed(3)  # of the tokens that are masked
    out: MirasolOutput = wrapped(**call)
    out.loss.backward()
    made = {"loss": out.loss, "latents": out.latents, **({} if out.logits is None else {"logits": out.logits})}
    made |= {f"{name} loss": loss for name, loss in out.losses.items() if loss is not None}
    for name, parameter in bare.named_parameters():
        grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if isinstance(grad, DTensor):
            grad = grad.full_tensor()
        elif mean_over > 1:
            dist.all_reduce(grad, group=wrapped.ranks.group)
            grad = grad / mean_over
        made[f"gradient of {name}"] = grad
    return {name: x.detach().clone() for name, x in made.items()}


def same(got: dict, expected: dict, what: str) -> None:
    assert got.keys() == expected.keys(), what
    for name, x in expected.items():
        assert_close_fp64(got[name], x.to_local() if isinstance(x, DTensor) else x, what=f"{what}: {name}")


def compare(ranks: Ranks, variant: str, recompute: str, names: list[str]) -> None:
    torch.manual_seed(1)
    made = model(variant, recompute=recompute).train()
    spread = SnippetParallel(made, ranks)
    every = calls()
    for name in names:
        expected = results(made, made, every[name])
        same(results(spread, made, every[name], ranks.size), expected, f"{variant} {recompute} {name} {ranks.size}")


def in_float32(ranks: Ranks, variant: str) -> None:
    """Through the compiled kernels where they are: as near to float64 as one process in float32 is. From one order of
    summation to another that differs by more than two, and ranks are one more: of three orders the worst is taken."""
    torch.manual_seed(1)
    made, call = model(variant), calls()["whole"]
    exact = layer_by_layer(results(made, made, call))
    made, call = made.float(), {name: x.float() if x.is_floating_point() else x for name, x in call.items()}
    got = layer_by_layer(results(SnippetParallel(made, ranks), made, call, ranks.size))
    lows = [results(made, made, call)]
    with use_backend("reference"):
        lows.append(results(made, made, call))
    by_snippets = model(variant, recompute="snippet").float()
    by_snippets.load_state_dict(made.state_dict())
    lows = [layer_by_layer(x) for x in (*lows, results(by_snippets, by_snippets, call))]
    for name, x in exact.items():
        assert_within_budget(got[name], farthest((low[name] for low in lows), x), x, what=f"{variant} float32 {name}")


def layer_by_layer(results: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradients of a layer's weight and bias as one: softmax does not see the bias of keys, whose gradient is what
    rounding leaves of a sum, and of the size of what was summed."""
    layers: dict[str, list[torch.Tensor]] = {}
    for name, x in results.items():
        layers.setdefault(re.sub(r"[._](weight|bias)$", "", name), []).append(x.flatten())
    return {name: torch.cat(x) for name, x in layers.items()}


def wrapped(kind: str, ranks: Ranks, mesh: DeviceMesh, recompute: str = "none") -> None:
    """DistributedDataParallel and `fully_shard` take the mean that is left to take."""
    for variant in ("current", "all", "ttm"):
        torch.manual_seed(1)
        made = model(variant, recompute=recompute).train()
        call = calls()["ragged"]
        expected = results(made, made, call)
        outer = shard(SnippetParallel(made, ranks), mesh, kind)
        for _ in range(2):  # the second iteration is the one that a reducer in a wrong state fails
            same(results(outer, made, call), expected, f"{kind} {variant} {recompute}")


def main() -> None:
    with world() as rank:
        pair = dist.new_group([0, 1])
        three = Ranks()
        if rank < 2:
            two = Ranks(pair)
            for variant in ("current", "all", "all-last", "ttm"):
                compare(two, variant, "none", ["whole", "ragged"])
            in_float32(two, "ttm")
            in_float32(two, "all")
        for variant in VARIANTS:
            compare(three, variant, "none", ["ragged"])
        for variant in ("all", "ttm", "perceiver"):
            compare(three, variant, "snippet", ["whole", "ragged", "video", "audio"])
        mesh = DeviceMesh("cpu", list(range(3)))
        for kind in ("ddp", "fsdp"):
            wrapped(kind, three, mesh)
        with patch("mirasol_model.model.AT_A_TIME", 2):  # of 3, 2 and 2 snippets
            wrapped("fsdp", three, mesh, "snippet")
        print("all equal")


if __name__ == "__main__":
    main()
