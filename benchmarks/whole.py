"""The whole model on a clip: what `sweep`, `breakdown` and `combiner` measure, built and fed in one way."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import mirasol_kernels
from benchmarks import harness
from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.layers import Block
from mirasol_model.media import Clip, read_clip

SAMPLE = harness.ROOT / "examples" / "sample.mp4"
NOISE = "noise"  # in the place of a file: a clip of any length, which no time depends on and nothing has to decode
NOISE_FPS = 25.0  # and of the sample clip: it decides how many tokens of sound a snippet has
FRAMES = (16, 32, 64, 128, 256, 512)
COMBINERS = {
    "all": "a transformer over all snippets so far",
    "current": "a transformer over the current snippet",
    "ttm": "a Token Turing Machine",
    "perceiver": "a Perceiver of the current snippet",
    "token_learner": "a token learner of the current snippet",
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
COMPILED = "compiled"  # the reference with its blocks through torch.compile, as a backend is named
AUTOMATIC = "automatic"  # each op chooses for itself, as users have it, where ours does not serve every op by name
RECOMPUTING = ", recomputing"  # behind a backend's name: with recompute="snippet", so less is kept for backward
TEXT = b"Which ball hits the wall first, and which one rings the lowest?"
Results = dict[str, list[torch.Tensor]]


class Job(NamedTuple):
    """What one fresh process measures, and all that it needs to know."""

    clip: str
    preset: str
    combiner: str
    frames: int
    backend: str
    train: bool
    device: str
    dtype: str = "float32"
    snippet: int | None = None  # frames of one; None: the preset's


def configure(preset: str, combiner: str, snippet: int | None = None) -> MirasolConfig:
    config = MirasolConfig.preset(preset).to_dict()
    kind, context = ("transformer", combiner) if combiner in ("all", "current") else (combiner, "current")
    config["combiner"] |= {"kind": kind, "context": context}
    if snippet is not None:
        config["video"]["frames"] = snippet
    return MirasolConfig.from_dict(config)


def tokens_of(config: MirasolConfig) -> tuple[int, int]:
    """Tokens of picture and of sound in a whole snippet."""
    with torch.device("meta"):
        model = Mirasol(config)
    samples = config.video.frames * config.audio.sample_rate // int(NOISE_FPS)
    return model.video_tokens.valid_tokens(config.video.frames), model.audio_tokens.valid_tokens(samples)


def build(config: MirasolConfig, device: str, dtype: str = "float32") -> Mirasol:
    torch.manual_seed(0)
    with torch.device(device):  # to draw the numbers of `base` on a CPU takes as long as all else
        model = Mirasol(config)
    return model.to(device, DTYPES[dtype]).eval()


def load(path: str, config: MirasolConfig, frames: int) -> Clip:
    size, rate = config.video.size, config.audio.sample_rate
    if path != NOISE:
        return read_clip(path, frames=frames, size=size, sample_rate=rate)
    generator = torch.Generator().manual_seed(0)
    sound = 0.1 * torch.randn(round(frames * rate / NOISE_FPS), generator=generator)
    return Clip(torch.rand(3, frames, size, size, generator=generator), sound, NOISE_FPS)


def first(clip: Clip, frames: int, device: str) -> Clip:
    """The beginning of a clip, its sound cut to the same time."""
    samples = 0 if clip.audio is None else frames * clip.audio.shape[0] // clip.video.shape[1]
    audio = None if clip.audio is None else clip.audio[:samples].to(device)
    return Clip(clip.video[:, :frames].to(device), audio, clip.fps)


def runner(model: Mirasol, backend: str | None) -> tuple[Callable[..., Any], str | None]:
    """What is called and the backend that its ops are asked for."""
    if backend is not None and backend.endswith(RECOMPUTING):
        twin = _twin(model)
        twin.config = replace(model.config, recompute="snippet")
        return twin, runner(model, backend.removesuffix(RECOMPUTING))[1]
    if backend == AUTOMATIC:
        return model, None
    if backend != COMPILED:
        return model, backend
    # Block by block: as fast as torch.compile of the whole, which the lengths between blocks, host arithmetic, cut into
    # 54 graphs (12 s to compile, not 90, a training step of 16 frames).
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # the encoder's blocks, a Combiner's, its last one, ... are a graph each
    twin = _twin(model)
    for module in twin.modules():
        if isinstance(module, Block):
            module.compile(dynamic=False)
    return twin, "reference"


def _twin(model: Mirasol) -> Mirasol:
    """A copy with the same parameters, not merely equal ones: it gets the gradients where they are looked for."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def step(
    model: Mirasol, clip: Clip, backend: str | None, train: bool, call: Callable[..., Any] | None = None
) -> Results:
    """One pass over the clip and a question about it; with `train` also back. -> what its error is measured on.

    call: the model as it is called, where that is not the model itself.
    """
    like = next(model.parameters())
    video = clip.video[None].to(like.dtype)  # (1, 3, frames, size, size)
    audio = None if clip.audio is None else clip.audio[None].to(like.dtype)  # (1, samples)
    text = torch.tensor([[3 + byte for byte in TEXT]], device=like.device)  # (1, L)
    model.zero_grad()
    with mirasol_kernels.use_backend(backend), torch.set_grad_enabled(train):
        out = (model if call is None else call)(video, audio, text, labels=text if train else None)
        if train:
            out.loss.backward()
    found = {"logits": [out.logits.detach()], "latents": [out.latents.detach()]}
    if train:
        found["gradients"] = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return found


def in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A sweep's rows by Combiner and length, whatever was measured first."""
    combiners = list(dict.fromkeys(row["combiner"] for row in rows))
    return sorted(rows, key=lambda row: (combiners.index(row["combiner"]), row["frames"]))


def prepare(job: Job) -> Callable[[], int]:
    """In a fresh process: everything but the step, whose memory is watched."""
    harness.return_freed()
    config = configure(job.preset, job.combiner, job.snippet)
    model = build(config, job.device, job.dtype)
    clip = first(load(job.clip, config, job.frames), job.frames, job.device)
    call, backend = runner(model, job.backend)
    # What libraries keep for good is no part of a step: torch.utils.checkpoint alone imports 150 MB at its first call.
    known = clip if job.backend == COMPILED else first(clip, min(job.frames, 2 * config.video.frames), job.device)
    step(model, known, backend, job.train, call)
    model.zero_grad()

    def work() -> int:
        step(model, clip, backend, job.train, call)
        return sum(parameter.numel() for parameter in model.parameters())

    return work


class Watch(TorchDispatchMode):
    """Seconds that our ops take on a CPU, forward and backward. (torch's profiler would write into the table.)"""

    seconds = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        if func.namespace.startswith("mirasol_"):
            self.seconds += time.perf_counter() - start
        return result


def seconds_in_ops(work: Callable[[], Any], device: str) -> float:
    """Of one step, what is spent in our ops: all of the rest is beyond them, however fast they become."""
    if device == "cpu":
        with Watch() as watch:
            work()
        return watch.seconds
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    # What an op calls is in its time already: mirasol_cuda::x calls mirasol_cuda_raw::x.
    ours = [x for x in profiler.key_averages() if x.key.startswith("mirasol_") and "_raw::" not in x.key]
    return sum(x.device_time_total for x in ours) / 1e6
