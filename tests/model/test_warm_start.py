"""Warm start from generated image ViT checkpoints, in timm's and in Hugging Face's names."""

import copy
import re

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mirasol_model.encoders import TUBES_8, TUBES_32, AudioTokenizer, TubeTokenizer, ViT
from mirasol_model.warm_start import load_image_vit
from tests.numerics import assert_close_fp64, assert_within_budget

DIM, LAYERS, MLP = 12, 2, 20


def timm_checkpoint(patch=16):
    """Tensors of `vit_*_patch16` in timm: names and shapes as there, values random."""
    shapes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 197, DIM),
        "patch_embed.proj.weight": (DIM, 3, patch, patch),
        "patch_embed.proj.bias": (DIM,),
        "norm.weight": (DIM,),
        "norm.bias": (DIM,),
        "head.weight": (10, DIM),
        "head.bias": (10,),
    }
    for n in range(LAYERS):
        for layer, (out, into) in {
            "attn.qkv": (3 * DIM, DIM),
            "attn.proj": (DIM, DIM),
            "mlp.fc1": (MLP, DIM),
            "mlp.fc2": (DIM, MLP),
        }.items():
            shapes |= {f"blocks.{n}.{layer}.weight": (out, into), f"blocks.{n}.{layer}.bias": (out,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"blocks.{n}.{norm}.weight": (DIM,), f"blocks.{n}.{norm}.bias": (DIM,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def hugging_face(timm, prefix="vit."):
    """The same network as `ViTForImageClassification` stores it."""
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection",
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    }
    out = {}
    for name, value in timm.items():
        if name.startswith("head."):
            out[name.replace("head", "classifier")] = value
        elif "attn.qkv" in name:
            for part, chunk in zip(("query", "key", "value"), value.chunk(3), strict=True):
                theirs = name.replace("blocks", "encoder.layer").replace("attn.qkv", f"attention.attention.{part}")
                out[prefix + theirs] = chunk.contiguous()
        elif name.startswith("norm."):
            out[prefix + name.replace("norm", "layernorm")] = value
        else:
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            out[prefix + name.replace("blocks", "encoder.layer")] = value
    return out


def parts(dim=DIM, layers=LAYERS, mlp=MLP, tubes=TUBES_8):
    return nn.ModuleDict(
        {
            "vit": ViT(dim, layers, 3, mlp),
            "video": TubeTokenizer(dim, tubes, frames=32, size=(32, 32)),
            "audio": AudioTokenizer(dim),
        }
    )


@pytest.fixture
def save(tmp_path):
    def save(tensors):
        path = tmp_path / "vit.safetensors"
        save_file(tensors, path)
        return path

    return save


def test_every_parameter_but_the_modality_is_loaded(save):
    checkpoint = timm_checkpoint()
    model = parts()
    report = load_image_vit(model, save(checkpoint))
    assert set(report.loaded) == {name for name, _ in model.named_parameters() if not name.endswith("modality")}
    assert report.unused == ("cls_token", "head.bias", "head.weight", "pos_embed")
    assert report.loaded["vit.blocks.1.qkv.weight"] == ("blocks.1.attn.qkv.weight",)
    assert {name for names in report.loaded.values() for name in names} | set(report.unused) == set(checkpoint)
    assert torch.equal(model["vit"].blocks[1].fc2.weight, checkpoint["blocks.1.mlp.fc2.weight"])
    assert torch.equal(model["vit"].norm.bias, checkpoint["norm.bias"])


@pytest.mark.parametrize("prefix", ["vit.", ""])
def test_both_naming_schemes_are_one_network(save, prefix):
    timm, other = timm_checkpoint(), parts()
    load_image_vit(other, save(timm))
    model = parts()
    report = load_image_vit(model, save(hugging_face(timm, prefix)))
    assert len(report.unused) == 4
    assert report.loaded["vit.blocks.0.qkv.bias"] == tuple(
        f"{prefix}encoder.layer.0.attention.attention.{part}.bias" for part in ("query", "key", "value")
    )
    for name, value in model.state_dict().items():
        assert name.endswith("modality") or torch.equal(value, other.state_dict()[name])


@pytest.mark.parametrize("tubes", [TUBES_8, TUBES_32])
def test_inflated_kernels(save, tubes):
    """Bilinear to (h, w), repeated t times, divided by t: on a still clip a tube is the kernel on a picture."""
    checkpoint, model = timm_checkpoint(), parts(tubes=tubes).double()
    load_image_vit(model, save(checkpoint))
    kernel, bias = checkpoint["patch_embed.proj.weight"], checkpoint["patch_embed.proj.bias"]
    for tube, weight in zip(tubes, model["video"].weights, strict=True):
        frames, *size = weight.shape[2:]
        resampled = F.interpolate(kernel, size, mode="bilinear", align_corners=False)
        assert size == list(tube.kernel[1:])
        for t in range(frames):
            assert torch.equal(weight[:, :, t], (resampled / frames).double())
    image = torch.rand(1, 3, 32, 32, dtype=torch.float64)
    video = model["video"]
    tokens = video(image[:, :, None].expand(-1, -1, 32, -1, -1))
    tokens = tokens - video.positions((32, 32), video.modality) - video.modality
    assert video.planes()[0][1] == 3  # the image patches come first
    picture = F.conv2d(image, kernel.double(), bias.double(), stride=16).flatten(2).transpose(1, 2)
    assert_close_fp64(tokens[:, :4], picture)


def test_audio_patches_are_grey(save):
    checkpoint, model = timm_checkpoint(), parts()
    load_image_vit(model, save(checkpoint))
    assert torch.equal(model["audio"].weight, checkpoint["patch_embed.proj.weight"].sum(1, keepdim=True))
    assert torch.equal(model["audio"].bias, checkpoint["patch_embed.proj.bias"])


def test_pixel_statistics_are_absorbed(save):
    """With mean and std given, raw pixels give what normalised pixels gave without."""
    path = save(timm_checkpoint())
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.5)
    raw, normalised = parts(), parts()
    load_image_vit(raw, path, mean=mean, std=std)
    load_image_vit(normalised, path)
    normalised["video"].modality.data.copy_(raw["video"].modality)
    video = torch.rand(1, 3, 32, 32, 32)
    pixels = (video - torch.tensor(mean).view(3, 1, 1, 1)) / torch.tensor(std).view(3, 1, 1, 1)
    exact = copy.deepcopy(normalised).double()["video"](pixels.double())
    assert_within_budget(raw["video"](video), normalised["video"](pixels), exact)
    assert torch.equal(raw["audio"].weight, normalised["audio"].weight)


def test_other_patch_sizes_and_dtypes(save):
    checkpoint = {name: value.half() for name, value in timm_checkpoint(patch=14).items()}
    model = parts()
    load_image_vit(model, save(checkpoint))
    kernel = F.interpolate(checkpoint["patch_embed.proj.weight"].float(), (16, 16), mode="bilinear")
    assert torch.equal(model["video"].weights[3][:, :, 0], kernel)
    assert model["vit"].norm.weight.dtype == torch.float32


def test_a_vit_alone(save):
    report = load_image_vit(vit := ViT(DIM, LAYERS, 3, MLP), save(timm_checkpoint()))
    assert set(report.loaded) == {name for name, _ in vit.named_parameters()}


def changed(**tensors):
    return lambda: timm_checkpoint() | {name.replace("__", "."): value for name, value in tensors.items()}


def without(name, make=timm_checkpoint):
    return lambda: {key: value for key, value in make().items() if key != name}


HF_KEY = "vit.encoder.layer.0.attention.attention.key.weight"


@pytest.mark.parametrize(
    ("checkpoint", "model", "message"),
    [
        (
            timm_checkpoint,
            lambda: parts(mlp=24),
            "blocks.0.mlp.fc1.weight: expected (24, 12) for vit.blocks.0.fc1.weight, got (20, 12)",
        ),
        (timm_checkpoint, lambda: parts(dim=18), "blocks.0.norm1.weight: expected (18,) for vit.blocks.0.norm1.weight"),
        (timm_checkpoint, lambda: parts(layers=3), "blocks.2.norm1.weight: expected in the checkpoint, not found"),
        (timm_checkpoint, lambda: parts(layers=1), "blocks.1.attn.proj.bias: expected no such tensor"),
        (without("norm.bias"), parts, "norm.bias: expected in the checkpoint, not found"),
        (changed(blocks__0__ls1__gamma=torch.ones(DIM)), parts, "blocks.0.ls1.gamma: expected no such tensor"),
        (
            changed(patch_embed__proj__weight=torch.ones(DIM, 1, 16, 16)),
            parts,
            "patch_embed.proj.weight: expected (12, 3, height, width), got (12, 1, 16, 16)",
        ),
        (
            changed(patch_embed__proj__bias=torch.ones(7)),
            parts,
            "patch_embed.proj.bias: expected (12,), got (7,)",
        ),
        (
            lambda: hugging_face(timm_checkpoint()) | {HF_KEY: torch.ones(DIM, 5)},
            parts,
            "encoder.layer.0.attention.attention.key.weight: expected (12, 12), got (12, 5)",
        ),
        (timm_checkpoint, lambda: nn.Linear(2, 2), "model: expected a module with exactly one ViT, got 0"),
        (timm_checkpoint, lambda: nn.ModuleList([parts(), parts()]), "exactly one ViT, got 2"),
    ],
)
def test_mismatches_name_the_tensor_and_change_nothing(save, checkpoint, model, message):
    model = model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        load_image_vit(model, save(checkpoint()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_files_that_are_none(tmp_path):
    text = tmp_path / "vit.safetensors"
    text.write_text("not tensors")
    for path in (text, tmp_path / "missing.safetensors"):
        with pytest.raises(ValueError, match=f"load_image_vit: path: expected a safetensors file, got {path}"):
            load_image_vit(parts(), path)


def test_bad_statistics(save):
    with pytest.raises(ValueError, match="load_image_vit: mean, std: expected three numbers each, std > 0"):
        load_image_vit(parts(), save(timm_checkpoint()), mean=(0.5,), std=(1, 1, 1))
    with pytest.raises(ValueError, match="std > 0"):
        load_image_vit(parts(), save(timm_checkpoint()), std=(1, 0, 1))
