"""`attn_implementation="mirasol"` for Hugging Face transformers 5: `register()`, then load a model with it.

A model asks the mask interface for its mask, once per kind of layer and forward pass, and hands what it gets to the
attention function of each layer (transformers, masking_utils.py and modeling_utils.py).  Here that is a
`SnippetLayout`: a few key ranges per token, found by evaluating the model's mask function over blocks of query rows.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    padding_mask_function,
    prepare_padding_mask,
)

from mirasol_kernels import _from_mask
from mirasol_kernels.block_causal_attention import block_causal_attention
from mirasol_kernels.block_causal_attention.api import LARGEST_HEAD
from mirasol_kernels.context_parallel import part
from mirasol_kernels.layout import SnippetLayout

NAME = "mirasol"
OLDEST = (5, 4)  # whose mask interface gets lengths and offsets
WHERE = f"{NAME}: attention mask"

NOT_SERVED = "not served; load the model with another attn_implementation"

# What some models pass to their attention function and block_causal_attention does not do.
REFUSED = {
    "softcap": "a soft cap of the scores",
    "sinks": "a sink for each token",
    "position_bias": "a bias of the scores",
    "indices": "keys chosen one by one",
    "block_indices": "key blocks chosen one by one",
    "output_attentions": "the attention weights as a result",
}


def register() -> None:
    """Makes `attn_implementation="mirasol"` known to transformers.  Calling it twice does no harm."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise ImportError(
            f"{NAME}: expected transformers {'.'.join(map(str, OLDEST))} or newer, got {transformers.__version__}"
        )
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask_of)


class LayoutMask(BlockMask):
    """A layout in the place of a mask (B, 1, Nq, Nk): models hand it on, and nothing but `attention` can read it.

    It is a BlockMask by type alone, because that is what transformers returns as it came when a mask was prepared
    before the forward pass (generation with a static cache).  Whatever else is done with it is an error.
    """

    def __init__(self, layout: SnippetLayout, batch: int) -> None:  # not BlockMask's: there are no blocks
        self.layout = layout
        self.batch = batch
        self.apart: tuple[Any, Any] | None = None  # what `check_packed` was given last

    @property
    def shape(self) -> tuple[int, ...]:
        return self.batch, 1, self.layout.q_len, self.layout.k_len

    @property
    def ndim(self) -> int:
        return 4

    def to(self, device: torch.device | str, *_: Any, **__: Any) -> LayoutMask:
        self.layout.to(device)
        return self

    @torch.compiler.disable  # it looks at their values, once for all layers that have this mask
    def check_packed(self, q_starts: Any, k_starts: Any) -> None:
        """ValueError where one of the sequences that are packed in a row sees keys of another.

        q_starts, k_starts: (S + 1,) where each of S sequences begins, and where the last one ends.
        """
        if self.apart is not None and self.apart[0] is q_starts and self.apart[1] is k_starts:
            return
        starts = [torch.as_tensor(x).flatten().tolist() for x in (q_starts, k_starts)]
        for name, places, tokens in zip("qk", starts, (self.layout.q_len, self.layout.k_len), strict=True):
            if len(places) != len(starts[0]) or sorted(places) != places or not all(0 <= x <= tokens for x in places):
                expected = f"{len(starts[0])} ascending places in one row of {tokens} tokens"
                raise ValueError(f"{NAME}: cu_seq_lens_{name}: expected {expected}, got {places}")
        for queries, keys in zip(*map(itertools.pairwise, starts), strict=True):
            begin, end = self.layout.span(*queries)
            if begin < end and not keys[0] <= begin <= end <= keys[1]:
                raise ValueError(
                    f"{NAME}: cu_seq_lens_q: expected a mask that keeps these sequences apart, got one under which"
                    f" tokens {queries[0]} .. {queries[1] - 1} see keys {begin} .. {end - 1}: pass position_ids that"
                    " begin anew and use_cache=False, and no attention_mask"
                )
        self.apart = q_starts, k_starts

    @torch.compiler.disable
    def __getitem__(self, index: Any) -> LayoutMask:
        """[:, :, rows, :] alone: models that drop queries on the way (Gemma 4's layers of shared keys)."""
        b, h, rows, k = index if isinstance(index, tuple) and len(index) == 4 else (None,) * 4
        if not (b == h == k == slice(None) and isinstance(rows, slice) and rows.step in (None, 1)):
            raise NotImplementedError(f"{NAME}: [{index}] of the attention mask: {NOT_SERVED}")
        begin, end, _ = rows.indices(self.layout.q_len)
        queries, keys = np.array([[begin, max(begin, end)]]), np.array([[0, self.layout.k_len]])
        return LayoutMask(part(self.layout, queries, keys), self.batch)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{NAME}: the attention mask is a SnippetLayout, not a tensor or a BlockMask: no {name}")

    @classmethod
    def __torch_function__(cls, function: Callable[..., Any], *_: Any) -> Any:
        # No TypeError: `scores + mask` would make another one of it, without the message.
        raise NotImplementedError(
            f"{NAME}: {function.__name__} of the attention mask: a model that does its attention by itself, or changes"
            f" its masks: {NOT_SERVED}"
        )

    def __repr__(self) -> str:
        return f"LayoutMask({self.layout!r})"

    __str__ = __repr__


