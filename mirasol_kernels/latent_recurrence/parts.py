"""What both forms of the Token Turing Machine do with a few tokens: the processors and the AddErase write.

Everywhere: LayerNorm with eps 1e-6, tanh GELU, tokens (B, n, c).  Source: google-research/scenic@4a38d475,
projects/token_turing/model.py, projects/baselines/{vit,mixer}.py and model_lib/layers/attention_layers.py.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mirasol_kernels.latent_recurrence.modules import (
    AddErase,
    Attention,
    LearnedMlp,
    Linear,
    MixerBlock,
    Mixture,
    Mlp,
    MlpBlock,
    Norm,
    Processor,
    TransformerBlock,
)


def linear(x: Tensor, p: Linear) -> Tensor:
    return F.linear(x, p.weight, p.bias)


def norm(x: Tensor, p: Norm) -> Tensor:
    return F.layer_norm(x, p.weight.shape, p.weight, p.bias, 1e-6)


def mlp(x: Tensor, p: Mlp) -> Tensor:
    return linear(F.gelu(linear(x, p.hidden), approximate="tanh"), p.out)


def logits(x: Tensor, p: LearnedMlp) -> Tensor:
    return mlp(norm(x, p.norm), p.mlp)


def split_heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)  # (B, n, c) -> (B, H, n, D)


def join_heads(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)  # (B, H, n, D) -> (B, n, c)


def self_attention(x: Tensor, p: Attention) -> Tensor:
    q, k, v = (split_heads(linear(x, w), p.heads) for w in (p.q, p.k, p.v))
    return linear(join_heads(F.scaled_dot_product_attention(q, k, v)), p.out)


def process(x: Tensor, p: Processor) -> Tensor:
    """The tokens (B, r, c) between read and write; ends in a norm."""
    if p.positions is not None:
        x = x + p.positions
    for block in p.blocks:
        match block:
            case TransformerBlock():
                x = x + self_attention(norm(x, block.norm1), block.attention)
                x = x + mlp(norm(x, block.norm2), block.mlp)
            case MixerBlock():
                x = x + mlp(norm(x, block.norm1).mT, block.tokens).mT
                x = x + mlp(norm(x, block.norm2), block.channels)
            case MlpBlock():
                x = mlp(norm(x, block.norm), block.mlp)  # the reference has no residual here
    return norm(x, p.norm)


def mixture(x: Tensor, p: Mixture) -> Tensor:
    """One vector per write head from r tokens: (B, r, c) -> (B, heads, c)."""
    return mlp(mlp(norm(x, p.norm).mT, p.tokens).mT, p.channels)


def add_erase(memory: Tensor, control: Tensor, p: AddErase, form: str) -> Tensor:
    """The next memory (B, mem, c) from the processed tokens `control` (B, r, c); form "paper" or "scenic"."""
    where = logits(memory, p.address).softmax(1)[..., None]  # (B, mem, heads, 1): over memory slots
    erase = mixture(control, p.erase)[:, None]  # (B, 1, heads, c)
    add = mixture(control, p.add)[:, None]
    if form == "paper":
        return memory * (1 - where * erase.sigmoid()).prod(2) + (where * add).sum(2)
    return memory * (1 - where * erase).prod(2) + (1 - where * add).mean(2)
