"""Self-attention of a causal Wan video model, by FlexAttention or by mirasol-kernels: `python examples/causal_wan.py`.

The call is the one of CausVid, Self-Forcing and LongLive (wan/modules/causal_model.py); the code is ours.  The one line
that switches is where the mask is made: `flex_mask(21, 1560, 3)` or `chunk_causal(21, 1560, 3)`.  Streaming takes a
`RollingCache` where those take a dict.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mirasol_kernels import SnippetLayout
from mirasol_kernels.integrations.video_diffusion import RollingCache, attention, chunk_causal


def flex_mask(num_frames: int, frame_seqlen: int, num_frame_per_block: int = 1) -> BlockMask:
    """The chunk-causal mask as FlexAttention takes it: padded to a multiple of 128; padding sees itself alone."""
    tokens, chunk = num_frames * frame_seqlen, num_frame_per_block * frame_seqlen
    padded = math.ceil(tokens / 128) * 128

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q == k) | ((q < tokens) & (k < tokens) & (k < (q // chunk + 1) * chunk))

    return create_block_mask(seen, None, None, padded, padded, device="cpu")


def by_flex(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
    """Padded, transposed, attended, cut, transposed: (B, N, H, D) -> (B, N, H, D)."""
    tokens, padding = q.shape[1], block_mask.shape[-2] - q.shape[1]
    q, k, v = (nn.functional.pad(x, (0, 0, 0, 0, 0, padding)).transpose(1, 2) for x in (q, k, v))
    return flex_attention(q, k, v, block_mask=block_mask)[:, :, :tokens].transpose(1, 2)


def rope_table(dim: int, positions: int = 1024) -> Tensor:
    """(positions, dim / 2) rotations: of a head's pairs, the first part turns with time, then height, then width."""
    pairs = dim // 2
    spatial = pairs // 3
    parts = []
    for size in (pairs - 2 * spatial, spatial, spatial):
        angle = torch.outer(torch.arange(positions), 10000 ** -(torch.arange(size) / size))
        parts.append(torch.polar(torch.ones_like(angle), angle))
    return torch.cat(parts, 1)


def rope(x: Tensor, grid: tuple[int, int, int], freqs: Tensor, start_frame: int = 0) -> Tensor:
    """x (B, f * h * w, H, D), rotated by the place of each token in the video."""
    f, h, w = grid
    spatial = freqs.shape[1] // 3
    time, high, wide = freqs.split([freqs.shape[1] - 2 * spatial, spatial, spatial], 1)
    turn = torch.cat(
        [
            time[start_frame : start_frame + f].view(f, 1, 1, -1).expand(f, h, w, -1),
            high[:h].view(1, h, 1, -1).expand(f, h, w, -1),
            wide[:w].view(1, 1, w, -1).expand(f, h, w, -1),
        ],
        -1,
    ).reshape(f * h * w, 1, -1)  # (N, 1, D/2)
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))  # (B, N, H, D/2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


class CausalWanSelfAttention(nn.Module):
    def __init__(self, dim: int, num_heads: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim, eps), nn.RMSNorm(dim, eps)

    def forward(
        self,
        x: Tensor,
        seq_lens: Tensor,
        grid_sizes: Tensor,
        freqs: Tensor,
        block_mask: SnippetLayout | BlockMask | None,
        kv_cache: RollingCache | None = None,
        current_start: int = 0,
    ) -> Tensor:
        """x (B, N, C), or [clean | noisy] (B, 2 * N, C) for teacher forcing -> the same shape.

        seq_lens (B,): N.  grid_sizes (B, 3): frames, height, width, the same for every row.  freqs: `rope_table`.
        """
        grid = tuple(grid_sizes[0].tolist())
        q, k, v = (
            y.unflatten(2, (self.num_heads, -1)) for y in (self.norm_q(self.q(x)), self.norm_k(self.k(x)), self.v(x))
        )  # (B, N, H, D)
        start_frame = current_start // (grid[1] * grid[2])
        if x.shape[1] == 2 * int(seq_lens[0]):  # clean and noisy stand at the same place in time
            q, k = (torch.cat([rope(part, grid, freqs) for part in y.chunk(2, 1)], 1) for y in (q, k))
        else:
            q, k = (rope(y, grid, freqs, start_frame) for y in (q, k))
        if kv_cache is not None:
            out = kv_cache.attend(q, k, v, current_start)
        else:
            out = (
                attention(q, k, v, block_mask)
                if isinstance(block_mask, SnippetLayout)
                else by_flex(q, k, v, block_mask)
            )
        return self.o(out.flatten(2))


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    frames, height, width, chunk = 6, 4, 5, 3
    layer, freqs = CausalWanSelfAttention(64, 4), rope_table(16)
    x = torch.randn(1, frames * height * width, 64)
    where = torch.tensor([x.shape[1]]), torch.tensor([[frames, height, width]]), freqs
    ours = layer(x, *where, chunk_causal(frames, height * width, chunk))
    flex = layer(x, *where, flex_mask(frames, height * width, chunk))
    print(f"FlexAttention and mirasol-kernels differ by at most {(ours - flex).abs().max():.1e}")

    cache, grid, streamed = RollingCache(1, 4, 16, frame_seqlen=height * width, num_frames=frames), where[1].clone(), []
    grid[0, 0] = chunk
    for start, part in enumerate(x.split(chunk * height * width, 1)):
        place = start * chunk * height * width
        streamed.append(layer(part, where[0], grid, freqs, None, kv_cache=cache, current_start=place))
    print(f"chunk by chunk it differs from the whole by at most {(torch.cat(streamed, 1) - ours).abs().max():.1e}")


if __name__ == "__main__":
    main()
