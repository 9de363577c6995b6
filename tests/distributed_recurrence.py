"""A process of test_latent_recurrence.py: the gradients of two processes, each with half the batch, against one's.

python -m tests.distributed_recurrence KIND
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mirasol_kernels.latent_recurrence import latent_recurrence
from tests.numerics import assert_close_fp64
from tests.processes import world

PROCESSES = 2


class Machine(nn.Module):
    """A step that is a module with parameters, called once per step and again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)).double()

    def forward(self, state: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
        return latent_recurrence(self.step, state, inputs, checkpoint_every=2)

    def step(self, state: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        state = torch.tanh(state + self.cell(state + x))
        return state, state * x


def backward(machine: nn.Module, state: Tensor, inputs: Tensor) -> None:
    end, outputs = machine(state, inputs)
    (end.square().mean() + outputs.sin().mean()).backward()


def wrapped(kind: str, machine: Machine) -> nn.Module:
    if kind == "ddp":
        return nn.parallel.DistributedDataParallel(machine)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    if kind == "fsdp_step":  # its parameters are gathered for every step, and again for every recomputed one
        fully_shard(machine.cell, mesh=mesh, reshard_after_forward=True)
    return fully_shard(machine, mesh=mesh)


def compare(kind: str, rank: int) -> None:
    alone, shared = Machine(), Machine()
    shared.load_state_dict(alone.state_dict())
    state, inputs = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, 5, 8, dtype=torch.float64)
    backward(alone, state, inputs)
    shared_out = wrapped(kind, shared)
    for _ in range(2):  # the second iteration is the one that a reducer in a wrong state fails
        shared_out.zero_grad()
        backward(shared_out, state.chunk(PROCESSES)[rank], inputs.chunk(PROCESSES)[rank])
    for mine, expected in zip(shared_out.parameters(), alone.parameters(), strict=True):
        grad = mine.grad.full_tensor() if isinstance(mine.grad, DTensor) else mine.grad
        assert_close_fp64(grad, expected.grad)
        assert expected.grad.any() and (kind == "ddp" or isinstance(mine.grad, DTensor))


def main(kind: str) -> None:
    with world() as rank:
        compare(kind, rank)


if __name__ == "__main__":
    main(*sys.argv[1:])
