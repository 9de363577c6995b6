"""Combiners against dense definitions: what sees what, what leaves, what is absent, and one snippet at a time."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mirasol_model.combiner import Combiner, PerceiverCombiner, TransformerCombiner, build_combiner
from mirasol_model.config import CombinerConfig
from mirasol_model.layers import merge_heads, split_heads
from tests.model.clips import VARIANTS, combiner_config, stir
from tests.numerics import GOLDEN_GRADIENT, assert_close_fp64, assert_golden, golden

D, NV, NA = 64, 9, 4
ACROSS = [name for name in VARIANTS if name.startswith(("all", "ttm"))]
ALONE = [name for name in VARIANTS if name not in ACROSS]


def made(variant: str, **changes) -> Combiner:
    return stir(build_combiner(D, combiner_config(variant, **changes)).double())


def tokens(rows: int, snippets: int, n: int = NV) -> Tensor:
    return torch.randn(rows, snippets, n, D, dtype=torch.float64)


def ragged(rows: int, snippets: int, n: int) -> np.ndarray:
    counts = np.random.default_rng(rows + snippets + n).integers(0, n + 1, (rows, snippets))
    counts[0, 0] = n
    return counts


# ------------------------------------------------------------------------------------- the transformer, densely


def dense_transformer(
    combiner: TransformerCombiner, video: Tensor | None, audio: Tensor | None, counts=(None, None)
) -> Tensor:
    """Row by row, with a mask over all tokens, nothing pruned: the last m tokens of each snippet are cut at the end."""
    config = combiner.config
    rows, snippets = (video if video is not None else audio).shape[:2]
    out = torch.zeros(rows, snippets, config.tokens, D, dtype=torch.float64)
    for b in range(rows):
        pieces, ids = [], []
        for t in range(snippets):
            for x, count in zip((video, audio), counts, strict=True):
                if x is not None:
                    pieces.append(x[b, t] if count is None else x[b, t, : count[b, t]])
            if combiner.queries is not None:
                pieces.append(combiner.queries)
            ids += [t] * (sum(map(len, pieces)) - len(ids))
        x, at = torch.cat(pieces)[None], torch.tensor(ids)
        back = at[:, None] - at
        reach = snippets if config.window is None else config.window
        seen = (back >= 0) & (back < reach) if config.context == "all" else back == 0
        half = D // config.heads // 2
        turn = at[:, None] * 10_000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        turn = torch.polar(torch.ones_like(turn), turn if config.context == "all" else 0 * turn)

        def turned(y: Tensor, half: int = half, turn: Tensor = turn) -> Tensor:
            y = torch.complex(y[..., :half].contiguous(), y[..., half:].contiguous()) * turn
            return torch.cat([y.real, y.imag], dim=-1)

        for block in combiner.blocks:
            y = block.norm1(x)
            q = split_heads(block.query(y), config.heads)
            k, v = (split_heads(part, config.heads) for part in block.key_value(y).chunk(2, dim=-1))
            x = x + block.out(merge_heads(F.scaled_dot_product_attention(turned(q), turned(k), v, attn_mask=seen)))
            x = x + block.down(F.gelu(block.up(block.norm2(x))))
        x = combiner.norm(x)[0]
        for t in range(snippets):
            last = x[at == t][-config.tokens :]
            out[b, t, config.tokens - len(last) :] = last
    return out


TRANSFORMERS = [name for name in VARIANTS if VARIANTS[name]["kind"] == "transformer"]


@pytest.mark.parametrize("variant", TRANSFORMERS)
@pytest.mark.parametrize("given", ["both", "video", "audio", "ragged"])
def test_transformer_is_the_dense_one_and_pruning_changes_nothing(variant, given):
    combiner, rows, snippets = made(variant), 2, 4
    video = None if given == "audio" else tokens(rows, snippets).requires_grad_()
    audio = None if given == "video" else tokens(rows, snippets, NA).requires_grad_()
    counts = (ragged(rows, snippets, NV), ragged(rows, snippets, NA)) if given == "ragged" else (None, None)
    x = combiner(video, audio, counts)
    assert x.shape == (rows, snippets, combiner.config.tokens, D)
    dense = dense_transformer(combiner, video, audio, counts)
    assert_close_fp64(x, dense)
    leaves = {"video": video, "audio": audio, **dict(combiner.named_parameters())}
    leaves = {name: leaf for name, leaf in leaves.items() if leaf is not None}
    cotangent = torch.randn_like(x)
    ours, theirs = (torch.autograd.grad(y, tuple(leaves.values()), cotangent) for y in (x, dense))
    for name, a, b in zip(leaves, ours, theirs, strict=True):
        assert_close_fp64(a, b, what=name)


def test_last_order_with_fewer_tokens_than_leave_fills_with_zeros():
    combiner = made("current-last")
    video = tokens(2, 3, 2)
    x = combiner(video, None)
    assert x[:, :, :2].abs().max() == 0
    assert_close_fp64(x, dense_transformer(combiner, video, None))


@pytest.mark.parametrize("order", ["", "-last"])
def test_all_with_one_snippet_equals_current(order):
    one, every = made(f"current{order}"), made(f"all{order}")
    every.load_state_dict(one.state_dict())
    video, audio = tokens(3, 1), tokens(3, 1, NA)
    assert_close_fp64(every(video, audio), one(video, audio))


# --------------------------------------------------------------------------------------------- all kinds alike


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_future_leaves_no_trace(variant):
    combiner, video, audio = made(variant), tokens(2, 5), tokens(2, 5, NA)
    before = combiner(video, audio)
    for t in range(5):
        changed = [x.clone() for x in (video, audio)]
        for x in changed:
            x[:, t] = torch.randn_like(x[:, t])
        after = combiner(*changed)
        assert torch.equal(after[:, :t], before[:, :t]), f"snippet {t} is seen earlier"
        assert not torch.equal(after[:, t], before[:, t])
        if variant in ALONE:
            assert torch.equal(after[:, t + 1 :], before[:, t + 1 :]), f"snippet {t} is seen later"
        elif t < 4 and variant != "all-last":
            assert not torch.equal(after[:, t + 1], before[:, t + 1]), f"snippet {t} is forgotten at once"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("cuts", [(1, 2, 3, 4, 5, 6), (2, 5, 6), (5, 6)])
@pytest.mark.parametrize("given", ["full", "ragged", "full after ragged"])
def test_step_by_step_is_the_whole(variant, cuts, given):
    combiner, rows, snippets = made(variant), 2, 6
    video, audio = tokens(rows, snippets), tokens(rows, snippets, NA)
    counts = [None, None]
    if given != "full":
        counts = [ragged(rows, snippets, NV), ragged(rows, snippets, NA)]
    if given == "full after ragged":  # the window of all-window forgets what was ragged
        for count, n in zip(counts, (NV, NA), strict=True):
            count[:, 2:] = n
    state, pieces, begin = None, [], 0
    for end in cuts:
        part = tuple(None if count is None else count[:, begin:end] for count in counts)
        x, state = combiner.step(video[:, begin:end], audio[:, begin:end], part, state)
        pieces.append(x)
        begin = end
    assert_close_fp64(torch.cat(pieces, dim=1), combiner(video, audio, tuple(counts)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_row_is_what_it_would_be_alone(variant):
    """Rows with their own counts are what they are by themselves, what is absent cut off instead of counted out."""
    combiner, rows, snippets = made(variant), 3, 3
    video, audio = tokens(rows, snippets), tokens(rows, snippets, NA)
    nv, na = np.array([9, 5, 9]), np.array([4, 4, 0])
    counts = tuple(np.repeat(n[:, None], snippets, axis=1) for n in (nv, na))
    together = combiner(video, audio, counts)
    for b in range(rows):
        sound = audio[b : b + 1, :, : na[b]] if na[b] else None
        assert_close_fp64(together[b : b + 1], combiner(video[b : b + 1, :, : nv[b]], sound))


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_does_not_count_may_be_anything(variant):
    combiner = made(variant)
    video, audio = tokens(2, 3), tokens(2, 3, NA)
    counts = (np.array([[9, 3, 0], [9, 9, 9]]), np.array([[0, 4, 0], [4, 1, 4]]))
    before = combiner(video, audio, counts)
    for x, count in zip((video, audio), counts, strict=True):
        absent = torch.arange(x.shape[2]) >= torch.from_numpy(count)[..., None]
        x[absent] = torch.nan
    assert torch.equal(combiner(video, audio, counts), before)


@pytest.mark.parametrize("variant", VARIANTS)
def test_snippets_without_a_token_are_finite(variant):
    combiner = made(variant)
    video = tokens(2, 3).requires_grad_()
    for counts in ([[9, 0, 9], [0, 9, 9]], [[0, 0, 0], [0, 0, 0]]):
        x = combiner(video, None, (np.array(counts), None))
        assert x.isfinite().all()
        gradients = torch.autograd.grad(x.square().sum(), [video, *combiner.parameters()], allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("variant", VARIANTS)
def test_both_modalities_matter_and_so_does_every_parameter(variant):
    combiner = made(variant)
    video, audio = tokens(2, 3).requires_grad_(), tokens(2, 3, NA).requires_grad_()
    names, parameters = zip(*combiner.named_parameters(), strict=True)
    gradients = torch.autograd.grad((combiner(video, audio) * torch.randn(4, D)).sum(), [video, audio, *parameters])
    for name, gradient in zip(("video", "audio", *names), gradients, strict=True):
        assert gradient.abs().max() > 0, name


def test_no_modality_is_an_error():
    with pytest.raises(ValueError, match="combiner: video, audio: expected at least one of them, got None for both"):
        made("current")(None, None)


def test_all_keeps_no_more_than_its_window():
    combiner, state = made("all-window"), None
    for _ in range(6):
        _, state = combiner.step(tokens(1, 1), None, state=state)
        assert len(state.layers) <= 1
    assert state.seen == 6
    _, state = made("all").step(tokens(1, 2), None)
    assert len(state.layers) == 1


# ------------------------------------------------------------------------------------------------ single kinds


def test_token_learner_is_a_softmax_mean_of_the_raw_tokens():
    combiner, video, audio = made("token_learner"), tokens(2, 3), tokens(2, 3, NA)
    x, scorer = torch.cat([video, audio], dim=2), combiner.scorer
    scores = scorer.down(F.gelu(scorer.up(scorer.norm(x)), approximate="tanh"))
    assert_close_fp64(combiner(video, audio), scores.softmax(2).transpose(2, 3) @ x)


def test_ttm_carries_one_memory_through_time():
    """Its output at t depends on every earlier snippet, and the state it returns is all that it knows of them."""
    combiner, video = made("ttm"), tokens(1, 4).requires_grad_()
    x, memory = combiner.step(video, None)
    assert memory.shape == (1, combiner.config.memory, D)
    (gradient,) = torch.autograd.grad(x[:, 3].sum(), video, retain_graph=True)
    assert all(gradient[:, t].abs().max() > 0 for t in range(4))
    later = tokens(1, 1)
    assert_close_fp64(combiner.step(later, None, state=memory)[0], combiner(torch.cat([video, later], 1), None)[:, 4:])


@pytest.mark.parametrize("name", ["perceiver_open_flamingo", "perceiver_lucidrains"])
def test_perceiver_golden(name):
    arrays = golden(f"extra/{name}")
    values = {key: torch.from_numpy(array) for key, array in arrays.items()}
    latents = values["param.latents"]
    config = CombinerConfig(kind="perceiver", tokens=len(latents), layers=2, heads=4, mlp_dim=4 * latents.shape[1])
    combiner = PerceiverCombiner(latents.shape[1], config, head_dim=8)
    state = {"latents": latents, "norm.weight": values["param.norm.weight"], "norm.bias": values["param.norm.bias"]}
    theirs = {
        "norm_tokens": "0.norm_media",
        "norm_latents": "0.norm_latents",
        "query": "0.to_q",
        "key_value": "0.to_kv",
        "out": "0.to_out",
        "norm": "1.0",
        "up": "1.1",
        "down": "1.3",
    }
    names = {
        key: f"layers.{key.split('.')[1]}.{_theirs(key, theirs)}" for key in combiner.state_dict() if "layers." in key
    }
    state |= {key: values[f"param.{other}"] for key, other in names.items()}
    combiner.load_state_dict(state)

    x = values["in.x"].requires_grad_()  # (B, T, F, v, d), or (B, T, n, d): a medium is a snippet
    media = x
    if x.ndim == 5:
        media = x + values["param.frame_embs"][: x.shape[2], None]
        media = media.flatten(2, 3) + values["param.media_time_embs"][: x.shape[1]]
    else:
        media = x + values["param.media_pos_emb"][: x.shape[1]]
    y = combiner(media, None)
    assert_golden(y, arrays["out.y"])
    y.backward(values["cot.y"])
    assert_golden(x.grad, arrays["grad_in.x"], tol=GOLDEN_GRADIENT)
    ours = dict(combiner.named_parameters())
    for key, other in {"latents": "latents", "norm.weight": "norm.weight", **names}.items():
        assert_golden(ours[key].grad, arrays[f"grad_param.{other}"], tol=GOLDEN_GRADIENT, what=key)


def _theirs(key: str, names: dict[str, str]) -> str:
    _, _, ours, kind = key.split(".")
    return f"{names[ours]}.{kind}"
