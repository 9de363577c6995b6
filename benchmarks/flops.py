"""What our ops compute, in flops: formulas for torch's FlopCounterMode, which knows no operators but torch's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mirasol_kernels import SnippetLayout
from mirasol_kernels._dispatch import Op

OF_BLOCK = 16  # tensors of a block in the weights of a Token Turing Machine, of which those of read and write are first
OF_LEARNER = 6  # norm_weight, norm_bias, w1, b1, w2, b2


def dense(q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: Any, **__: Any) -> int:
    """Of shapes."""
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def dense_backward(dout: Sequence[int], *qkv: Any, **_: Any) -> int:
    return 5 * dense(*qkv) // 2


# torch's attention on a CPU: FlopCounterMode knows the operators of GPUs only.
DENSE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: dense,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: dense_backward,
}


@contextmanager
def counted_ops() -> Iterator[dict[Any, Any]]:
    """-> the `custom_mapping` of a FlopCounterMode that is used within: useful flops of every fused backend.

    Attention is counted by pairs that see each other, not by rectangles, so layouts are watched.
    """
    pairs: dict[int, tuple[int, Any]] = {}  # by the identity of a layout's tables; which are kept alive
    tables = SnippetLayout.tables

    def noted(self: SnippetLayout, device: Any = "cpu") -> Any:
        made = tables(self, device)
        pairs[id(made.k_ranges)] = (sum(row.seen for row in self._rows), made)
        return made

    def attention(matmuls: int, q: Tensor, v: Tensor, k_ranges: Tensor) -> int:
        seen, _ = pairs[id(k_ranges)]
        batch = q.shape[0] // len(k_ranges)
        return matmuls * batch * q.shape[1] * seen * (q.shape[3] + v.shape[3])

    def forward(q: Tensor, k: Tensor, v: Tensor, q_offsets: Tensor, k_ranges: Tensor, *_: Any, **__: Any) -> int:
        return attention(2, q, v, k_ranges)  # scores and values: 2 flops for each product of a pair

    def backward(dout: Tensor, dlse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **_: Any) -> int:
        return attention(5, q, v, rest[4])  # scores again, and the gradients of weights, q, k and v

    formulas: dict[str, dict[str, Callable[..., int]]] = {
        "block_causal_attention": {"fwd": forward, "bwd": backward},
        "token_learner": {"fwd": learner, "bwd": learner_backward},
        "latent_recurrence": {"fwd": machine, "bwd": machine_backward},
    }
    mapping: dict[Any, Any] = dict(DENSE)
    for op in Op.all:
        for part, formula in formulas[op.name].items():
            formula.__dict__["_get_raw"] = True  # the tensors, not their shapes
            mapping |= {backend.calls[part].overloadpacket: formula for backend in op.backends}
    with patch.object(SnippetLayout, "tables", noted):
        yield mapping


def learner(
    sources: Sequence[Tensor], positions: Any, norm: Any, norm_bias: Any, w1: Tensor, *rest: Any, **_: Any
) -> int:
    logits, pooling = learned(sources, w1, rest[1], rest[3])
    return logits + pooling


def learner_backward(dpooled: Any, dsum: Any, maximum: Any, total: Any, pooled: Any, *call: Any, **_: Any) -> int:
    """Logits again, and two products for each product of forward."""
    sources, w1, w2, valid = call[0], call[4], call[6], call[8]
    logits, pooling = learned(sources, w1, w2, valid)
    return 3 * logits + 2 * pooling


def learned(sources: Sequence[Tensor], w1: Tensor, w2: Tensor, valid: Tensor | None) -> tuple[int, int]:
    """Flops of the logits of all tokens that count, and of their weighted sum."""
    (h, c), k = w1.shape, w2.shape[0]
    tokens = sum(x.shape[0] * x.shape[1] for x in sources) if valid is None else int(valid.sum())
    return 2 * tokens * (c * h + h * k), 2 * tokens * k * c


def machine(
    memory: Tensor, for_read: Sequence[Tensor], for_write: Any, weights: Sequence[Tensor], *_: Any, **__: Any
) -> int:
    """Of all steps: read and write pool memory (the inputs have been pooled before), blocks work on what was read."""
    batch, steps, read, c = for_read[2].shape
    slots, h, g = memory.shape[1], len(weights[2]), len(weights[OF_LEARNER + 2])  # widths of the hidden layers
    blocks = weights[2 * OF_LEARNER : -2]
    linear = sum(w.numel() for w in blocks if w.ndim == 2)
    reading = slots * (c * h + h * read + read * c)
    thinking = read * linear + len(blocks) // OF_BLOCK * 2 * read * read * c
    writing = (slots + read) * (c * g + g * slots + slots * c)
    return 2 * batch * steps * (reading + thinking + writing)


def machine_backward(dmemory: Any, doutputs: Any, kept: Any, *call: Any, **_: Any) -> int:
    """Two products for each product of forward; what is computed again is not counted."""
    return 2 * machine(*call)
