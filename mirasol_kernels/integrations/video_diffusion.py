"""Autoregressive video diffusion of the CausVid family (Self-Forcing, LongLive, and others built on causal Wan).

A video is `num_frames` latent frames of `frame_seqlen` tokens, denoised in chunks of `num_frame_per_block` frames; with
`independent_first_frame` (image to video) the first frame is a chunk of its own and the rest are chunks of that size.
Tensors are (B, N, H, D) as these models have them; nothing is padded to 128 and nothing is copied.

    block_mask = chunk_causal(21, 1560, 3)            # in place of _prepare_blockwise_causal_attn_mask
    x = attention(q, k, v, block_mask)                # in place of pad, transpose, flex_attention, transpose, cut
    x = cache.attend(q, k, v, current_start)          # in place of roll, clone, insert, attend

What a chunk sees follows guandeh17/Self-Forcing@33593df3 (wan/modules/causal_model.py), tianweiy/CausVid@ca211503 and
NVlabs/LongLive@7860ad96.  A window is counted in frames, back from the end of the chunk, and may cut an earlier chunk.
`local_attn_size` frames are seen in all (-1: all), `sink_size` of them the first ones of the video: what their
inference attends to, so that training and streaming see the same.  Their training masks know no sink.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mirasol_kernels._autocast import autocast_dtype, without_autocast
from mirasol_kernels._dispatch import explaining
from mirasol_kernels.block_causal_attention import SnippetCache, block_causal_attention
from mirasol_kernels.block_causal_attention.api import cast
from mirasol_kernels.layout import SnippetLayout


def chunk_causal(
    num_frames: int,
    frame_seqlen: int,
    num_frame_per_block: int = 1,
    *,
    local_attn_size: int = -1,
    sink_size: int = 0,
    independent_first_frame: bool = False,
) -> SnippetLayout:
    """A chunk sees itself and the earlier frames of its window, and the sinks.  Arguments: see the module.

    Raises ValueError naming the argument where frames and chunks do not add up, or the window does not hold a chunk.
    """
    frames = _chunks("chunk_causal", num_frames, frame_seqlen, num_frame_per_block, independent_first_frame)
    window = _window("chunk_causal", local_attn_size, sink_size, frames)
    slices = []
    for begin, end in frames:
        slices += [((begin, end), seen) for seen in _seen(end, end, window, sink_size)]
    return _layout(slices, frame_seqlen, num_frames)


def teacher_forcing(
    num_frames: int,
    frame_seqlen: int,
    num_frame_per_block: int = 1,
    *,
    local_attn_size: int = -1,
    sink_size: int = 0,
    independent_first_frame: bool = False,
) -> SnippetLayout:
    """The sequence [clean | noisy] of 2 * num_frames frames.  Clean is `chunk_causal`; a noisy chunk sees itself and,
    of the clean frames that the clean chunk at its place sees, the strictly earlier chunks.

    Arguments and errors as `chunk_causal`.
    """
    frames = _chunks("teacher_forcing", num_frames, frame_seqlen, num_frame_per_block, independent_first_frame)
    window = _window("teacher_forcing", local_attn_size, sink_size, frames)
    slices = []
    for begin, end in frames:
        slices += [((begin, end), seen) for seen in _seen(end, end, window, sink_size)]
        noisy = (num_frames + begin, num_frames + end)
        slices += [(noisy, seen) for seen in [noisy, *_seen(end, begin, window, sink_size)]]
    return _layout(slices, frame_seqlen, 2 * num_frames)


def text_per_chunk(
    chunk_tokens: Sequence[int], text_lengths: Sequence[int], prompts: Sequence[int] | None = None
) -> SnippetLayout:
    """Cross-attention in which every chunk sees the text of its own prompt and no other.

    chunk_tokens: (C,), the queries.  text_lengths: (P,), prompts end to end as the keys.  prompts: (C,), which prompt
    each chunk is under; None is one each, in order.  So a prompt switch is a number in a list, for a whole video in one
    call.  Raises ValueError naming the argument.
    """
    chosen = list(range(len(chunk_tokens))) if prompts is None else list(prompts)
    if len(chosen) != len(chunk_tokens):
        raise ValueError(f"text_per_chunk: prompts: expected {len(chunk_tokens)} like chunk_tokens, got {len(chosen)}")
    wrong = [p for p in chosen if not 0 <= p < len(text_lengths)]
    if wrong:
        raise ValueError(f"text_per_chunk: prompts: expected 0 .. {len(text_lengths) - 1}, got {wrong[0]}")
    return SnippetLayout.cross(chunk_tokens, text_lengths, [p + 1 for p in chosen], chosen)


def attention(q: Tensor, k: Tensor, v: Tensor, block_mask: SnippetLayout, *, backend: str | None = None) -> Tensor:
    """`block_causal_attention` of (B, N, H, D) -> (B, Nq, H, D), differentiable, without a copy.

    q: (B, Nq, H, D), k, v: (B, Nk, Hkv, D).  Fused backends return it contiguous, so that `flatten(2)` is a view.
    Errors as `block_causal_attention`, whose names for axes are (B, H, N, D).
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if isinstance(x, Tensor) and x.ndim != 4:
            raise ValueError(f"attention: {name}: expected (batch, tokens, heads, head_dim), got {tuple(x.shape)}")
    q, k, v = (x.transpose(1, 2) if isinstance(x, Tensor) else x for x in (q, k, v))  # (B, H, N, D), views
    return block_causal_attention(q, k, v, block_mask, backend=backend).transpose(1, 2)


