"""V-JEPA 2-AC and jepa-wms: the frame-causal attention of an action-conditioned predictor.

A frame is its conditioning tokens (action, state, extrinsics or proprioception, as the model has them), then its grid
of patches: 2 + 16 * 16 = 258 tokens, or 259 with extrinsics.  Every token sees all of its own frame and of the earlier
ones (facebookresearch/vjepa2@c2963a47, src/models/utils/modules.py: build_action_block_causal_attention_mask;
facebookresearch/jepa-wms@6eafb148, the same).
"""

from __future__ import annotations

from torch import Tensor

from mirasol_kernels.block_causal_attention import block_causal_attention
from mirasol_kernels.layout import SnippetLayout


def frame_causal_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens_per_frame: int,
    frames: int,
    *,
    layout: SnippetLayout | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """In place of `scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)` in ACRoPEAttention.

    q, k, v: (B, H, frames * tokens_per_frame, D), roped and merged as they are there, in any dtype and strides that
    `block_causal_attention` takes.  tokens_per_frame: H * W + action_tokens.  frames: T.  scale, backend: as there.
    Returns (B, H, frames * tokens_per_frame, D), differentiable.  No mask is built, whatever the number of frames, so
    that a predictor trained on 8 frames is not bound to 8.

    For planning, candidates are the batch: (candidates, H, N, D) under `torch.no_grad()`.

    layout: `SnippetLayout.uniform(frames, tokens_per_frame)`, for `torch.compile(fullgraph=True)`, which makes none but
    takes that of any number of frames.

    There is no dropout: their modules hand `proj_drop` to attention, in evaluation as well, and it must be 0.

    Raises ValueError or TypeError naming the argument, before anything is computed.
    """
    if layout is None:
        layout = SnippetLayout.uniform(frames, tokens_per_frame)  # cached: the same numbers give the same object
    return block_causal_attention(q, k, v, layout, scale=scale, backend=backend)
