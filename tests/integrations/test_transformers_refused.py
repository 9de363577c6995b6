"""What attn_implementation="mirasol" does not serve: an error that says so, before that attention runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import FAMILIES, TEXT, TOKENS, inputs_of
from tests.integrations.test_transformers import model_of

integration.register()


def small(kind: type, config: type, **kwargs: Any) -> hf.PreTrainedModel:
    return kind(config(**{**TEXT, "num_hidden_layers": 1, **kwargs}))


REFUSED = {
    "softcap": (lambda: small(hf.Gemma2ForCausalLM, hf.Gemma2Config), {}, "softcap: a soft cap of the scores"),
    "sinks": (
        lambda: small(hf.GptOssForCausalLM, hf.GptOssConfig, num_local_experts=2, num_experts_per_tok=1),
        {},
        "s_aux: attention sinks: not served",
    ),
    "bias": (
        lambda: hf.T5EncoderModel(hf.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)),
        {},
        "position_bias: a bias of the scores",
    ),
    "dropout": (
        lambda: small(hf.LlamaForCausalLM, hf.LlamaConfig, attention_dropout=0.1).train(),
        {},
        "dropout: expected 0, got 0.1",
    ),
    "weights": (
        lambda: small(hf.LlamaForCausalLM, hf.LlamaConfig),
        {"output_attentions": True},
        "output_attentions: the attention weights as a result",
    ),
    "wide heads": (
        lambda: small(hf.LlamaForCausalLM, hf.LlamaConfig, head_dim=512),
        {},
        "head_dim 1 .. 256, got 512",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, arguments, message = REFUSED[name]
    model = build()
    model.set_attn_implementation("mirasol")
    with pytest.raises(ValueError, match=message):
        model(torch.randint(3, 60, (1, 6)), **arguments)


def test_wide_heads_of_a_later_layer_are_refused_before_the_first_runs() -> None:
    kinds = ["sliding_attention", "full_attention"]
    wide = {"layer_types": kinds, "num_hidden_layers": 2, "head_dim": 16, "global_head_dim": 512}
    model = hf.Gemma4ForCausalLM(hf.Gemma4TextConfig(**{**TEXT, **wide}))
    model.set_attn_implementation("mirasol")
    ran: list[torch.nn.Module] = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, _: ran.append(layer))
    with pytest.raises(ValueError, match=r"mirasol: config: expected head_dim 1 .. 256, got 512"):
        model(torch.randint(3, 60, (1, 6)))
    assert not ran


def test_an_image_in_too_many_pieces() -> None:
    """Molmo2 takes all images for one block: its first token sees every later piece."""
    model = model_of(FAMILIES["molmo2"])
    model.set_attn_implementation("mirasol")
    inputs, _ = inputs_of(FAMILIES["molmo2"], "none")
    inputs["mm_token_type_ids"] = torch.tensor([[1, 0] * (TOKENS // 2)] * 2)
    with pytest.raises(ValueError, match=r"mirasol: attention mask: .* at most 4 separate key ranges .* for row 0$"):
        model(**inputs)


def test_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"mirasol: expected transformers 5\.4 or newer, got 5\.3\.0"):
        integration.register()
