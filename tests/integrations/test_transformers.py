"""attn_implementation="mirasol" against "sdpa": the same logits, gradients and tokens, or an error before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    create_causal_mask,
    flash_attention_mask,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)
from transformers.models.deepseek_ocr2 import configuration_deepseek_ocr2 as deepseek_ocr2
from transformers.models.deepseek_ocr2 import modeling_deepseek_ocr2
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from mirasol_kernels import SnippetLayout
from mirasol_kernels._check import peak
from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import (
    FAMILIES,
    GEMMA4,
    GEMMA4_VISION,
    IMAGE,
    SIGLIP,
    SLIDING_AND_FULL,
    TEXT,
    TOKENS,
    Family,
    inputs_of,
)
from tests.numerics import assert_within_budget
from tests.test_layout import runs

integration.register()
integration.register()  # as often as one likes


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The layouts that reached the kernel: that one is asked for does not mean that it runs."""
    layouts: list[Any] = []
    run = integration.block_causal_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, layout: Any, **kwargs: Any) -> Any:
        layouts.append(layout)
        return run(q, k, v, layout, **kwargs)

    monkeypatch.setattr(integration, "block_causal_attention", spy)
    yield layouts


def model_of(family: Family) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    model = family.build().eval()
    model.set_experts_implementation("eager")  # the others know no float64
    return model


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def trained(model: hf.PreTrainedModel, name: str, dtype: torch.dtype, inputs: dict, real: Tensor) -> tuple[Tensor, ...]:
    """Logits of the real tokens, and the gradients of all parameters in one."""
    model = model.to(dtype)
    model.set_attn_implementation(name)
    model.zero_grad(set_to_none=True)
    said = model(**cast(inputs, dtype))
    logits = said.get("logits", said[0])[real]
    torch.sin(logits).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(grads)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Of models in float64: many of their norms round to float32 whatever the dtype, which may tip either way."""
    error, bound = peak(actual - expected), torch.finfo(torch.float32).eps * peak(expected)
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}"


def assert_trained_alike(model: hf.PreTrainedModel, reference: str, inputs: dict, real: Tensor) -> None:
    exact = trained(model, reference, torch.float64, inputs, real)
    double = trained(model, "mirasol", torch.float64, inputs, real)
    low = trained(model, reference, torch.float32, inputs, real)
    ours = trained(model, "mirasol", torch.float32, inputs, real)
    for i, what in enumerate(("logits", "gradients")):
        assert_same(double[i], exact[i], what)
        assert_within_budget(ours[i], low[i], exact[i], what=what)


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
    model, ids, said = model_of(FAMILIES["llama"]).double(), torch.randint(1, 60, (1, 20)), []
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
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for got, want in zip(trained(model, "mirasol", torch.float64, inputs, real), expected, strict=True):
        assert torch.equal(got, want)
    assert len(spied) > 2 * calls


def pi0() -> hf.PreTrainedModel:
    gemma = {**TEXT, "model_type": "gemma", "num_hidden_layers": 2}
    vlm = {"model_type": "paligemma", "text_config": gemma, "vision_config": SIGLIP, "projection_dim": 32,
           "image_token_index": IMAGE}  # fmt: skip
    config = hf.PI0Config(vlm_config=vlm, dit_config=gemma, chunk_size=5, max_state_dim=6, max_action_dim=6)
    return hf.PI0ForConditionalGeneration(config)


def diffusion_gemma() -> hf.PreTrainedModel:
    text = {**GEMMA4, "num_experts": 2, "top_k_experts": 1, "moe_intermediate_size": 16}
    vision = {**GEMMA4_VISION, "model_type": "gemma4_vision"}
    config = hf.DiffusionGemmaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, canvas_length=5)
    return hf.DiffusionGemmaForBlockDiffusion(config)


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


# -------------------------------------------------------------------- the mask interface


def test_a_mask_lost_without_a_word_and_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """`create_causal_mask` with block_sequence_ids gives None for flash attention: causal, whatever the ids say."""
    model = model_of(FAMILIES["molmo2"]).double()
    inputs, _ = inputs_of(FAMILIES["molmo2"], "none")
    inputs["mm_token_type_ids"][:, 2:8] = 1
    ids = torch.where(inputs["mm_token_type_ids"] == 1, 0, -1)

    config = hf.LlamaConfig(**TEXT, num_hidden_layers=1)
    for flash in ("flash_attention_2", "flash_attention_3", "flash_attention_4"):
        config._attn_implementation_internal = flash
        assert create_causal_mask(config, torch.zeros(2, TOKENS, 32), None, None, block_sequence_ids=ids) is None
    config._attn_implementation = "mirasol"
    mask = create_causal_mask(config, torch.zeros(2, TOKENS, 32), None, None, block_sequence_ids=ids)
    assert mask.layout == SnippetLayout.from_block_ids(ids[0])

    # What a kernel computes that gets this None, here with PyTorch's own attention in flash attention's place.
    monkeypatch.setitem(hf.AttentionInterface._global_mapping, "loses_masks", sdpa_attention_forward)
    monkeypatch.setitem(hf.AttentionMaskInterface._global_mapping, "loses_masks", flash_attention_mask)
    said = {}
    for attn in ("sdpa", "loses_masks", "mirasol"):
        model.set_attn_implementation(attn)
        with torch.no_grad():
            said[attn] = model(**inputs).logits
    assert peak(said["loses_masks"] - said["sdpa"]) > 0.1 * peak(said["sdpa"])
    assert_same(said["mirasol"], said["sdpa"], "logits")


@st.composite
def mask_case(draw: Any) -> dict[str, Any]:
    """What transformers composes: a pattern, blocks, packing, padding, a cache."""
    batch, q_len, past = draw(st.integers(1, 3)), draw(st.integers(1, 10)), draw(st.integers(0, 6))
    kv_offset = draw(st.integers(0, past))
    room = draw(st.sampled_from([0, 0, 4]))  # of a static cache
    n = past + q_len + room
    function = draw(
        st.sampled_from(
            [
                causal_mask_function,
                bidirectional_mask_function,
                sliding_window_causal_mask_function(3),
                sliding_window_bidirectional_mask_function(2),
                chunked_causal_mask_function(4, torch.arange(batch)),
            ]
        )
    )
    tokens = st.lists(st.integers(-1, 1), min_size=n, max_size=n)
    if draw(st.booleans()):
        blocks = torch.tensor(draw(st.lists(tokens, min_size=batch, max_size=batch)))
        function = or_masks(function, blockwise_overlay(blocks))
    if draw(st.booleans()):
        function = and_masks(function, sliding_window_overlay(5))
    if draw(st.booleans()):
        documents = torch.tensor(draw(st.lists(tokens, min_size=batch, max_size=batch)))
        function = and_masks(function, packed_sequence_mask_function(documents))
    padding = None
    if draw(st.booleans()):
        padding = torch.ones(batch, past + q_len, dtype=torch.bool)
        padding[draw(st.integers(0, batch - 1)), draw(st.sampled_from([slice(2), slice(-2, None), slice(0)]))] = False
    return {
        "batch_size": batch,
        "q_length": q_len,
        "kv_length": n - kv_offset,
        "q_offset": draw(st.sampled_from([past, torch.tensor(past)])),
        "kv_offset": kv_offset,
        "mask_function": function,
        "attention_mask": padding,
        "use_vmap": draw(st.booleans()),
    }


def test_every_mask_that_is_composed() -> None:
    """The mask interface against sdpa's dense mask: the same pairs, or an error that names the row with five ranges."""
    served = 0

    @settings(max_examples=300)
    @given(mask_case())
    def run(case: dict[str, Any]) -> None:
        nonlocal served
        dense = sdpa_mask(**case, allow_is_causal_skip=False)[:, 0]
        over = [(b, i) for b, rows in enumerate(dense.tolist()) for i, row in enumerate(rows) if len(runs(row)) > 4]
        if over:
            with pytest.raises(
                ValueError,
                match=rf"mirasol: attention mask: (batch row {over[0][0]}: )?expected at most 4 .* row {over[0][1]}$",
            ):
                integration.attention_mask_of(**case)
            return
        mask = integration.attention_mask_of(**case)
        assert mask.shape == (case["batch_size"], 1, *dense.shape[1:]) and mask.ndim == len(mask.shape)
        assert torch.equal(mask.layout.dense_mask().expand_as(dense), dense)
        served += 1

    run()
    assert served >= 200


