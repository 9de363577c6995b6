"""Start the shared ViT from an image ViT: `load_image_vit(model, "vit.safetensors")`.

Strict: every tensor of the checkpoint is used, or is one of the few that have no place here (class token, learned
positions, head); every parameter of the ViT and of the patch projections is filled. Anything else is an error that
names the tensor, and then nothing has been changed. Two differences remain and are harmless in fine-tuning: our GELU
is the tanh form, and LayerNorm's eps is 1e-6 (timm's value; Hugging Face has 1e-12).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_model.encoders import AudioTokenizer, TubeTokenizer, ViT

# Our layer of block N -> theirs; several are stacked along the output channels.
TIMM = {
    "norm1": ("blocks.{}.norm1",),
    "qkv": ("blocks.{}.attn.qkv",),
    "proj": ("blocks.{}.attn.proj",),
    "norm2": ("blocks.{}.norm2",),
    "fc1": ("blocks.{}.mlp.fc1",),
    "fc2": ("blocks.{}.mlp.fc2",),
    "norm": ("norm",),
    "patch": ("patch_embed.proj",),
}
HUGGING_FACE = {
    "norm1": ("encoder.layer.{}.layernorm_before",),
    "qkv": tuple(f"encoder.layer.{{}}.attention.attention.{part}" for part in ("query", "key", "value")),
    "proj": ("encoder.layer.{}.attention.output.dense",),
    "norm2": ("encoder.layer.{}.layernorm_after",),
    "fc1": ("encoder.layer.{}.intermediate.dense",),
    "fc2": ("encoder.layer.{}.output.dense",),
    "norm": ("layernorm",),
    "patch": ("embeddings.patch_embeddings.projection",),
}
# Ours has no class token, its positions are fixed, and it classifies nothing.
WITHOUT_PLACE = re.compile(
    r"cls_token|dist_token|pos_embed|head(_dist)?\..*|pre_logits\..*"
    r"|embeddings\.(cls_token|distillation_token|mask_token|position_embeddings)|pooler\..*|(\w+_)?classifier\..*"
)


@dataclass(frozen=True)
class WarmStart:
    """What a warm start did. `loaded`: our parameter -> the checkpoint's tensors; `unused`: those without a place."""

    loaded: dict[str, tuple[str, ...]]
    unused: tuple[str, ...]


