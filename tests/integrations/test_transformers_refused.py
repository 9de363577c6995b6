"""What attn_implementation="mirasol" does not serve: an error that says so, before that attention runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import FAMILIES, TEXT, TOKENS, inputs_of, model_of

integration.register()


def small(kind: type, config: type, **kwargs: Any) -> hf.PreTrainedModel:
    return kind(config(**{**TEXT, "num_hidden_layers": 1, **kwargs}))


REFUSED = {
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
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, arguments, message = REFUSED[name]
    model = build()
    model.set_attn_implementation("mirasol")
    with pytest.raises(ValueError, match=message):
        model(torch.randint(3, 60, (1, 6)), **arguments)


def test_a_soft_cap_is_refused_before_the_first_layer_runs() -> None:
    model = small(hf.Gemma2ForCausalLM, hf.Gemma2Config)
    model.set_attn_implementation("mirasol")
    ran: list[torch.nn.Module] = []
    model.model.layers[0].register_forward_pre_hook(lambda layer, _: ran.append(layer))
    with pytest.raises(
        ValueError, match="mirasol: config: attn_logit_softcapping: a soft cap of the scores: not served"
    ):
        model(torch.randint(3, 60, (1, 6)))
    assert not ran


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"softcap": 50.0}, "softcap: a soft cap of the scores: not served"),
        ({"sinks": torch.zeros(1, 2, 4, 1)}, "sinks: a sink for each token: not served"),
        ({"indices": torch.zeros(1, 4, 2)}, "indices: keys chosen one by one: not served"),
        ({"s_aux": torch.zeros(2)}, "s_aux: expected heads up to 256 beside it, got 300"),
    ],
)
def test_arguments_refused(arguments: dict[str, Any], message: str) -> None:
    q = torch.zeros(1, 2, 4, 300)
    with pytest.raises(ValueError, match=f"mirasol: {message}"):
        integration.attention(torch.nn.Module(), q, q, q, None, **arguments)


def test_an_image_in_too_many_pieces() -> None:
    """Molmo2 takes all images for one block: its first token sees every later piece."""
    model = model_of(FAMILIES["molmo2"])
    model.set_attn_implementation("mirasol")
    inputs, _ = inputs_of(FAMILIES["molmo2"], "none")
    inputs["mm_token_type_ids"] = torch.tensor([[1, 0] * (TOKENS // 2)] * 2)
    with pytest.raises(ValueError, match=r"mirasol: attention mask: .* at most 4 separate key ranges .* for row 0$"):
        model(**inputs)


def test_an_older_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integration.transformers, "__version__", "5.3.0")
    with pytest.raises(ImportError, match=r"mirasol: expected transformers 5\.4 or newer, got 5\.3\.0"):
        integration.register()