def test_nothing_else_can_read_the_mask() -> None:
    mask = integration.attention_mask_of(2, 3, 3)
    assert mask.to("meta") is mask and repr(mask) == str(mask) == f"LayoutMask({mask.layout!r})"
    rows = mask[:, :, -2:, :]
    assert rows.shape == (2, 1, 2, 3) and torch.equal(rows.layout.dense_mask(), mask.layout.dense_mask()[:, -2:])
    bloom = hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2, attn_implementation="mirasol")
    )
    for wrong, message in (
        (lambda: bloom(torch.ones(1, 3, dtype=torch.long)), "of the attention mask: a model that does its attention"),
        (lambda: torch.zeros(3, 3) + mask, "add of the attention mask"),
        (lambda: torch.cat([mask, mask], -1), "cat of the attention mask: .* or changes its masks: not served"),
        (lambda: mask[:, :, :, :2], r"\[\(.*\)\] of the attention mask: not served"),
        (lambda: mask[:, 0], r"\[\(.*\)\] of the attention mask: not served"),
    ):
        with pytest.raises(NotImplementedError, match=f"mirasol: .*{message}"):
            wrong()
    with pytest.raises(
        AttributeError, match=r"mirasol: the attention mask is a SnippetLayout, not a tensor or .* dtype"
    ):
        mask.dtype  # noqa: B018


