"""Encoders: sparse video tubes, spectrogram patches, and the one ViT that reads both.

Tubes and their fixed positions follow TubeViT (arXiv 2212.03229, section 3 and Table 12). That one ViT with own patch
projections serves both modalities is said second-hand of Mirasol3B; widths, the tubes of short snippets, the audio
positions and the learned modality embeddings are ours.

Axes: N snippets (batch and time together), F frames per snippet, n tokens, D width. In both token streams the tokens
stand in the order of the time they end, so what is real in a snippet that ends early is a prefix, and one number
says which tokens count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_model.audio import SILENCE, count_frames
from mirasol_model.snippets import to_unit_range

NORM_EPS = 1e-6


class Tube(NamedTuple):
    """A strided 3-D convolution over (time, height, width) without padding; the offset cuts the video's beginning.

    `taps`: time length of the stored kernel, by default kernel[0]. A longer one is folded to kernel[0] frames by
    summing neighbouring taps, which is the stored kernel on the video in slow motion (each frame shown
    taps / kernel[0] times). So snippets of every length share one set of parameters.
    """

    kernel: tuple[int, int, int]
    stride: tuple[int, int, int]
    offset: tuple[int, int, int] = (0, 0, 0)
    taps: int | None = None

    def grid(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Tokens along each axis, floor((size - offset - kernel) / stride) + 1, zero where the tube does not fit."""
        sizes = frames, height, width
        t, h, w = (max((sizes[i] - self.offset[i] - self.kernel[i]) // self.stride[i] + 1, 0) for i in range(3))
        return t, h, w

    def slower(self, factor: int) -> Tube:
        """The same kernel on a snippet `factor` times shorter."""
        (kt, kh, kw), (st, sh, sw), (ot, oh, ow) = self.kernel, self.stride, self.offset
        folded = (max(kt // factor, 1), kh, kw)
        return Tube(folded, (max(st // factor, 1), sh, sw), (ot // factor, oh, ow), self.taps or kt)


# The set of the TubeViT paper for 32 x 224 x 224: 539 tokens by its own arithmetic; it prints 559.
TUBES_32 = (
    Tube((8, 8, 8), (16, 32, 32), (0, 0, 0)),
    Tube((16, 4, 4), (6, 32, 32), (4, 8, 8)),
    Tube((4, 12, 12), (16, 32, 32), (0, 16, 16)),
    Tube((1, 16, 16), (32, 16, 16), (0, 0, 0)),
)
# Ours for 8 frames, where the long tube does not fit: half the kernels' length, one step in time, 343 tokens.
TUBES_8 = (
    Tube((4, 8, 8), (8, 32, 32), (0, 0, 0), taps=8),
    Tube((8, 4, 4), (8, 32, 32), (0, 8, 8), taps=16),
    Tube((2, 12, 12), (8, 32, 32), (0, 16, 16), taps=4),
    Tube((1, 16, 16), (8, 16, 16), (0, 0, 0), taps=1),
)


def default_tubes(frames: int) -> tuple[Tube, ...]:
    """Tubes for snippets of `frames` frames (ours but for 32): all have the same parameters, and all of them fit."""
    if frames < 1:
        raise ValueError(f"default_tubes: frames: expected at least 1, got {frames}")
    if frames >= 32:
        return TUBES_32
    if frames >= 16:
        return tuple(tube.slower(2) for tube in TUBES_32)
    factor = 8 // 2 ** (min(frames, 8).bit_length() - 1)  # 1 from 8 frames on, 2 from 4, 4 from 2, 8 for one
    return tuple(tube.slower(factor) if factor > 1 else tube for tube in TUBES_8)


def sincos_positions(centres: Tensor, dim: int) -> Tensor:
    """centres (n, axes) -> (n, dim), fixed: per axis [sin(p w_k) | cos(p w_k)], w_k = 10000^(-k/K), K = dim // 2 axes.

    Layout of daniel-code/TubeViT@8df0d99 (its formula for square grids, where it is right); channels that do not
    divide by 2 * axes are zero. Computed in `centres`' dtype.
    """
    axes = centres.shape[1]
    half = dim // (2 * axes)
    if half < 1:
        raise ValueError(f"sincos_positions: dim: expected at least {2 * axes} for {axes} axes, got {dim}")
    frequency = 10000.0 ** (-torch.arange(half, dtype=centres.dtype, device=centres.device) / half)
    angle = centres[:, :, None] * frequency  # (n, axes, half)
    table = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (n, axes * 2 * half)
    return F.pad(table, (0, dim - table.shape[1]))


class _Tokenizer(nn.Module):
    """What both tokenizers share: a modality embedding and fixed positions, kept per grid, device and dtype."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim
        # Beside the biases of the projections: a warm start gives both modalities the same bias, and not this.
        self.modality = nn.Parameter(torch.empty(dim))
        self._tables: dict[tuple, Tensor] = {}

    def _centres(self, grid: tuple[int, ...]) -> Tensor:
        raise NotImplementedError

    def positions(self, grid: tuple[int, ...], like: Tensor) -> Tensor:
        """(n, dim) of `like`'s dtype and device. Not a buffer: nothing to store, to cast, or to lose in `to_empty`."""
        key = (grid, like.device, like.dtype)
        table = self._tables.get(key)
        if table is None:
            table = sincos_positions(self._centres(grid), self.dim).to(like)
            # A tensor of a trace must not outlive it. The bound is for data of ever new sizes.
            if not torch.compiler.is_compiling():
                if len(self._tables) == 16:
                    self._tables.clear()
                self._tables[key] = table
        return table


class TubeTokenizer(_Tokenizer):
    """video snippets (N, 3, F, H, W), float in [0, 1] or uint8 -> tokens (N, n_v, dim), any H and W.

    Each tube has its own kernel (dim, 3, taps, h, w) and bias. A token is computed from kernel[0] frames, and the
    tokens are sorted by the number of frames that must be there for it, offset + index * stride + kernel in time:
    those of a snippet with f < F real frames are the first `valid_tokens(f)`.
    """

    def __init__(self, dim: int, tubes: Sequence[Tube], *, frames: int, size: tuple[int, int] = (224, 224)):
        super().__init__(dim)
        self.tubes = tuple(Tube(*tube) for tube in tubes)
        self.frames, self.size = frames, size
        for tube in self.tubes:
            if min(tube.kernel) < 1 or min(tube.stride) < 1 or min(tube.offset) < 0:
                raise ValueError(f"TubeTokenizer: tubes: expected kernel, stride >= 1 and offset >= 0, got {tube}")
            if (tube.taps or tube.kernel[0]) % tube.kernel[0]:
                raise ValueError(f"TubeTokenizer: tubes: expected taps that kernel[0] divides, got {tube}")
        if not self.valid_tokens(frames):
            raise ValueError(f"TubeTokenizer: tubes: expected one that fits {frames} x {size}, got {self.tubes}")
        self.weights = nn.ParameterList(
            torch.empty(dim, 3, tube.taps or tube.kernel[0], *tube.kernel[1:]) for tube in self.tubes
        )
        self.biases = nn.ParameterList(torch.empty(dim) for _ in self.tubes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight, bias in zip(self.weights, self.biases, strict=True):
            nn.init.kaiming_normal_(weight, nonlinearity="linear")  # variance 1 / fan_in, of the folded kernel too
            nn.init.zeros_(bias)
        nn.init.normal_(self.modality, std=0.02)

    def planes(self) -> list[tuple[int, int, int]]:
        """(frames needed, tube, index in time) of every plane of tokens, in the order of the output."""
        return sorted(
            (tube.offset[0] + t * tube.stride[0] + tube.kernel[0], index, t)
            for index, tube in enumerate(self.tubes)
            for t in range(tube.grid(self.frames, 1, 1)[0])
        )

    def valid_tokens(self, frames: int, size: tuple[int, int] | None = None) -> int:
        """Tokens that read only the first `frames` frames of a snippet, of H, W = `size` (default: the declared)."""
        grids = [tube.grid(self.frames, *(size or self.size)) for tube in self.tubes]
        return sum(grids[index][1] * grids[index][2] for needed, index, _ in self.planes() if needed <= frames)

    def forward(self, video: Tensor) -> Tensor:
        if video.ndim != 5 or video.shape[1:3] != (3, self.frames):
            raise ValueError(f"TubeTokenizer: video: expected (N, 3, {self.frames}, H, W), got {tuple(video.shape)}")
        height, width = video.shape[3:]
        if not self.valid_tokens(self.frames, (height, width)):
            raise ValueError(f"TubeTokenizer: video: expected a size that a tube fits, got {height} x {width}")
        tokens = [
            self._project(video, tube, weight, bias)
            for tube, weight, bias in zip(self.tubes, self.weights, self.biases, strict=True)
        ]
        x = torch.cat([tokens[index][:, t] for _, index, t in self.planes()], dim=1)  # (N, n_v, dim)
        return x + (self.positions((height, width), self.modality) + self.modality)

    def _project(self, video: Tensor, tube: Tube, weight: Tensor, bias: Tensor) -> Tensor:
        """-> (N, t, h * w, dim). Gathering the tubes and one matmul beats conv3d at every size tried (2 threads, AMD
        EPYC, 4 snippets, D 192: 8 frames of 112 px 1.2 against 1.6 ms, of 224 px 3.5 against 5.2 ms, 32 frames of
        224 px 9.9 against 54 ms; with backward 1.3 to 6 times faster), and only the pixels read are converted."""
        grid = tube.grid(*video.shape[2:])
        if 0 in grid:
            return weight.new_zeros(len(video), grid[0], 0, self.dim)
        for axis in range(3):
            video = video.narrow(axis + 2, tube.offset[axis], video.shape[axis + 2] - tube.offset[axis])
        for axis in range(3):
            video = video.unfold(axis + 2, tube.kernel[axis], tube.stride[axis])  # (N, 3, t, h, w, kt, kh, kw) at last
        pixels = video.permute(0, 2, 3, 4, 1, 5, 6, 7).flatten(4).flatten(2, 3)  # (N, t, h * w, 3 * kt * kh * kw)
        kernel = weight.unflatten(2, (tube.kernel[0], -1)).sum(3)  # (dim, 3, kt, kh, kw)
        return F.linear(to_unit_range(pixels, weight.dtype), kernel.flatten(1), bias)

    def _centres(self, grid: tuple[int, ...]) -> Tensor:
        """(n_v, 3): index * stride + offset + kernel // 2 of every token in frames and pixels of the snippet."""
        height, width = grid
        planes = []
        for _, index, t in self.planes():
            tube = self.tubes[index]
            counts = (1, *tube.grid(self.frames, height, width)[1:])
            axes = [
                (torch.arange(count, dtype=torch.float64, device="cpu") + first) * stride + offset + kernel // 2
                for count, first, stride, offset, kernel in zip(
                    counts, (t, 0, 0), tube.stride, tube.offset, tube.kernel, strict=True
                )
            ]
            planes.append(torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2))  # (h * w, 3)
        return torch.cat(planes)


class AudioTokenizer(_Tokenizer):
    """log-mel spectrogram (N, frames, mel_bins) as of `LogMel` -> tokens (N, n_a, dim), one per patch x patch.

    Time-major, as many patches as touch a frame; the rest of the last one is silence. `window` and `hop` are those of
    the `LogMel` before it, in samples. Positions are fixed sin/cos of the patch centre in (frames, mel bins) (ours).
    """

    def __init__(self, dim: int, mel_bins: int = 128, patch: int = 16, *, window: int = 400, hop: int = 160):
        super().__init__(dim)
        if patch < 1 or mel_bins % patch:
            raise ValueError(f"AudioTokenizer: patch: expected a divisor of {mel_bins} mel bins, got {patch}")
        self.mel_bins, self.patch, self.window, self.hop = mel_bins, patch, window, hop
        # (mel, time) as in YuanGongND/ast@31088be, so that an image's upright patches stay upright.
        self.weight = nn.Parameter(torch.empty(dim, 1, patch, patch))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_normal_(self.weight, nonlinearity="linear")
        nn.init.zeros_(self.bias)
        nn.init.normal_(self.modality, std=0.02)

    def valid_tokens(self, samples: int) -> int:
        """Tokens of a snippet with `samples` real samples: those that see at least one real spectrogram frame."""
        frames = count_frames(samples, self.window, self.hop)
        return -(-frames // self.patch) * (self.mel_bins // self.patch)

    def forward(self, mel: Tensor) -> Tensor:
        if mel.ndim != 3 or mel.shape[2] != self.mel_bins or mel.shape[1] < 1:
            raise ValueError(f"AudioTokenizer: mel: expected (N, frames, {self.mel_bins}), got {tuple(mel.shape)}")
        mel = F.pad(mel.to(self.weight.dtype), (0, 0, 0, -mel.shape[1] % self.patch), value=SILENCE)
        patches = mel.unflatten(1, (-1, self.patch)).unflatten(3, (-1, self.patch))  # (N, t, time, m, mel)
        steps = patches.shape[1]
        patches = patches.permute(0, 1, 3, 4, 2).flatten(3).flatten(1, 2)  # (N, t * m, mel * time)
        x = F.linear(patches, self.weight.flatten(1), self.bias)  # (N, n_a, dim)
        return x + (self.positions((steps, self.mel_bins // self.patch), self.modality) + self.modality)

    def _centres(self, grid: tuple[int, ...]) -> Tensor:
        """(n_a, 2): centre of every patch in spectrogram frames and mel bins."""
        axes = [torch.arange(n, dtype=torch.float64, device="cpu") * self.patch + self.patch // 2 for n in grid]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block of google-research/scenic@4a38d475: x + attention(LN(x)), x + MLP(LN(x))."""

    def __init__(self, dim: int, heads: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.fc1 = nn.Linear(dim, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for part in self.qkv.weight.chunk(3):  # three square matrices, not one (3D, D): the fan decides the scale
            nn.init.xavier_uniform_(part)
        for layer in (self.proj, self.fc1, self.fc2):
            nn.init.xavier_uniform_(layer.weight)
        for layer in (self.qkv, self.proj, self.fc1, self.fc2):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, n, d)
        # Not block_causal_attention: compiled on a CPU it is up to 1.4 times as fast, 2 % of a block's training step,
        # but where nothing is compiled its reference would run, several times slower (NOTES.md). No GPU was measured.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2)  # (N, n, D)
        x = x + self.proj(attended)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class ViT(nn.Module):
    """tokens (N, n, dim) -> (N, n, dim): pre-norm blocks and a final LayerNorm; attention within a snippet is full.

    `valid`: how many leading tokens of each row are real. The others are seen by nobody, whatever they hold, come out
    as zeros and get no gradient; a row without any is zeros. Positions are in the tokens already.
    """

    def __init__(self, dim: int, layers: int, heads: int, mlp_dim: int):
        super().__init__()
        if dim % heads:
            raise ValueError(f"ViT: heads: expected a divisor of dim {dim}, got {heads}")
        self.dim = dim
        self.blocks = nn.ModuleList(EncoderBlock(dim, heads, mlp_dim) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)

    def forward(self, tokens: Tensor, valid: Tensor | Sequence[int] | None = None) -> Tensor:
        """valid (N): a tensor, or integers known on the host: if all of those say n, no mask is built."""
        if tokens.ndim != 3 or tokens.shape[2] != self.dim:
            raise ValueError(f"ViT: tokens: expected (N, n, {self.dim}), got {tuple(tokens.shape)}")
        absent = self._absent(tokens, valid)
        if absent is None:
            return self._encode(tokens, None)
        # A row without tokens would be a softmax over nothing: it sees its first, which is zero by now.
        seen = (~absent).index_fill(1, tokens.new_zeros(1, dtype=torch.int64), True)[:, None, None]  # (N, 1, 1, n)
        x = self._encode(tokens.masked_fill(absent[..., None], 0), seen)
        return x.masked_fill(absent[..., None], 0)

    def _encode(self, x: Tensor, seen: Tensor | None) -> Tensor:
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x)

    @staticmethod
    def _absent(tokens: Tensor, valid: Tensor | Sequence[int] | None) -> Tensor | None:
        """(N, n) bool, or None where every token is real."""
        rows, n = tokens.shape[:2]
        if valid is None:
            return None
        if len(valid) != rows:
            raise ValueError(f"ViT: valid: expected one number per row, {rows}, got {len(valid)}")
        if not isinstance(valid, Tensor):
            if not all(0 <= count <= n for count in valid):
                raise ValueError(f"ViT: valid: expected 0..{n}, got {list(valid)}")
            if all(count == n for count in valid):
                return None
        counts = torch.as_tensor(valid, device=tokens.device)
        return torch.arange(n, device=tokens.device) >= counts[:, None]
