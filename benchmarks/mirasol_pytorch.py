"""mirasol-pytorch, the only other Mirasol that can be installed, as one more candidate of the sweep.

python -m benchmarks.sweep --combiner current --mirasol-pytorch PYTHON

PYTHON: of an environment with torch, mirasol-pytorch 0.0.16 and the x-transformers 1.26 that it works with, which may
be this one.  It runs there, in a process of its own that takes its turns, as another commit does (`against`).  It is
built as wide and as deep as ours, with about as many tokens a snippet, and reads a spectrogram where ours makes one:
like for like in what the time goes into, and not the same function, so that it has no error here.  Its Combiner sees
the current snippet only, and it shrinks the pictures that it predicts to one patch.

Its rearrangement of the spectrogram, `b f (t tc) -> b tc f t`, takes the columns of a snippet for the number of
snippets, so that both must be equal: here they are, with patches as wide as that makes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.elsewhere import Other

NAME = "mirasol-pytorch"
ROWS, PATCH = 4, 16  # of a spectrogram's patches: rows of them, and their size
START = """
import sys
sys.path.insert(0, {root!r})
from benchmarks import elsewhere, mirasol_pytorch
elsewhere.serve({threads}, mirasol_pytorch.begin)
"""


def start(python: str, threads: int) -> Other:
    return Other(harness.ROOT, threads, START, python)


def settings(config: Any, frames_of_clip: int, video_tokens: int, audio_tokens: int) -> dict[str, Any]:
    """What it is built with to be like `config`, whose snippets have so many tokens. dim: a multiple of 12."""
    frames, size = config.video.frames, config.video.size
    per_picture = (size // PATCH) ** 2
    depths = [depth for depth in range(1, frames + 1) if frames % depth == 0]
    time = min(depths, key=lambda depth: abs(per_picture * (frames // depth) - video_tokens))
    columns = max(1, round(audio_tokens / ROWS))
    width = -(-frames_of_clip // frames // columns)  # of a patch: (columns of them) snippets, or a few more
    heads, dim = config.encoder.heads, config.encoder.dim
    encoder = {"depth": config.encoder.layers, "heads": heads, "attn_dim_head": dim // heads}
    return {
        "dim": dim, "num_text_tokens": config.text.vocabulary, "video_image_size": size,
        "video_frames_per_timechunk": frames, "audio_freq_dim": ROWS * PATCH,
        "audio_time_dim_per_timechunk": columns * width, "audio_patch_size": (PATCH, width),
        "video_patch_size": (PATCH, time), "video_recon_patch_size": (PATCH, time), "audio_encoder": encoder,
        "video_encoder": encoder, "encoder_depth": config.latent.layers, "decoder_depth": config.text.layers,
        "combiner_depth": config.combiner.layers, "combiner_output_num_tokens": config.combiner.tokens,
        "attn_dim_head": dim // heads, "attn_heads": heads,
    }  # fmt: skip


class There:
    """Its step, as a candidate of `harness.interleave`: the clock is in the other process."""

    def __init__(self, other: Other, built: dict[str, Any], frames: int, text: int, train: bool) -> None:
        self.other, self.parameters = other, other.ask("begin", built, frames, text, train)

    def clock(self) -> float:
        return self.other.turn()

    def memory(self) -> harness.Memory:
        return harness.Memory(*self.other.ask("memory"))


def begin(built: dict[str, Any], frames: int, text: int, train: bool) -> tuple[Callable[[], Any], str, int]:
    """One pass, with `train` forward and backward, run once -> the work, its device, and how many parameters."""
    from mirasol_pytorch import Mirasol

    torch.manual_seed(0)
    model = Mirasol(**built).eval()
    chunks, size = built["audio_time_dim_per_timechunk"], built["video_image_size"]
    call = {
        "video": torch.rand(1, 3, frames, size, size),
        "audio": torch.randn(1, built["audio_freq_dim"], chunks**2),
        "text": torch.randint(0, built["num_text_tokens"], (1, text)),
    }

    def work() -> None:
        model.zero_grad()
        with torch.set_grad_enabled(train):
            out = model(**call, return_loss=train)
            if train:
                out.backward()

    work()
    return work, "cpu", sum(parameter.numel() for parameter in model.parameters())
