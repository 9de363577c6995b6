"""One kernel in a model of your own: a video transformer whose frames see themselves, the last few frames and the
first, without a mask.

python examples/one_kernel.py [--frames 16] [--tokens 64] [--window 4]
"""

import argparse
import time

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_kernels import SnippetLayout, block_causal_attention


class FrameCausalBlock(nn.Module):
    """A pre-norm transformer block; what is particular about it is one line."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor, layout: SnippetLayout, dense: Tensor | None = None) -> Tensor:
        """x (B, N, dim); `dense`: the same with PyTorch's attention under a mask (N, N)."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, H, N, D)
        if dense is None:
            attended = block_causal_attention(q, k, v, layout)
        else:
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=dense)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--frames", type=int, default=16)
parser.add_argument("--tokens", type=int, default=64, help="in a frame (default: 64)")
parser.add_argument("--window", type=int, default=4, help="frames that a frame sees, itself included (default: 4)")
options = parser.parse_args()

layout = SnippetLayout.uniform(options.frames, options.tokens, window=options.window, sink=1)  # once, not per layer
print(layout)
block = FrameCausalBlock(256, 4)
x = torch.randn(1, layout.q_len, 256)
dense = layout.dense_mask("cpu")
for name, mask in (("block_causal_attention", None), ("a dense mask", dense)):
    block.zero_grad()
    begin = time.perf_counter()
    y = block(x, layout, mask)
    y.square().mean().backward()
    gradient = block.qkv.weight.grad.clone()
    print(f"{name}: mean square {y.square().mean():.6f}, {1e3 * (time.perf_counter() - begin):.0f} ms")
    if mask is None:
        kept = gradient
print(f"gradients differ by at most {(gradient - kept).abs().max() / kept.abs().max():.1e} of the largest")
