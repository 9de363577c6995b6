"""Tiny models of random weights, one per family that transformers has, inputs for each, and what compares them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from mirasol_kernels._check import peak
from tests.numerics import assert_within_budget

BATCH, TOKENS, IMAGE = 2, 14, 63  # IMAGE: the token that stands for a piece of an image
PACKED = 5  # tokens of the first of two sequences packed in one
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": 1,
    "initializer_range": 0.2,  # of trained models: attention that looks somewhere
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "vision_use_head": False,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"]


@dataclass
class Family:
    build: Callable[[], hf.PreTrainedModel]
    types: str | None = None  # the argument that says which tokens are of an image: causal OR same block
    kinds: tuple[int, int] = (0, 1)  # its values for text and for images
    images: int = 0  # per batch row, of 2 x 2 patches, that go through the vision tower; else image tokens alone
    packs: bool = True  # position_ids that start again make several sequences of one
    reference: str = "sdpa"


def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT, num_hidden_layers=2))


def mistral() -> hf.PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**TEXT, num_hidden_layers=2, sliding_window=5))


def llama4() -> hf.PreTrainedModel:
    text = {k: v for k, v in TEXT.items() if k != "intermediate_size"}
    config = hf.Llama4TextConfig(
        **text,
        intermediate_size=24,
        intermediate_size_mlp=48,
        num_hidden_layers=2,
        num_local_experts=2,
        attention_chunk_size=6,
        layer_types=["chunked_attention", "full_attention"],
    )
    return hf.Llama4ForCausalLM(config)


def gpt_oss() -> hf.PreTrainedModel:
    config = hf.GptOssConfig(
        **TEXT,
        num_hidden_layers=2,
        sliding_window=5,
        layer_types=SLIDING_AND_FULL,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    return hf.GptOssForCausalLM(config)


def hrm_text() -> hf.PreTrainedModel:
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    return hf.HrmTextForCausalLM(hf.HrmTextConfig(**text, num_hidden_layers=2))


def unlimited_ocr() -> hf.PreTrainedModel:
    """Its text alone: a window, and the prompt that every token sees."""
    experts = {"n_routed_experts": 2, "n_shared_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    sam = {
        "hidden_size": 16,
        "output_channels": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
        "window_size": 2,
        "mlp_dim": 16,
        "global_attn_indexes": [0],
        "downsample_channels": [8, 16],
    }
    clip = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    config = hf.UnlimitedOcrConfig(
        text_config={**TEXT, **experts, "num_hidden_layers": 2, "sliding_window": 5},
        vision_config={"sam_config": sam, "encoder_config": clip},
        image_token_id=IMAGE,
    )
    return hf.UnlimitedOcrForConditionalGeneration(config)


def gemma3_text() -> hf.PreTrainedModel:
    return hf.Gemma3ForCausalLM(
        hf.Gemma3TextConfig(**TEXT, num_hidden_layers=2, sliding_window=5, layer_types=SLIDING_AND_FULL)
    )


def gemma3() -> hf.PreTrainedModel:
    config = hf.Gemma3Config(
        text_config={**TEXT, "num_hidden_layers": 2, "sliding_window": 5, "layer_types": SLIDING_AND_FULL},
        vision_config=SIGLIP,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    return hf.Gemma3ForConditionalGeneration(config)


GEMMA4: dict[str, Any] = {
    **TEXT,
    "num_hidden_layers": 4,
    "sliding_window": 5,
    "layer_types": 2 * SLIDING_AND_FULL,
    "global_head_dim": 512,  # as published: more than block_causal_attention has kernels for
    "use_bidirectional_attention": "vision",
}
GEMMA4_VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
                 "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16}  # fmt: skip


def gemma4() -> hf.PreTrainedModel:
    """The later two layers have the keys of the earlier ones: with them, generation drops queries of the prompt."""
    shared = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    config = hf.Gemma4Config(text_config={**GEMMA4, **shared}, vision_config=GEMMA4_VISION, audio_config=None,
                             image_token_id=IMAGE, video_token_id=62, audio_token_id=61)  # fmt: skip
    return hf.Gemma4ForConditionalGeneration(config)


def gemma4_unified() -> hf.PreTrainedModel:
    vision = {"mm_embed_dim": 16, "mm_posemb_size": 8, "output_proj_dims": 16, "patch_size": 4}
    config = hf.Gemma4UnifiedConfig(text_config={**GEMMA4, "global_head_dim": 16}, vision_config=vision,
                                    audio_config=None, image_token_id=IMAGE, video_token_id=62,
                                    audio_token_id=61)  # fmt: skip
    return hf.Gemma4UnifiedForConditionalGeneration(config)


def paligemma() -> hf.PreTrainedModel:
    text = {**TEXT, "model_type": "gemma", "num_hidden_layers": 2}
    return hf.PaliGemmaForConditionalGeneration(
        hf.PaliGemmaConfig(text_config=text, vision_config=SIGLIP, projection_dim=32, image_token_index=IMAGE)
    )


def molmo2() -> hf.PreTrainedModel:
    config = hf.Molmo2Config(
        text_config={**TEXT, "num_hidden_layers": 2, "additional_vocab_size": 8},
        vision_config={"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "num_key_value_heads": 2, "head_dim": 8, "image_size": [8, 8], "patch_size": 4},
        adapter_config={"vision_feature_layer": [0, 1], "hidden_size": 16, "num_attention_heads": 2,
                        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 24, "text_hidden_size": 32},
        image_patch_id=IMAGE,
    )  # fmt: skip
    return hf.Molmo2ForConditionalGeneration(config)


def qwen2_vl() -> hf.PreTrainedModel:
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = hf.Qwen2VLConfig(
        text_config={**text, "num_hidden_layers": 2, "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
        image_token_id=IMAGE, video_token_id=62, vision_start_token_id=61, vision_end_token_id=60,
    )  # fmt: skip
    return hf.Qwen2VLForConditionalGeneration(config)


def pi0() -> hf.PreTrainedModel:
    gemma = {**TEXT, "model_type": "gemma", "num_hidden_layers": 2}
    vlm = {"model_type": "paligemma", "text_config": gemma, "vision_config": SIGLIP, "projection_dim": 32,
           "image_token_index": IMAGE}  # fmt: skip
    config = hf.PI0Config(vlm_config=vlm, dit_config=gemma, chunk_size=5, max_state_dim=6, max_action_dim=6)
    return hf.PI0ForConditionalGeneration(config)


def diffusion_gemma() -> hf.PreTrainedModel:
    text = {**GEMMA4, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    vision = {**GEMMA4_VISION, "model_type": "gemma4_vision"}
    config = hf.DiffusionGemmaConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        canvas_length=5,
        initializer_range=TEXT["initializer_range"],  # not taken from text_config
    )
    return hf.DiffusionGemmaForBlockDiffusion(config)


FAMILIES = {
    "llama": Family(llama),
    "mistral": Family(mistral),
    "llama4": Family(llama4),
    "gemma3_text": Family(gemma3_text),
    "gemma3": Family(gemma3, "token_type_ids", images=2),
    "gemma4": Family(gemma4, "mm_token_type_ids"),
    "gemma4_unified": Family(gemma4_unified, "mm_token_type_ids"),
    "paligemma": Family(paligemma, "token_type_ids", kinds=(1, 0), images=1),
    "molmo2": Family(molmo2, "mm_token_type_ids"),
    "qwen2_vl": Family(qwen2_vl, packs=False),
    "hrm_text": Family(hrm_text, "token_type_ids"),
    "unlimited_ocr": Family(unlimited_ocr),
    # Sinks, which "sdpa" does not serve; and its masks are made without position_ids.
    "gpt_oss": Family(gpt_oss, packs=False, reference="eager"),
}


def inputs_of(family: Family, padding: str) -> tuple[dict[str, Any], Tensor]:
    """Arguments of the model, and which tokens (B, N) are real.  padding: none, left, right, or packed."""
    ids = torch.randint(1, 60, (BATCH, TOKENS))
    inputs: dict[str, Any] = {"input_ids": ids}
    if family.types:
        pieces = torch.zeros(BATCH, TOKENS, dtype=torch.bool)
        starts = [4, 10][: family.images or 2]
        for at in starts:
            pieces[:, at : at + 4] = True
        inputs[family.types] = torch.where(pieces, family.kinds[1], family.kinds[0])
        if family.images:
            ids[pieces] = IMAGE
            inputs["pixel_values"] = torch.randn(BATCH * family.images, 3, 8, 8)
    real = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    if padding == "left":
        real[0, :3] = False
    elif padding == "right":
        real[1, -2:] = False
        if family.types:  # what is padding is no image
            inputs[family.types][~real] = family.kinds[0]
    if padding in ("left", "right"):
        ids[~real & (ids != IMAGE)] = 0
        inputs["attention_mask"] = real.long()
    elif padding == "packed":
        inputs["position_ids"] = torch.cat([torch.arange(PACKED), torch.arange(TOKENS - PACKED)]).expand(BATCH, -1)
        inputs["use_cache"] = False  # with a cache, most models' default, transformers does not look for sequences
    return inputs, real


# -------------------------------------------------------------------- compared


def model_of(family: Family) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = family.build().eval()
    model.set_experts_implementation("eager")  # the others know no float64
    return model


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in inputs.items()}


def trained(model: hf.PreTrainedModel, name: str, dtype: torch.dtype, inputs: dict, real: Tensor) -> tuple[Tensor, ...]:
    """Logits of the real tokens, and the gradients of all parameters in one."""
    model = model.to(dtype)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name
    model.zero_grad(set_to_none=True)
    said = model(**cast(inputs, dtype))
    logits = said.get("logits", said[0])[real]
    torch.sin(logits).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(grads)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Of models in float64: many of their norms round to float32 whatever the dtype, which may tip either way; what
    follows may make four ulps of it."""
    error, bound = peak(actual - expected), 4 * torch.finfo(torch.float32).eps * peak(expected)
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}"


