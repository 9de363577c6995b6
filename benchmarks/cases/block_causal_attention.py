"""Shapes that people have, on a CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import DIRECTIONS, Truth
from mirasol_kernels import SnippetLayout, block_causal_attention
from mirasol_kernels.integrations.video_diffusion import chunk_causal, teacher_forcing, text_per_chunk

RESULTS = ("out", "dq", "dk", "dv")
EXACT_FLOPS = {"cpu": 1e10, "cuda": 2e12}  # a second or two of the reference


@dataclass(frozen=True)
class Case:
    """Sizes of one call. heads are key heads; each serves `group` query heads."""

    name: str
    who: str
    build: Callable[[], SnippetLayout]
    heads: int
    dim: int
    group: int = 1
    batch: int = 1
    kind: str = "snippets"
    devices: tuple[str, ...] = ("cpu",)
    directions: tuple[str, ...] = DIRECTIONS
    memory: tuple[str, ...] = ()

    @cached_property
    def layout(self) -> SnippetLayout:
        return self.build()

    def inputs(self, dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, ...]:
        """q, k, v and the gradient of out: normal numbers."""
        layout, heads = self.layout, self.heads * self.group
        generator = torch.Generator(device).manual_seed(seed)
        sizes = [(heads, layout.q_len), (self.heads, layout.k_len), (self.heads, layout.k_len), (heads, layout.q_len)]
        q, k, v, dout = (
            torch.randn(self.batch, h, n, self.dim, generator=generator, device=device).to(dtype) for h, n in sizes
        )
        return q, k, v, dout

    def truth(self, inputs: Sequence[Tensor], direction: str) -> Truth:
        """Key heads do not know of each other, so that a few of them with their query heads are a smaller exact call.

        All where that is affordable, else as many as are, from the first to the last.
        """
        affordable = EXACT_FLOPS[inputs[0].device.type] * self.heads / self.flops(direction)
        some = torch.linspace(0, self.heads - 1, min(self.heads, max(1, int(affordable)))).round().long()

        def of_heads(x: Tensor) -> Tensor:
            per_key_head = x.detach().unflatten(1, (self.heads, -1))  # (B, Hkv, g or 1, N, D)
            return per_key_head[:, some.to(x.device)].flatten(1, 2)

        def run(dtype: torch.dtype) -> dict[str, Tensor]:
            *qkv, dout = (of_heads(x).to(dtype) for x in inputs)
            q, k, v = (x.requires_grad_(direction == "backward") for x in qkv)
            with torch.enable_grad():
                out = block_causal_attention(q, k, v, self.layout, backend="reference")
            grads = torch.autograd.grad(out, (q, k, v), dout) if direction == "backward" else ()
            return dict(zip(RESULTS, (out.detach(), *grads), strict=False))

        part = "all heads" if len(some) == self.heads else f"key heads {', '.join(map(str, some.tolist()))}"
        low = run(inputs[0].dtype)
        return Truth(run(torch.float64), low, part, lambda got: dict(zip(RESULTS, map(of_heads, got), strict=False)))

    def seen(self) -> int:
        """How many pairs of a row and a key see each other, over the batch."""
        tables = self.layout.tables()
        widths = (tables.k_ranges[..., 1] - tables.k_ranges[..., 0]).sum(2)  # (Bt, G)
        pairs = int((tables.q_offsets.diff(dim=1).long() * widths).sum())
        return pairs * (self.batch if len(widths) == 1 else 1)

    def flops(self, direction: str) -> int:
        """Of seen pairs only: two products forward, five more backward."""
        products = 2 if direction == "forward" else 7
        return products * 2 * self.seen() * self.dim * self.heads * self.group

    def bytes(self, direction: str, dtype: torch.dtype) -> int:
        """Of inputs and results, each once: q, k, v, out, lse; backward reads these and dout, and writes dq, dk, dv."""
        layout = self.layout
        rows, keys = self.batch * self.heads * self.group * layout.q_len, self.batch * self.heads * layout.k_len
        forward = 2 * (rows + keys) * self.dim * dtype.itemsize + 4 * rows
        return forward if direction == "forward" else 3 * forward + rows * self.dim * dtype.itemsize

    def __str__(self) -> str:
        heads = f"{self.heads * self.group}" + (f"/{self.heads}" if self.group > 1 else "")
        return f"B{self.batch} H{heads} D{self.dim} {repr(self.layout).removeprefix('SnippetLayout')}"


uniform = partial(partial, SnippetLayout.uniform)


def text_and_images() -> SnippetLayout:
    """2,048 tokens: text of 160, 128, 96 and 128 before images of 256, then 512 of text."""
    ids: list[int] = []
    for image, text in enumerate((160, 128, 96, 128)):
        ids += [-1] * text + [image] * 256
    return SnippetLayout.from_block_ids(ids + [-1] * (2048 - len(ids)))


def prefix_and_answer() -> SnippetLayout:
    """PaliGemma at 448 px: 1,024 tokens of the image and 64 of the prompt see each other, 256 of the answer follow."""
    return SnippetLayout.from_block_ids([0] * 1088 + [-1] * 256)


def actions() -> SnippetLayout:
    """pi0: the state joins the block of three images of 256 and 48 of text, and 50 actions are one that sees it all."""
    return SnippetLayout.from_block_ids([0] * 817 + [1] * 50, queries=51)


def decode(queries: int, keys: int) -> SnippetLayout:
    return SnippetLayout.cross([queries], [keys], [1])


def small(*lengths: int) -> SnippetLayout:
    return SnippetLayout.ragged(lengths, window=2, sink=1)


FIRST: dict[str, Any] = {"independent_first_frame": True}
LONGLIVE: dict[str, Any] = {"local_attn_size": 12, "sink_size": 3}  # in frames: a window of 9 and the sink
LONGLIVE_2: dict[str, Any] = {"local_attn_size": 40, "sink_size": 8}  # 28,160 keys and 7,040
BOTH, GPU = ("cpu", "cuda"), ("cuda",)
ring = partial(Case, heads=20, group=2, dim=64, kind="decode", directions=("forward",), devices=BOTH)
magi = partial(Case, heads=8, group=6, dim=128, devices=GPU)
vjepa = partial(Case, heads=16, dim=64)
video = partial(Case, dim=128)
FORWARD: dict[str, Any] = {"directions": ("forward",)}

CASES = {
    case.name: case
    for case in (
        vjepa("vjepa2_ac", "V-JEPA 2-AC", uniform(8, 258)),
        vjepa(
            "vjepa2_plan_32", "V-JEPA 2-AC planning, 32 candidates", uniform(3, 258), batch=32, kind="plan", **FORWARD
        ),
        Case("combiner_16", "Combiner `all`", uniform(16, 326), 16, 80, memory=DIRECTIONS),
        Case("combiner_64_last", "last layer of Combiner `all`", uniform(64, 326, q_tokens=32), 16, 80, devices=BOTH),
        video("wan_slice", "a slice of Wan-causal", uniform(8, 1560), 4),
        video("forcing_slice", "a slice of Wan's teacher forcing", partial(teacher_forcing, 12, 260, 3), 4),
        video("first_frame_slice", "a slice of Wan, image to video", partial(chunk_causal, 21, 260, 4, **FIRST), 4),
        video("window_slice", "a slice of LongLive, window and sink", partial(chunk_causal, 24, 260, 3, **LONGLIVE), 4),
        video(
            "text_slice", "a slice of LongLive 2, text per snippet", partial(text_per_chunk, [880] * 8, [512] * 8), 4
        ),
        video(
            "video_decode_slice",
            "a slice of Wan, the last frames",
            partial(decode, 1560, 10920),
            4,
            kind="decode",
            **FORWARD,
        ),
        Case("small_snippets", "many small snippets", uniform(128, 32), 8, 64, devices=BOTH),
        Case("latent", "latent model of Mirasol", uniform(64, 32), 16, 80, devices=BOTH),
        Case("text_images", "Gemma-like text and images", text_and_images, 4, 256, group=2, devices=BOTH),
        Case("prefix_answer", "PaliGemma at 448 px", prefix_and_answer, 1, 256, group=8, devices=BOTH),
        Case("actions", "a denoising step of pi0", actions, 1, 256, group=8, devices=BOTH, directions=("forward",)),
        Case(
            "window_sink", "window and sink", uniform(64, 128, window=8, sink=1), 8, 64, devices=BOTH, memory=DIRECTIONS
        ),
        Case("short_clips", "batch of short clips", uniform(4, 64), 8, 64, batch=8, devices=BOTH),
        ring("decode_256", "a frame of Waypoint", partial(decode, 256, 4352)),
        ring("decode_32", "few queries", partial(decode, 32, 4352)),
        ring("decode_8", "few queries", partial(decode, 8, 4352)),
        ring("decode_1", "one query", partial(decode, 1, 4352)),
        vjepa("vjepa2_ac_8", "V-JEPA 2-AC in training", uniform(8, 258), batch=8, devices=GPU),
        vjepa("vjepa2_ac_extrinsics", "V-JEPA 2-AC with extrinsics", uniform(8, 259), batch=8, devices=GPU),
        vjepa(
            "vjepa2_plan",
            "jepa-wms planning, 300 candidates",
            uniform(3, 258),
            batch=300,
            kind="plan",
            devices=GPU,
            **FORWARD,
        ),
        Case("combiner_64", "Combiner `all`", uniform(64, 326), 16, 80, devices=GPU, memory=DIRECTIONS),
        video("wan_1b", "Wan-causal 1.3B", uniform(7, 4680), 12, devices=GPU, memory=DIRECTIONS),
        video("wan_14b", "Wan-causal 14B", uniform(7, 4680), 40, devices=GPU),
        video(
            "wan_teacher", "Wan-causal 1.3B, teacher forcing", partial(teacher_forcing, 21, 1560, 3), 12, devices=GPU
        ),
        video("wan_first_frame", "Wan, image to video", partial(chunk_causal, 21, 1560, 4, **FIRST), 12, devices=GPU),
        video(
            "wan_decode",
            "Wan-causal 1.3B, the last frames",
            partial(decode, 4680, 32760),
            12,
            kind="decode",
            devices=GPU,
            **FORWARD,
        ),
        video("longlive", "LongLive, window and sink", partial(chunk_causal, 24, 1560, 3, **LONGLIVE), 12, devices=GPU),
        video(
            "longlive2",
            "LongLive 2, teacher forcing",
            partial(teacher_forcing, 96, 880, 8, **LONGLIVE_2),
            24,
            devices=GPU,
        ),
        video(
            "longlive2_decode",
            "LongLive 2, window with its sink",
            partial(decode, 7040, 28160),  # its 32 frames count the sink (NVlabs/LongLive@7860ad96, causal_model.py)
            24,
            kind="decode",
            devices=GPU,
            **FORWARD,
        ),
        video(
            "longlive2_text",
            "LongLive 2, text per snippet",
            partial(text_per_chunk, [7040] * 12, [512] * 12),
            24,
            devices=GPU,
        ),
        magi("magi", "MAGI-1", uniform(5, 21600)),
        magi("magi_decode", "MAGI-1, the last chunk", partial(decode, 21600, 108000), kind="decode", **FORWARD),
        magi("magi_8k", "48/8 heads, snippets of 2,048", uniform(4, 2048)),
        magi("magi_16k", "48/8 heads, snippets of 2,048", uniform(8, 2048)),
        magi("magi_32k", "48/8 heads, snippets of 2,048", uniform(16, 2048)),
        Case(
            "quick_ragged",
            "does it work?",
            partial(small, 5, 0, 17, 40),
            2,
            32,
            2,
            2,
            "quick",
            BOTH,
            memory=("forward",),
        ),
        Case("quick_uniform", "does it work?", uniform(4, 24), 4, 64, 1, 1, "quick", BOTH),
    )
}
