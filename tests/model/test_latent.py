"""The latent model: block-causal exactly, streamed as offline, masked in training alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from mirasol_kernels import SnippetLayout
from mirasol_model.config import LatentConfig
from mirasol_model.latent import LatentModel
from mirasol_model.layers import merge_heads, rotary, rotate, split_heads
from tests.model.clips import stir
from tests.numerics import assert_close_fp64

D, M = 64, 4
REACH = {"all": {}, "window": {"window": 3}, "window and sink": {"window": 2, "sink": 1}}
CONFIG = LatentConfig(layers=2, heads=4, mlp_dim=128)


def made(reach: str = "all", **changes) -> LatentModel:
    return stir(LatentModel(D, M, replace(CONFIG, **REACH[reach], **changes)).double()).eval()


def tokens(rows: int, snippets: int) -> torch.Tensor:
    return torch.randn(rows, snippets, M, D, dtype=torch.float64)


@pytest.mark.parametrize("reach", REACH)
@pytest.mark.parametrize("snippets", [1, 2, 7])
def test_it_is_the_dense_transformer(reach, snippets):
    latent, x = made(reach), tokens(2, snippets)
    seen = SnippetLayout.uniform(snippets, M, **REACH[reach]).dense_mask("cpu")
    y = (x + latent.slots).flatten(1, 2)
    angles = rotary(torch.arange(snippets * M) // M, D // 4, torch.float64)
    for block in latent.blocks:
        z = block.norm1(y)
        q, k, v = (split_heads(part, 4) for part in (block.query(z), *block.key_value(z).chunk(2, -1)))
        attended = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, attn_mask=seen)
        y = y + block.out(merge_heads(attended))
        y = y + block.down(F.gelu(block.up(block.norm2(y))))
    assert_close_fp64(latent(x), latent.norm(y).view_as(x))


@pytest.mark.parametrize("reach", REACH)
def test_the_future_leaves_no_trace(reach):
    latent, x = made(reach), tokens(2, 6)
    before = latent(x)
    for t in range(6):
        changed = x.clone()
        changed[:, t] = torch.randn_like(changed[:, t])
        after = latent(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert not torch.equal(after[:, t:], before[:, t:])


def test_a_clip_that_ends_early_is_what_it_is_alone():
    latent, x = made(), tokens(2, 6)
    assert_close_fp64(latent(x)[:, :4], latent(x[:, :4]))


@pytest.mark.parametrize("reach", ["window", "window and sink"])
def test_streaming_is_the_same(reach):
    latent, x = made(reach), tokens(3, 9)
    config = latent.config
    caches = latent.caches(3, config.window, config.sink, x)
    h = torch.stack([latent.step(x[:, t], caches) for t in range(9)], dim=1)
    assert_close_fp64(h, latent(x))


def test_positions_are_relative_and_need_no_table():
    """Rotary: the angles of snippets t0 .. t0+T-1 give the same attention for any t0, however large."""
    q, k = (torch.randn(1, 4, 6, 16, dtype=torch.float64) for _ in range(2))
    scores = [
        rotate(q, rotary(torch.arange(6) + start, 16, torch.float64))
        @ rotate(k, rotary(torch.arange(6) + start, 16, torch.float64)).mT
        for start in (0, 100_000)
    ]
    assert (scores[0] - scores[1]).abs().max() < 1e-9
    angles = rotary(torch.arange(64), 16, torch.float64)
    assert len(torch.unique(torch.cat(angles, dim=1), dim=0)) == 64
    assert len(torch.unique(made().slots, dim=0)) == M


def test_masking_is_random_where_it_is_asked_for_and_absent_elsewhere():
    latent, x = made(mask_ratio=0.5).train(), tokens(2, 5)
    assert torch.equal(latent(x), latent(x))
    first = latent(x, mask=True)[:, 0].detach()
    assert not torch.equal(first, latent(x, mask=True)[:, 0])
    assert not torch.equal(first, latent(x)[:, 0])
    (gradient,) = torch.autograd.grad(latent(x, mask=True).sum(), latent.mask)
    assert gradient.abs().max() > 0


def test_the_share_that_is_masked_is_the_ratio():
    """Where every block is silenced, h shows x itself: masked tokens are those that show the mask."""
    latent = LatentModel(D, M, replace(CONFIG, mask_ratio=0.3)).double().train()
    for block in latent.blocks:
        for layer in (block.out, block.down):
            torch.nn.init.zeros_(layer.weight)
    h = latent(tokens(4, 200), mask=True)
    masked = torch.isclose(h, latent.norm(latent.mask + latent.slots)).all(-1)
    spread = (0.3 * 0.7 / masked.numel()) ** 0.5
    assert abs(masked.double().mean() - 0.3) < 5 * spread