@torch.compiler.disable  # it looks at the values of the mask
def attention_mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] = causal_mask_function,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    config: Any = None,
    **_: Any,
) -> LayoutMask:
    """The mask interface: query i is token i + q_offset, key j is token j + kv_offset, attention_mask hides padding.

    attention_mask: bool (B, tokens so far).  use_vmap: mask_function takes 0-dimensional indices only.  config: the
    model's, which may ask for a soft cap: better refused here than by the first layer that has one.
    Raises ValueError naming the first query that sees more than four separate ranges of keys.
    """
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise ValueError(f"{NAME}: config: attn_logit_softcapping: {REFUSED['softcap']}: {NOT_SERVED}")
    offset = int(q_offset)  # static caches keep it in a tensor
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None and bool(padding[:, kv_offset : kv_offset + kv_length].all()):
        padding = None
    if padding is None and mask_function in (causal_mask_function, bidirectional_mask_function):
        ahead = offset - kv_offset if mask_function is causal_mask_function else kv_length
        layout = _causal(q_length, kv_length, ahead)
    else:
        fn = mask_function if padding is None else and_masks(mask_function, padding_mask_function(padding))
        fn = add_offsets_to_mask_function(fn, offset, kv_offset)
        evaluate = _from_mask.vmapped(WHERE, fn) if use_vmap else _from_mask.broadcast(fn)
        rows = _from_mask.lines_of(WHERE, evaluate, q_length, kv_length, batch_size, device)
        layout = SnippetLayout("mask", rows, kv_length, len(rows) if len(rows) > 1 else None)
    return LayoutMask(layout.to(device), batch_size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: LayoutMask | Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention interface: query (B, Hq, Nq, D), key (B, Hkv, Nk, D), value (B, Hkv, Nk, Dv) -> (B, Nq, Hq, Dv).

    attention_mask: what `attention_mask_of` gave; or a dense (B or 1, 1, Nq or 1, Nk), bool or added to the scores
    (zeros and the lowest number alone); or None for all keys or, where is_causal (or else the module) says so, causal.
    cu_seq_lens_q, cu_seq_lens_k: where packed sequences begin, of a row; a mask must keep them apart.
    s_aux: (Hq,), a logit per head that takes its part of the softmax and gives nothing (gpt-oss), differentiable too.
    Heads wider than `block_causal_attention` takes are left to "sdpa", under the same mask made dense, with a warning.
    Raises ValueError for what `block_causal_attention` does not do, before anything is computed.
    """
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None and kwargs[name] is not False:
            raise ValueError(f"{NAME}: {name}: {what}: {NOT_SERVED}")
    if dropout:
        raise ValueError(f"{NAME}: dropout: expected 0, got {dropout}: set attention_dropout=0 in the config")
    if isinstance(attention_mask, LayoutMask):
        layout, q_starts, k_starts = attention_mask.layout, kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
        if q_starts is not None and k_starts is not None:
            attention_mask.check_packed(q_starts, k_starts)
    elif attention_mask is not None:
        layout = _of_dense(attention_mask, query.shape[0], query.shape[2])
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        layout = _of_no_mask(query.shape[2], key.shape[2], causal, kwargs)
    if max(query.shape[3], value.shape[3]) > LARGEST_HEAD:  # Gemma 4's full attention: 512
        if s_aux is not None:
            raise ValueError(f"{NAME}: s_aux: expected heads up to {LARGEST_HEAD} beside it, got {query.shape[3]}")
        if not torch.compiler.is_compiling():  # which it would break in two
            warnings.warn(
                f"{NAME}: heads of {query.shape[3]}, wider than {LARGEST_HEAD}, run on sdpa under a dense mask",
                stacklevel=2,
            )
        layout.validate(query.shape[2], key.shape[2], query.shape[0], op=NAME)
        dense = layout.dense_mask(query.device)[:, None]
        return sdpa_attention_forward(module, query, key, value, dense, scaling=scaling)
    if s_aux is None:
        out = block_causal_attention(query, key, value, layout, scale=scaling)  # (B, Hq, Nq, Dv)
    else:
        out, lse = block_causal_attention(query, key, value, layout, scale=scaling, return_lse=True)
        # of exp(lse) + exp(sink), the part that is not the sink's
        out = (out * torch.sigmoid(lse - s_aux.view(1, -1, 1))[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


@functools.lru_cache(maxsize=64)
def _causal(q_len: int, k_len: int, ahead: int) -> SnippetLayout:
    """Query i sees the keys up to and with i + ahead."""
    upto = np.clip(np.arange(q_len) + ahead + 1, 0, k_len)
    ends, rows = np.unique(upto, return_counts=True)
    return SnippetLayout.cross(rows, np.diff(ends, prepend=0, append=k_len), np.arange(1, len(ends) + 1))


@torch.compiler.disable
def _of_no_mask(q_len: int, k_len: int, causal: bool, kwargs: dict[str, Any]) -> SnippetLayout:
    for name in ("sliding_window", "cu_seq_lens_q") if causal else ("cu_seq_lens_q",):
        if kwargs.get(name) is not None:
            raise ValueError(f"{NAME}: {name}: expected a mask of the mask interface beside it, got no mask")
    if not causal or q_len == 1:
        return _causal(q_len, k_len, k_len)
    if q_len != k_len:
        raise ValueError(f"{NAME}: attention_mask: expected a mask for {q_len} queries and {k_len} keys, got None")
    return _causal(q_len, k_len, 0)


@torch.compiler.disable
def _of_dense(mask: Tensor, batch: int, q_len: int) -> SnippetLayout:
    """The layout of a mask that somebody made himself.  Every layer does this again: let the mask interface make it."""
    shapes = f"(1 or {batch}, 1, 1 or Nq, Nk)"
    expected = f"{NAME}: attention_mask: expected what the mask interface gave, or bool or float {shapes}"
    if not isinstance(mask, Tensor):
        raise ValueError(f"{expected}, got {type(mask).__name__}")
    shaped = mask.ndim == 4 and mask.shape[0] in (1, batch) and mask.shape[1] == 1
    if not shaped or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise ValueError(f"{expected}, got {mask.dtype} {tuple(mask.shape)}")
    if mask.dtype != torch.bool:
        hidden = mask <= torch.finfo(mask.dtype).min
        if not (hidden | (mask == 0)).all():
            raise ValueError(f"{NAME}: attention_mask: a bias of the scores: not served")
        mask = ~hidden
    if mask.shape[2] == 1:  # keys hidden from all queries alike
        mask = mask.expand(-1, -1, q_len, -1)
    b, _, q_len, k_len = mask.shape
    rows = _from_mask.lines_of(WHERE, lambda b, h, q, k: mask[:, :, q], q_len, k_len, b, mask.device)
    return SnippetLayout("mask", rows, k_len, len(rows) if len(rows) > 1 else None)
