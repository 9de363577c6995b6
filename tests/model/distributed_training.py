"""A process of test_parallel.py: training on several ranks, each with its own rows, against one process with all rows.

python -m tests.model.distributed_training FOLDER [resume]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW

from mirasol_model.checkpoints import load, save
from mirasol_model.parallel import bare, shard
from tests.model.clips import clip, model, words
from tests.numerics import assert_close_fp64
from tests.processes import world

ROWS, BEFORE, AFTER = 6, 2, 2  # of a batch; steps before and after the checkpoint
KINDS = ("ddp", "fsdp")


def made() -> nn.Module:
    torch.manual_seed(0)
    return model("all", recompute="snippet", latent={"mask_ratio": 0.0}).train()


def adam(model: nn.Module) -> AdamW:
    # A large eps: gradients that are zero but for rounding (the bias of the keys) shall not be divided by themselves.
    return AdamW(model.parameters(), lr=1e-3, eps=1e-5)


def batches(first: int, last: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Those of steps first .. last-1."""
    torch.manual_seed(1)
    return [(*clip(8, ROWS), words(ROWS)) for _ in range(last)][first:]


def train(model: nn.Module, optimizer: AdamW, steps: range, rank: int = 0, ranks: int = 1) -> list[Tensor]:
    """The loss of each step, the mean over ranks."""
    losses = []
    for batch in batches(steps.start, steps.stop):
        video, audio, text = (x.chunk(ranks)[rank] for x in batch)
        loss = model(video, audio, text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
        if ranks > 1:
            dist.all_reduce(losses[-1])
            losses[-1] /= ranks
    return losses


def alone() -> tuple[list[Tensor], nn.Module]:
    """What one process does."""
    single = made()
    return train(single, adam(single), range(BEFORE + AFTER)), single


def same_parameters(model: nn.Module, expected: nn.Module) -> None:
    for (name, got), want in zip(bare(model).named_parameters(), expected.parameters(), strict=True):
        assert_close_fp64(got.full_tensor() if isinstance(got, DTensor) else got, want, what=name)


def main(folder: str, resume: str = "") -> None:
    with world() as rank:
        ranks = int(os.environ["WORLD_SIZE"])
        mesh = init_device_mesh("cpu", (ranks,))
        expected, single = alone()
        for kind in KINDS:
            shared = shard(made(), mesh, kind)
            optimizer, steps = adam(shared), range(BEFORE)
            if resume:
                steps = range(BEFORE, BEFORE + AFTER)
                assert load(Path(folder) / resume, shared, optimizer) == BEFORE
            if kind == "fsdp":
                held = sum(parameter.to_local().numel() for parameter in shared.parameters())
                assert held < 1.1 * sum(parameter.numel() for parameter in single.parameters()) / ranks
            for got, want in zip(train(shared, optimizer, steps, rank, ranks), expected[steps.start :], strict=False):
                assert_close_fp64(got, want)
            if resume:
                same_parameters(shared, single)
            else:
                save(Path(folder) / f"{kind}{ranks}", BEFORE, shared, optimizer)
            torch.manual_seed(2)
            video, audio = clip(8, 1)
            prompt = words(1, 3)
            answers = [each.eval().generate(video, audio, prompt, 4) for each in (bare(shared), single)]
            single.train()
            assert not resume or torch.equal(*answers)  # before, the models are steps apart
        print("all equal")


if __name__ == "__main__":
    main(*sys.argv[1:])
