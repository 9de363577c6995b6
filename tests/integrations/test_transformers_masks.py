"""The mask interface against sdpa's dense masks, masks that come from elsewhere, and sinks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
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
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from mirasol_kernels import SnippetLayout
from mirasol_kernels._check import peak
from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import (
    FAMILIES,
    TEXT,
    TOKENS,
    assert_same,
    inputs_of,
    model_of,
)
from tests.numerics import assert_within_budget
from tests.test_layout import runs

integration.register()


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


def test_wide_heads_compile() -> None:
    """What they are left to is told of in a warning, and a warning breaks a graph."""
    torch._dynamo.reset()
    module, mask, q = torch.nn.Module(), integration.attention_mask_of(1, 4, 4), torch.randn(1, 2, 4, 300)

    def attend(q: Tensor) -> Tensor:
        return integration.attention(module, q, q, q, mask)[0]

    with pytest.warns(UserWarning, match="mirasol: heads of 300, wider than 256"):
        expected = attend(q)
    assert torch.equal(torch.compile(attend, fullgraph=True, backend="eager")(q), expected)


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


def packed(q_starts: list[int], k_starts: list[int] | None = None) -> dict[str, Any]:
    """Sequences in one row under a mask that is causal over all of it."""
    lengths = {"cu_seq_lens_q": torch.tensor(q_starts), "cu_seq_lens_k": torch.tensor(k_starts or q_starts)}
    return {"mask": integration.attention_mask_of(2, 4, 4), **lengths}


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
        (packed([0, 1, 4]), r"cu_seq_lens_q: expected a mask that keeps .* tokens 1 \.\. 3 see keys 0 \.\. 3: pass"),
        (packed([0, 4, 8]), r"cu_seq_lens_q: expected 3 ascending places in one row of 4 tokens, got \[0, 4, 8\]"),
        (packed([0, 4], [0, 1, 4]), r"cu_seq_lens_k: expected 2 ascending places .*, got \[0, 1, 4\]"),
    ],
)
def test_masks_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"mirasol: {message}"):
        call(**arguments)