# -------------------------------------------------------------------- masks that come from elsewhere


def call(mask: Any, q_len: int = 4, k_len: int = 4, is_causal: bool | None = None, **kwargs: Any) -> Tensor:
    q, k, v = (torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (q_len, k_len, k_len))
    ours = integration.attention(torch.nn.Module(), q, k, v, mask, is_causal=is_causal, **kwargs)[0]
    assert_same(ours, sdpa_attention_forward(torch.nn.Module(), q, k, v, mask, is_causal=is_causal)[0], "out")
    return ours


def test_dense_masks_and_none() -> None:
    dense = SnippetLayout.ragged([1, 2, 1]).dense_mask()[None]  # (1, 1, N, N)
    call(dense)
    call(torch.where(dense, 0.0, float("-inf")).double())
    call(torch.zeros(dense.shape, dtype=torch.float64).masked_fill(~dense, torch.finfo(torch.float64).min))
    call(torch.cat([dense, dense.tril()]))
    call(None)
    call(None, is_causal=False)
    call(None, q_len=1)
    call(None, k_len=6, is_causal=False)
    call(None, is_causal=False, sliding_window=2)  # as "sdpa" has it
    call(dense[:, :, 3:].expand(2, -1, -1, -1))  # one row for all queries


def test_a_dense_mask_for_a_model() -> None:
    model, ids = model_of(FAMILIES["llama"]).double(), torch.randint(1, 60, (2, 6))
    said = []
    for attn in ("sdpa", "mirasol"):
        model.set_attn_implementation(attn)
        with torch.no_grad():
            said.append(model(ids, attention_mask=SnippetLayout.ragged([2, 3, 1]).dense_mask()[None]).logits)
    assert_same(said[1], said[0], "logits")


def test_sinks_in_bfloat16() -> None:
    """As gpt-oss computes them; a row that sees nothing, all of whose softmax is the sink's, is zero."""
    module, mask = torch.nn.Module(), torch.ones(4, 6, dtype=torch.bool).tril(1)
    mask[2] = False
    module.num_key_value_groups, tensors = 2, [torch.randn(2, h, n, 8).bfloat16() for h, n in ((4, 4), (2, 6), (2, 6))]
    tensors.append(torch.randn(4).bfloat16())

    def both(dtype: torch.dtype) -> list[list[Tensor]]:
        results = []
        hidden = torch.zeros(4, 6, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)[None, None]
        for function in (eager_attention_forward, integration.attention):
            q, k, v, sinks = leaves = [x.to(dtype).requires_grad_() for x in tensors]
            module.sinks = sinks
            out = function(module, q, k, v, hidden, scaling=0.5, s_aux=sinks)[0]
            results.append([out.detach(), *torch.autograd.grad(out.float().sin().sum(), leaves)])
        return results

    (exact, double), (low, ours) = both(torch.float64), both(torch.bfloat16)
    assert not ours[0][:, 2].any()
    for what, want, wide, got, reference in zip(
        ("out", "dq", "dk", "dv", "dsinks"), exact, double, ours, low, strict=True
    ):
        assert_same(wide, want, what)
        assert_within_budget(got, reference, want, what=what)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": torch.rand(1, 1, 4, 4)}, "attention_mask: a bias of the scores"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"attention_mask: expected .*, got torch.bool \(2, 4\)"),
        ({"mask": torch.ones(2, 2, 4, 4, dtype=torch.bool)}, r"attention_mask: expected .*, got .* \(2, 2, 4, 4\)"),
        ({"mask": torch.ones(2, 1, 4, 4, dtype=torch.long)}, r"attention_mask: expected .*, got torch.int64 .*"),
        ({"mask": "causal"}, "attention_mask: expected .*, got str"),
        ({"mask": None, "k_len": 6}, "attention_mask: expected a mask for 4 queries and 6 keys, got None"),
        ({"mask": None, "sliding_window": 2}, "sliding_window: expected a mask of the mask interface"),
        ({"mask": None, "cu_seq_lens_q": torch.tensor([0, 4])}, "cu_seq_lens_q: expected a mask"),
    ],
)
def test_masks_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"mirasol: {message}"):
        call(**arguments)