class RollingCache:
    """Keys and values of a video that is generated chunk by chunk: the first `sink_size` frames and the latest others,
    `local_attn_size` in all, in memory that is allocated once and never moved.

    It stands for one layer's dict of k, v, global_end_index and local_end_index.  Where they shift what is left of the
    window by cloning it, here the newest frames overwrite the oldest ones in a ring (`SnippetCache`): attention does
    not ask in which order its keys stand, since they were rotated before they were stored.  Hence not for LongLive's
    relative RoPE, which rotates stored keys anew at every step.

    num_frames: with local_attn_size -1, how many frames there can be; more is an error, never a roll.
    What is stored carries no gradient; dtype and device are those of k and v.  Under autocast q, k and v are cast to
    dtype, and that is the result's.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        *,
        frame_seqlen: int,
        local_attn_size: int = -1,
        sink_size: int = 0,
        num_frames: int = 21,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.most = None if local_attn_size != -1 else num_frames * frame_seqlen
        window = num_frames if local_attn_size == -1 else local_attn_size - sink_size
        if window < 1:
            raise ValueError(
                f"RollingCache: local_attn_size: expected -1 or more than sink_size = {sink_size},"
                f" got {local_attn_size}"
            )
        sink = 0 if local_attn_size == -1 else sink_size
        self.frames = SnippetCache(
            batch, heads, head_dim, snippet_tokens=frame_seqlen, window=window, sink=sink, dtype=dtype, device=device
        )
        self.end = 0  # tokens of the video so far; a number on the host, so that no step waits for the device

    def attend(self, q: Tensor, k: Tensor, v: Tensor, current_start: int, *, backend: str | None = None) -> Tensor:
        """Store the chunk at token `current_start`, or store it again, and attend to all that it sees.

        q: (B, n, Hq, D), k, v: (B, n, H, D), rotated; n is a number of whole frames, at most the window's.
        current_start: where the video so far ends; or, at a further denoising step, where the newest chunk began.
        Returns (B, n, Hq, D).  Where q, k or v ask for gradients (Self-Forcing's training), they get them, and the
        earlier frames are constants; this copies the keys that are seen, since the ring moves on before backward.  Not
        under `torch.utils.checkpoint`, which would store the chunk once more in backward.
        Raises ValueError or TypeError naming the argument before anything is stored.
        """
        for name, x in (("q", q), ("k", k), ("v", v)):
            if not isinstance(x, Tensor):
                raise TypeError(f"RollingCache: {name}: expected a tensor, got {type(x).__name__}")
            if x.ndim != 4:
                raise ValueError(
                    f"RollingCache: {name}: expected (batch, tokens, heads, head_dim), got {tuple(x.shape)}"
                )
        dtype, device = self.frames.k.dtype, self.frames.k.device.type
        if autocast_dtype(device) is not None:  # norms give float32 beside the bfloat16 of linear layers
            q, k, v = (cast(x, dtype) for x in (q, k, v))
        batch, tokens, heads, dim = k.shape
        if q.shape[:2] != k.shape[:2] or q.shape[3] != dim or q.shape[2] % max(1, heads):
            expected = f"(batch {batch}, tokens {tokens}, a multiple of {heads} heads, head_dim {dim}) like k"
            raise ValueError(f"RollingCache: q: expected {expected}, got {tuple(q.shape)}")
        if q.dtype != k.dtype:
            raise TypeError(f"RollingCache: q: expected {k.dtype} like k, got {q.dtype}")
        if q.device != k.device:
            raise ValueError(f"RollingCache: q: expected a tensor on {k.device} like k, got one on {q.device}")
        again = current_start == self.end - tokens and tokens > 0
        if not again and current_start != self.end:
            raise ValueError(
                f"RollingCache: current_start: expected {self.end}, where the video so far ends, or {self.end - tokens}"
                f" to store its last {tokens} tokens again, got {current_start}"
            )
        if self.most is not None and current_start + tokens > self.most:
            raise ValueError(
                f"RollingCache: current_start: expected at most {self.most} tokens in all (num_frames), got"
                f" {current_start} + {tokens}"
            )
        if explaining():  # before anything is stored
            self.frames.attend(q.transpose(1, 2), backend=backend)
        learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
        earlier = self._before(current_start, tokens) if learns else ()
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, n, D), views
        self.frames.append(k, v, replace=again)
        self.end = current_start + tokens
        if not learns:
            return self.frames.attend(q, backend=backend).transpose(1, 2)
        k, v = (torch.cat([old, new], 2) for old, new in zip(earlier, (k, v), strict=True))
        layout = SnippetLayout.cross([tokens], [k.shape[2]], [1])
        with without_autocast(device):  # in the cache's dtype, with gradients and without
            return block_causal_attention(q, k, v, layout, backend=backend).transpose(1, 2)

    def _before(self, start: int, tokens: int) -> list[Tensor]:
        """Copies of the keys and values of earlier frames that a chunk of `tokens` at `start` sees, (B, H, m, D)."""
        size, window, sink = self.frames.snippet_tokens, self.frames.window, self.frames.sink
        first, end = start // size, (start + tokens) // size
        seen = [*range(min(sink, first)), *range(max(sink, end - window), first)]
        slots = [frame if frame < sink else sink + (frame - sink) % window for frame in seen]
        return [x.unflatten(2, (-1, size))[:, :, slots].flatten(2, 3) for x in (self.frames.k, self.frames.v)]

    def reset(self) -> None:
        """Forget the video: the next chunk starts at 0."""
        self.frames.reset()
        self.end = 0


Frames = tuple[int, int]  # [begin, end)


def _chunks(where: str, num_frames: int, frame_seqlen: int, chunk: int, first_alone: bool) -> list[Frames]:
    """The frames of every chunk."""
    for name, number in (("num_frames", num_frames), ("frame_seqlen", frame_seqlen), ("num_frame_per_block", chunk)):
        if not isinstance(number, int) or number < 1:
            raise ValueError(f"{where}: {name}: expected an integer of at least 1, got {number!r}")
    alone = int(first_alone)
    if (num_frames - alone) % chunk:
        raise ValueError(
            f"{where}: num_frames: expected {'1 + ' if alone else ''}a multiple of num_frame_per_block = {chunk}, got"
            f" {num_frames}"
        )
    starts = [0] * alone + list(range(alone, num_frames, chunk))
    return list(zip(starts, [*starts[1:], num_frames], strict=True))


def _window(where: str, local_attn_size: int, sink_size: int, chunks: Sequence[Frames]) -> int | None:
    """How many frames up to the end of its own chunk a token sees; None for all."""
    if not isinstance(sink_size, int) or sink_size < 0:
        raise ValueError(f"{where}: sink_size: expected an integer of at least 0, got {sink_size!r}")
    if local_attn_size == -1:
        return None
    longest = max(end - begin for begin, end in chunks)
    if not isinstance(local_attn_size, int) or local_attn_size - sink_size < longest:
        raise ValueError(
            f"{where}: local_attn_size: expected -1 or at least sink_size + num_frame_per_block = "
            f"{sink_size} + {longest}, got {local_attn_size!r}"
        )
    return local_attn_size - sink_size


def _seen(end: int, upto: int, window: int | None, sink: int) -> list[Frames]:
    """Of frames [0, upto), those that a chunk which ends before frame `end` sees."""
    if window is None:
        return [(0, upto)]
    return [(0, min(sink, upto)), (min(max(0, end - window), upto), upto)]


def _layout(slices: Sequence[tuple[Frames, Frames]], frame_seqlen: int, num_frames: int) -> SnippetLayout:
    """From frames to tokens."""
    queries, keys = ([(a * frame_seqlen, b * frame_seqlen) for a, b in side] for side in zip(*slices, strict=True))
    tokens = num_frames * frame_seqlen
    return SnippetLayout.from_ranges(queries, keys, q_len=tokens, k_len=tokens)
