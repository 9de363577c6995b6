"""attn_implementation="mirasol" against "sdpa": the same logits, gradients and tokens, or an error before any work."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch._dynamo.testing import CompileCounterWithBackend

from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import (
    FAMILIES,
    PACKED,
    TOKENS,
    assert_same,
    assert_trained_alike,
    cast,
    inputs_of,
    model_of,
    trained,
)

integration.register()
integration.register()  # as often as one likes


CASES = [
    (name, padding)
    for name, family in FAMILIES.items()
    for padding in ("none", "left", "right", "packed")
    if padding != "packed" or family.packs
]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_logits_and_gradients(name: str, padding: str, spied: list[Any]) -> None:
    model = model_of(FAMILIES[name])
    inputs, real = inputs_of(FAMILIES[name], padding)
    assert_trained_alike(model, FAMILIES[name].reference, inputs, real)
    assert len(spied) >= 4
    if padding == "packed":  # else both might have taken them for one sequence
        masks = [layout.dense_mask() for layout in spied if layout.q_len == TOKENS]
        assert masks
        assert not any(mask[:, PACKED:, :PACKED].any() or mask[:, :PACKED, PACKED:].any() for mask in masks)


def test_sequences_packed_for_flash_attention() -> None:
    """What it reads off the lengths that it is given, the mask must say: an error, or each sequence as if alone."""
    model = model_of(FAMILIES["gemma3_text"]).double()
    sequences = [torch.randint(1, 60, (n,)).tolist() for n in (5, 9, 3)]
    flattened = hf.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    batch = flattened([{"input_ids": ids} for ids in sequences])
    del batch["labels"]
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        alone = torch.cat([model(torch.tensor([ids])).logits for ids in sequences], 1)
        model.set_attn_implementation("mirasol")
        assert_same(model(**batch, use_cache=False).logits, alone, "logits")
        for wrong in ({}, {"use_cache": False, "attention_mask": torch.ones(1, 17, dtype=torch.long)}):
            with pytest.raises(ValueError, match=r"mirasol: cu_seq_lens_q: .* tokens 5 \.\. 13 see keys .*=False"):
                model(**batch, **wrong)
        one = flattened([{"input_ids": sequences[1]}])
        del one["labels"]
        assert_same(model(**one).logits, alone[:, 5:14], "logits of one")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", FAMILIES)
def test_generation(name: str, cache: str, spied: list[Any]) -> None:
    """Greedy, past every sliding window, left-padded: the same tokens, and the same logits at each step."""
    model = model_of(FAMILIES[name]).double()
    inputs, _ = inputs_of(FAMILIES[name], "left")
    said = []
    for attn in (FAMILIES[name].reference, "mirasol"):
        model.set_attn_implementation(attn)
        said.append(
            model.generate(
                **cast(inputs, torch.float64),
                max_new_tokens=8,
                do_sample=False,
                cache_implementation=None if cache == "dynamic" else cache,
                return_dict_in_generate=True,
                output_logits=True,
            )
        )
    assert torch.equal(said[0].sequences, said[1].sequences) and said[0].sequences.shape[1] == TOKENS + 8
    assert_same(torch.stack(said[1].logits), torch.stack(said[0].logits), "logits")
    decoding = [layout for layout in spied if layout.q_len == 1]
    assert len(decoding) >= 14
    if cache == "static" and name not in ("mistral", "gemma4"):  # whose kernels see rings of the window alone
        assert any(layout.k_len > TOKENS + 1 for layout in spied)  # room for what is to come


def test_compiled_decoding_does_not_compile_again() -> None:
    """Static cache, as generate compiles it where there is a GPU: one graph for the prompt, one for every step."""
    model = model_of(FAMILIES["gemma3_text"])
    model.set_attn_implementation("mirasol")
    inputs, _ = inputs_of(FAMILIES["gemma3_text"], "left")
    arguments = {**inputs, "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    expected = model.generate(**arguments)
    torch._dynamo.reset()
    backend = CompileCounterWithBackend("aot_eager")
    model.forward = torch.compile(model.forward, backend=backend, fullgraph=True)
    assert torch.equal(model.generate(**arguments), expected)
    assert backend.frame_count == 2


def test_a_conversation() -> None:
    """Several tokens after a cache."""
    model = model_of(FAMILIES["gemma3_text"]).double()
    ids = torch.randint(1, 60, (2, 20))
    said = []
    for attn in ("sdpa", "mirasol"):
        model.set_attn_implementation(attn)
        with torch.inference_mode():
            first = model(ids[:, :9], use_cache=True)
            said.append(model(ids[:, 9:], cache=first.cache).logits)
    assert_same(said[1], said[0], "logits")


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},  # whose caches change places
    "prompt lookup": {"prompt_lookup_num_tokens": 3},  # caches that are cut back
    "assistant": {"assistant_model": True},
}


@pytest.mark.parametrize("way", WAYS)
def test_other_ways_to_generate(way: str, spied: list[Any]) -> None:
    model, ids, said = model_of(FAMILIES["gemma3_text"]).double(), torch.randint(1, 60, (1, 20)), []
    options = WAYS[way] | ({"assistant_model": model} if "assistant_model" in WAYS[way] else {})
    for attn in ("sdpa", "mirasol"):
        model.set_attn_implementation(attn)
        said.append(model.generate(ids, max_new_tokens=12, do_sample=False, **options))
    assert torch.equal(said[0], said[1]) and spied
    assert way == "beams" or any(1 < layout.q_len < 20 for layout in spied)  # guesses, looked at together


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, spied: list[Any]) -> None:
    model = model_of(FAMILIES["gemma3"]).train()
    inputs, real = inputs_of(FAMILIES["gemma3"], "left")
    expected = trained(model, "mirasol", torch.float64, inputs, real)
    calls = len(spied)
    model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
    got = trained(model, "mirasol", torch.float64, inputs, real)
    for what, again, once in zip(("logits", "gradients"), got, expected, strict=True):
        assert_same(again, once, what)
    assert len(spied) > 2 * calls