def load_image_vit(
    model: nn.Module, path: str | PathLike[str], *, mean: Sequence[float] = (0, 0, 0), std: Sequence[float] = (1, 1, 1)
) -> WarmStart:
    """Fill the ViT, the tubes and the audio patches inside `model` from an image ViT in timm's or Hugging Face's names.

    model: any module that holds one `ViT`, with its `TubeTokenizer` and `AudioTokenizer` where it has them.
    path: a safetensors file. mean, std: RGB statistics that the checkpoint's images, in [0, 1], were normalised with
    (timm's `augreg` and Google's: 0.5 each); our pixels are not, so kernels and biases of the tubes absorb them.
    Tube kernels (d, 3, t, h, w): the patch kernel bilinearly resampled to (h, w), repeated t times and divided by t
    (daniel-code/TubeViT@8df0d99 `scripts/convert_vit_weight.py`). Audio patches: the kernel summed over RGB
    (YuanGongND/ast@31088be). Raises ValueError, before anything is changed.
    """
    checkpoint = _Checkpoint(path)
    vit = _only_vit(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    filled: list[tuple[nn.Parameter, Tensor]] = []
    loaded: dict[str, tuple[str, ...]] = {}

    def fill(parameter: nn.Parameter, value: Tensor, sources: tuple[str, ...]) -> None:
        if value.shape != parameter.shape:
            raise ValueError(
                f"load_image_vit: {', '.join(sources)}: expected {tuple(parameter.shape)} for "
                f"{names[id(parameter)]}, got {tuple(value.shape)}"
            )
        filled.append((parameter, value))
        loaded[names[id(parameter)]] = sources

    for index, block in enumerate(vit.blocks):
        for layer in ("norm1", "qkv", "proj", "norm2", "fc1", "fc2"):
            for kind in ("weight", "bias"):
                fill(getattr(getattr(block, layer), kind), *checkpoint.take(layer, kind, index))
    for kind in ("weight", "bias"):
        fill(getattr(vit.norm, kind), *checkpoint.take("norm", kind))

    kernel, kernel_names = checkpoint.take("patch", "weight")
    bias, bias_names = checkpoint.take("patch", "bias")
    if kernel.ndim != 4 or kernel.shape[:2] != (vit.dim, 3):
        raise ValueError(
            f"load_image_vit: {kernel_names[0]}: expected ({vit.dim}, 3, height, width), got {tuple(kernel.shape)}"
        )
    if bias.shape != (vit.dim,):
        raise ValueError(f"load_image_vit: {bias_names[0]}: expected ({vit.dim},), got {tuple(bias.shape)}")
    for part in model.modules():
        if isinstance(part, TubeTokenizer):
            for weight, offset in zip(part.weights, part.biases, strict=True):
                inflated, shift = _absorb(_inflate(kernel, weight.shape[2:]), mean, std)
                fill(weight, inflated, kernel_names)
                fill(offset, bias.float() - shift, bias_names)
        elif isinstance(part, AudioTokenizer):
            grey = _inflate(kernel.sum(1, keepdim=True), (1, *part.weight.shape[2:]))
            fill(part.weight, grey.squeeze(2), kernel_names)
            fill(part.bias, bias, bias_names)

    unused = checkpoint.rest()
    with torch.no_grad():
        for parameter, value in filled:
            parameter.copy_(value)
    return WarmStart(loaded, unused)


class _Checkpoint:
    """The file's tensors by their names without Hugging Face's `vit.`, and which of them have been taken."""

    def __init__(self, path: str | PathLike[str]):
        try:
            with safe_open(path, framework="pt") as file:
                self.names = {name.removeprefix("vit."): name for name in file.keys()}  # noqa: SIM118
                self.tensors = {short: file.get_tensor(name) for short, name in self.names.items()}
        except (SafetensorError, OSError) as error:
            raise ValueError(f"load_image_vit: path: expected a safetensors file, got {path}: {error}") from error
        self.layout = HUGGING_FACE if any(name.startswith("encoder.layer.") for name in self.tensors) else TIMM
        self.taken: set[str] = set()

    def take(self, layer: str, kind: str, index: int | None = None) -> tuple[Tensor, tuple[str, ...]]:
        """The value for our `layer`.`kind` of block `index`, and the checkpoint's names it came from."""
        shorts = [f"{pattern.format(index)}.{kind}" for pattern in self.layout[layer]]
        for short in shorts:
            if short not in self.tensors:
                raise ValueError(f"load_image_vit: {short}: expected in the checkpoint, not found")
        first, *others = (self.tensors[short] for short in shorts)
        for short, other in zip(shorts[1:], others, strict=True):
            if other.shape != first.shape:
                raise ValueError(f"load_image_vit: {short}: expected {tuple(first.shape)}, got {tuple(other.shape)}")
        self.taken.update(shorts)
        return torch.cat([first, *others]), tuple(self.names[short] for short in shorts)

    def rest(self) -> tuple[str, ...]:
        """Names of the tensors without a place here; an error if one of the others was not taken."""
        left = sorted(set(self.tensors) - self.taken)
        for short in left:
            if not WITHOUT_PLACE.fullmatch(short):
                raise ValueError(
                    f"load_image_vit: {self.names[short]}: expected no such tensor in a ViT of this depth and kind, "
                    f"got {tuple(self.tensors[short].shape)}"
                )
        return tuple(self.names[short] for short in left)


def _only_vit(model: nn.Module) -> ViT:
    found = [part for part in model.modules() if isinstance(part, ViT)]
    if len(found) != 1:
        raise ValueError(f"load_image_vit: model: expected a module with exactly one ViT, got {len(found)}")
    return found[0]


def _inflate(kernel: Tensor, size: Sequence[int]) -> Tensor:
    """(d, c, h0, w0) -> (d, c, t, h, w) float32; on a still video it answers as the resampled kernel on one frame."""
    frames, *area = size
    resampled = F.interpolate(kernel.float(), tuple(area), mode="bilinear", align_corners=False)
    return resampled[:, :, None].expand(-1, -1, frames, -1, -1) / frames


def _absorb(kernel: Tensor, mean: Sequence[float], std: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Kernel for pixels x and what to take off the bias, so that the result is the old one's of (x - mean) / std."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"load_image_vit: mean, std: expected three numbers each, std > 0, got {mean} and {std}")
    kernel = kernel / torch.tensor(std, dtype=torch.float32).view(3, 1, 1, 1)
    return kernel, (kernel * torch.tensor(mean, dtype=torch.float32).view(3, 1, 1, 1)).flatten(1).sum(1)