def unavoidable(model: hf.PreTrainedModel, reference: str, inputs: dict, real: Tensor) -> list[Tensor]:
    """What float32 costs the reference, logits and gradients: the worst of five models whose weights are a few ulps
    apart.  Norm upon norm amplifies roundings ten times as much in one as in the next."""
    model, worst = deepcopy(model).float(), None
    for _ in range(5):
        low = trained(model, reference, torch.float32, inputs, real)
        exact = trained(model, reference, torch.float64, inputs, real)
        errors = [x.double() - y for x, y in zip(low, exact, strict=True)]
        worst = [max(pair, key=peak) for pair in zip(errors, worst or errors, strict=True)]
        model.float()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn_like(p))
    return worst


def assert_trained_alike(model: hf.PreTrainedModel, reference: str, inputs: dict, real: Tensor) -> None:
    errors = unavoidable(model, reference, inputs, real)
    exact = trained(model, reference, torch.float64, inputs, real)
    double = trained(model, "mirasol", torch.float64, inputs, real)
    ours = trained(model, "mirasol", torch.float32, inputs, real)
    for i, what in enumerate(("logits", "gradients")):
        assert_same(double[i], exact[i], what)
        assert_within_budget(ours[i], exact[i] + errors[i], exact[i].double(), what=what)
