"""The backward of the fused steps by hand, in PyTorch: what kernels port, and what the Triton backend runs.

From the last step to the first, a step runs again from the memory before it, `kept`, and is differentiated: what lives
at a time is what one step saves.  Not by autograd, which is not there below a registered op where a mode of torch's
dispatcher is on.  The products, where the time goes, are torch's.  With e = exp(s - max) of the tokens x and a =
exp(max of the input - max), a pool is

    S = sum e + a sum       P = e^T x + a weighted       z = P / S

    dP = dz / S     dS = -(dz . z) / S     ds = e (x dP^T + dS)     dx = e dP + (the way through the logits)
    dsum = a dS     dweighted = a dP
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol_kernels.latent_recurrence.parts import join_heads, split_heads

EPS = 1e-6
POOL, BLOCK = 6, 16  # tensors of a token learner and of a block of the processor
Back = Callable[[Tensor], Tensor]  # from the gradient of a result to that of what it came from


class Step(NamedTuple):
    """What one step made, and how to go back through it."""

    memory: Tensor  # (B, mem, c), the next
    output: Tensor  # (B, r, c)
    # From the gradients of those two to that of the memory before, and of sum and weighted sum for read and for write.
    back: Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class Unit:
    """The unit of the machine: `step` runs and remembers; going back adds to the gradients of weights and tables."""

    def __init__(self, weights: list[Tensor], tables: list[Tensor | None], heads: int) -> None:
        """As in op.py's schema."""
        self.weights, self.tables, self.heads = weights, tables, heads
        self.dweights = [torch.zeros_like(x) for x in weights]
        self.dtables = [None if x is None else torch.zeros_like(x) for x in tables]

    def step(self, memory: Tensor, for_read: list[Tensor], for_write: list[Tensor]) -> Step:
        """From memory (B, mem, c) and the input's states of a step: max (B, k), sum (B, k), weighted sum (B, k, c)."""
        slots = memory.shape[1]
        z, back_read = self._pool(self._placed(memory, 0), 0, for_read)  # (B, r, c)
        x, backs = self._placed(z, 3), []
        for i in range(2 * POOL, len(self.weights) - 2, BLOCK):
            for layers in (self._attention, self._mlp):
                more, back_layers = layers(x, i)
                x = x + more
                backs.append(back_layers)
        output, back_norm = self._norm(x, len(self.weights) - 2)
        seen = torch.cat([self._placed(memory, 1), self._placed(output, 2)], 1)  # (B, mem + r, c)
        new, back_write = self._pool(seen, POOL, for_write)

        def back(dnew: Tensor, doutput: Tensor) -> tuple[Tensor, ...]:
            dseen, *of_write = back_write(dnew)
            dmemory, dy = dseen[:, :slots], dseen[:, slots:]
            self._add_to_tables(dmemory, 1)
            self._add_to_tables(dy, 2)
            dx = back_norm(dy + doutput)
            for back_layers in reversed(backs):
                dx = dx + back_layers(dx)
            self._add_to_tables(dx, 3)
            dread, *of_read = back_read(dx)
            self._add_to_tables(dread, 0)
            return dmemory + dread, *of_read, *of_write

        return Step(new, output, back)

    def _placed(self, x: Tensor, table: int) -> Tensor:
        added = self.tables[table]
        return x if added is None else x + added

    def _add_to_tables(self, dx: Tensor, table: int) -> None:
        total = self.dtables[table]
        if total is not None:
            total += dx.sum(0)

    def _linear(self, x: Tensor, i: int) -> tuple[Tensor, Back]:
        """Weight and bias are i and i + 1."""

        def back(dy: Tensor) -> Tensor:
            rows = dy.flatten(0, 1)
            self.dweights[i].addmm_(rows.mT, x.flatten(0, 1))
            self.dweights[i + 1] += rows.sum(0)
            return dy @ self.weights[i]

        return F.linear(x, self.weights[i], self.weights[i + 1]), back

    def _norm(self, x: Tensor, i: int) -> tuple[Tensor, Back]:
        shape, weight, bias = [x.shape[-1]], self.weights[i], self.weights[i + 1]
        y, mean, rstd = torch.native_layer_norm(x, shape, weight, bias, EPS)

        def back(dy: Tensor) -> Tensor:
            every = [True, True, True]
            dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(
                dy.contiguous(), x, shape, mean, rstd, weight, bias, every
            )
            self.dweights[i] += dweight
            self.dweights[i + 1] += dbias
            return dx

        return y, back

    def _layers(self, x: Tensor, norm: int, hidden: int, out: int) -> tuple[Tensor, Back]:
        """Norm, hidden layer with GELU and second layer, by the numbers of their weights."""
        normed, back_norm = self._norm(x, norm)
        z, back_hidden = self._linear(normed, hidden)
        y, back_out = self._linear(F.gelu(z, approximate="tanh"), out)

        def back(dy: Tensor) -> Tensor:
            return back_norm(back_hidden(torch.ops.aten.gelu_backward(back_out(dy), z, approximate="tanh")))

        return y, back

    def _mlp(self, x: Tensor, i: int) -> tuple[Tensor, Back]:
        return self._layers(x, i + 10, i + 12, i + 14)

    def _attention(self, x: Tensor, i: int) -> tuple[Tensor, Back]:
        normed, back_norm = self._norm(x, i)
        each, backs = zip(*(self._linear(normed, i + j) for j in (2, 4, 6)), strict=True)
        q, k, v = (split_heads(y, self.heads) for y in each)  # (B, H, r, D)
        scale = q.shape[-1] ** -0.5
        p = (q @ k.mT * scale).softmax(-1)  # (B, H, r, r)
        y, back_out = self._linear(join_heads(p @ v), i + 8)

        def back(dy: Tensor) -> Tensor:
            dseen = split_heads(back_out(dy), self.heads)
            ds = torch.ops.aten._softmax_backward_data(dseen @ v.mT, p, -1, p.dtype) * scale
            dq, dk, dv = (join_heads(dx) for dx in (ds @ k, ds.mT @ q, p.mT @ dseen))
            return back_norm(backs[0](dq) + backs[1](dk) + backs[2](dv))

        return y, back

    def _pool(self, x: Tensor, i: int, of_input: list[Tensor]) -> tuple[Tensor, Callable]:
        """Means (B, k, c) over tokens x (B, n, c), n at least 1, and the input; back gives dx, dsum and dweighted."""
        s, back_logits = self._layers(x, i, i + 2, i + 4)  # (B, n, k)
        maximum, total, weighted = of_input
        pivot = torch.maximum(s.amax(1), maximum)  # (B, k)
        e, a = (s - pivot[:, None]).exp(), (maximum - pivot).exp()
        sums = e.sum(1) + a * total
        z = (e.mT @ x + a[..., None] * weighted) / sums[..., None]

        def back(dz: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            dweighted, dsum = dz / sums[..., None], -(dz * z).sum(-1) / sums
            ds = e * (x @ dweighted.mT + dsum[:, None])
            return e @ dweighted + back_logits(ds), a * dsum, a[..., None] * dweighted

        return z, back


def backward(
    dmemory: Tensor,
    doutputs: Tensor,
    kept: Tensor,
    for_read: list[Tensor],
    for_write: list[Tensor],
    weights: list[Tensor],
    tables: list[Tensor | None],
    heads: int,
) -> list[Tensor]:
    """The gradients of op.py's schema, in its order, from those of the last memory (B, mem, c) and of all outputs
    (B, T, r, c); kept (B, T, mem, c) is the memory before each step."""
    unit = Unit(weights, tables, heads)
    of_inputs = [torch.empty_like(x) for x in (*for_read[1:], *for_write[1:])]
    for t in reversed(range(kept.shape[1])):
        step = unit.step(kept[:, t], [x[:, t] for x in for_read], [x[:, t] for x in for_write])
        dmemory, *grads = step.back(dmemory, doutputs[:, t])
        for total, grad in zip(of_inputs, grads, strict=True):
            total[:, t] = grad
    return [dmemory.contiguous(), *of_inputs, *unit.dweights, *(x for x in unit.dtables if x is not None)]
