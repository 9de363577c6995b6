"""attn_implementation="mirasol" in models that are not called like the families: their own inputs, no decoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.models.deepseek_ocr2 import configuration_deepseek_ocr2 as deepseek_ocr2
from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2

from mirasol_kernels import SnippetLayout
from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import (
    FAMILIES,
    IMAGE,
    SLIDING_AND_FULL,
    TEXT,
    Family,
    assert_same,
    assert_trained_alike,
    diffusion_gemma,
    model_of,
    pi0,
)

integration.register()


def prompt(padding: str) -> dict[str, Tensor]:
    ids, real = torch.randint(1, 60, (2, 12)), torch.ones(2, 12, dtype=torch.long)
    ids[:, 4:8] = IMAGE
    if padding != "none":
        real[0, {"left": slice(3), "right": slice(9, 12)}[padding]] = 0
    return {"input_ids": ids, "attention_mask": real}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_pi0(padding: str, spied: list[Any]) -> None:
    """Actions that see each other and, through the cache, what came before: blocks that are not at the start.

    Not packed: it has no position_ids of its own, and its cache keeps transformers from looking for sequences in them.
    """
    model = model_of(Family(pi0))
    inputs = prompt(padding) | {
        "pixel_values": torch.randn(2, 1, 3, 8, 8),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
        "state": torch.randn(2, 6),
        "noise": torch.randn(2, 5, 6),
        "timestep": torch.rand(2),
        "actions": torch.randn(2, 5, 6),
    }
    assert_trained_alike(model, "sdpa", inputs, torch.ones(2, 5, dtype=torch.bool))
    assert {(layout.q_len, layout.k_len) for layout in spied} == {(4, 4), (12, 12), (6, 18)}


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_diffusion_gemma(padding: str, spied: list[Any]) -> None:
    """A canvas that sees all of itself and of the prompt, under a window that its layers have and do not ask for."""
    inputs = prompt(padding)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).long()
    inputs["input_ids"][inputs["input_ids"] == IMAGE] = 7
    inputs["decoder_input_ids"] = torch.randint(1, 60, (2, 5))
    inputs["decoder_attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones(2, 5, dtype=torch.long)], 1)
    assert_trained_alike(model_of(Family(diffusion_gemma)), "sdpa", inputs, torch.ones(2, 5, dtype=torch.bool))
    assert any(layout.q_len == 5 < layout.k_len for layout in spied)


def test_deepseek_ocr2(spied: list[Any]) -> None:
    """Its encoder: patches that see each other, then causal queries."""
    text = {k: v for k, v in TEXT.items() if k != "head_dim"}
    config = deepseek_ocr2.DeepseekOcr2VisionEncoderConfig(**text, num_hidden_layers=2)
    model = model_of(Family(lambda: modeling_deepseek_ocr2.DeepseekOcr2VisionEncoder(config)))
    inputs = {"inputs_embeds": torch.randn(2, 12, 32), "num_patches": torch.tensor(6)}
    assert_trained_alike(model, "sdpa", inputs, torch.ones(2, 12, dtype=torch.bool))
    assert spied[0] == SnippetLayout.ragged([6, *[1] * 6])


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}  # fmt: skip
ENCODERS = {
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, num_hidden_layers=1)),
    "modernbert": lambda: hf.ModernBertModel(
        hf.ModernBertConfig(**SMALL, num_hidden_layers=2, local_attention=4, global_attn_every_n_layers=2)
    ),
    "bart": lambda: hf.BartModel(
        hf.BartConfig(vocab_size=64, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                      decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16)
    ),
    "embedding_gemma": lambda: hf.Gemma3TextModel(
        hf.Gemma3TextConfig(**TEXT, num_hidden_layers=2, sliding_window=5, layer_types=SLIDING_AND_FULL,
                            use_bidirectional_attention=True)
    ),
    "classifier": lambda: hf.Gemma3TextForSequenceClassification(
        hf.Gemma3TextConfig(**TEXT, num_hidden_layers=2, sliding_window=5, layer_types=SLIDING_AND_FULL)
    ),
    "layoutlm": lambda: hf.LayoutLMModel(hf.LayoutLMConfig(**SMALL, num_hidden_layers=1)),  # a mask for all queries
    "deepseek_v3": lambda: hf.DeepseekV3Model(  # keys wider than values
        hf.DeepseekV3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                            num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=8, q_lora_rank=8,
                            qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODERS)
def test_other_kinds_of_models(name: str, spied: list[Any]) -> None:
    """Encoders, cross-attention, a window to both sides, values narrower than keys."""
    model = ENCODERS[name]().double().eval()
    ids, real = torch.randint(3, 60, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    real[1, -3:] = 0
    said = []
    for attn in ("sdpa", "mirasol"):
        model.set_attn_implementation(attn)
        with torch.no_grad():
            out = model(ids, attention_mask=real)[0]
        said.append(out[real.bool()] if out.shape[:2] == ids.shape else out)
    assert spied
    assert_same(said[1], said[0], name)


def test_paligemma_of_text_alone() -> None:
    """With neither types nor padding, "sdpa" drops the causal mask and its modules say that they are not causal: there
    every token sees all.  Here and in "eager" the mask is what the model asked for."""
    model, ids, said = model_of(FAMILIES["paligemma"]).double(), torch.randint(1, 60, (2, 11)), []
    for attn in ("eager", "mirasol"):
        model.set_attn_implementation(attn)
        with torch.no_grad():
            said.append(model(ids).logits)
    assert_same(said[1], said[0], "logits")
