"""Streaming: keys and values of the snippets that are still seen, in memory that never grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from mirasol_kernels._autocast import autocast_dtype
from mirasol_kernels._dispatch import explaining
from mirasol_kernels._ranges import INT32_MAX
from mirasol_kernels.block_causal_attention import reference
from mirasol_kernels.block_causal_attention.api import DTYPES, LARGEST_HEAD, cast, check_scale, shape
from mirasol_kernels.block_causal_attention.op import OP, unit_stride


class SnippetCache:
    """The first `sink` and the last `window` snippets of a stream: where each snippet is appended and then attends,
    that equals attention offline under `SnippetLayout.uniform(snippets, snippet_tokens, window=window, sink=sink)`, to
    rounding.

    batch, heads, head_dim, value_dim: of the keys (B, H, N, D) and values (B, H, N, Dv); value_dim is head_dim by
    default.  snippet_tokens: of every snippet.  window counts the current snippet.  All is allocated here, once, and
    written in place afterwards; positions stay on the device, one per batch row, so that no call waits for it and one
    CUDA graph of a step serves every step.  For inference: nothing that passes through the cache carries a gradient.
    Under autocast q, k and v are cast to dtype.

    The sinks come first and stay; behind them is a ring.  It is exactly as long as the window, so the snippet that
    falls out of the window is the one overwritten, and what a row sees is always one range from the front:

        sink 1, window 3        [0 1 2 3]   then   [0 4 2 3]   [0 4 5 3]   [0 4 5 6]   [0 7 5 6]

    Raises ValueError or TypeError naming the argument.
    """

    def __init__(
        self,
        batch: int,
        heads: int,
        head_dim: int,
        value_dim: int | None = None,
        *,
        snippet_tokens: int,
        window: int,
        sink: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        value_dim = head_dim if value_dim is None else value_dim
        for name, number, least, most in (
            ("batch", batch, 0, None),
            ("heads", heads, 1, None),
            ("head_dim", head_dim, 1, LARGEST_HEAD),
            ("value_dim", value_dim, 1, LARGEST_HEAD),
            ("snippet_tokens", snippet_tokens, 1, None),
            ("window", window, 1, None),
            ("sink", sink, 0, None),
        ):
            if not isinstance(number, int) or number < least or (most and number > most):
                limits = f"of at least {least}" if most is None else f"{least} .. {most}"
                raise ValueError(f"SnippetCache: {name}: expected an integer {limits}, got {number!r}")
        if dtype not in DTYPES:
            raise TypeError(f"SnippetCache: dtype: expected float32, float16, bfloat16 or float64, got {dtype}")
        self.snippet_tokens, self.window, self.sink = snippet_tokens, window, sink
        tokens = (sink + window) * snippet_tokens
        if tokens > INT32_MAX:
            raise ValueError(
                f"SnippetCache: (sink + window) * snippet_tokens: expected at most {INT32_MAX}, got {tokens}"
            )
        with torch.inference_mode(False):  # an inference tensor could not be written to outside that mode
            self.k = torch.zeros(batch, heads, tokens, head_dim, dtype=dtype, device=device)
            self.v = torch.zeros(batch, heads, tokens, value_dim, dtype=dtype, device=device)
            self.position = torch.zeros(batch, dtype=torch.int32, device=device)  # snippets each row has seen

    def append(self, k: Tensor, v: Tensor, *, replace: bool = False) -> None:
        """Store the next r snippets of every batch row, r = 1 .. window.

        k: (B, H, r * snippet_tokens, D), v: (B, H, r * snippet_tokens, Dv).  Queries that attend then see them all and
        the window of the last: those of an earlier one see its future, and less of its past.  That is how the chunks of
        a video attend; for `uniform` append one at a time.
        replace: they take the place of the r newest ones, which is what every further denoising step of a video chunk
        does; a row that has fewer has none left but these.
        """
        count = k.shape[2] // self.snippet_tokens if isinstance(k, Tensor) and k.ndim == 4 else 1
        count = min(max(count, 1), self.window)
        k, v = (self._taken("append", name, x) for name, x in (("k", k), ("v", v)))
        for name, x, ring in (("k", k, self.k), ("v", v, self.v)):
            expected = (ring.shape[0], ring.shape[1], count * self.snippet_tokens, ring.shape[3])
            if x.shape != expected:
                raise ValueError(f"SnippetCache.append: {name}: expected {expected}, got {shape(x)}")
        if explaining():
            return
        if replace:
            self.position.sub_(count).clamp_(min=0)
        at = self.position[:, None] + torch.arange(count, dtype=torch.int32, device=self.position.device)  # (B, r)
        slot = torch.where(at < self.sink, at, torch.remainder(at - self.sink, self.window) + self.sink)
        rows = torch.arange(len(slot), device=slot.device)[:, None]
        for x, ring in ((k, self.k), (v, self.v)):
            slots, new = (y.unflatten(2, (-1, self.snippet_tokens)).transpose(1, 2) for y in (ring, x))
            slots[rows, slot] = new.detach()  # (B, slots, H, m, D), a view; (B, r, H, m, D)
        self.position += count

    @overload
    def attend(
        self, q: Tensor, *, scale: float | None = ..., return_lse: Literal[False] = ..., backend: str | None = ...
    ) -> Tensor: ...
    @overload
    def attend(
        self, q: Tensor, *, scale: float | None = ..., return_lse: Literal[True], backend: str | None = ...
    ) -> tuple[Tensor, Tensor]: ...
    @torch.no_grad()
    def attend(
        self, q: Tensor, *, scale: float | None = None, return_lse: bool = False, backend: str | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention of q (B, Hq, n, D), any n, over the sinks and the window -> out (B, Hq, n, Dv), without gradient.

        Append the current snippet first: it is part of the window.  A row that has nothing yet gives 0.  scale,
        return_lse and backend as in `block_causal_attention`.
        """
        q = self._taken("attend", "q", q)
        batch, heads, _, dim = self.k.shape
        if q.ndim != 4 or q.shape[0] != batch or q.shape[1] < 1 or q.shape[1] % heads or q.shape[3] != dim:
            expected = f"(batch {batch}, a multiple of {heads} heads, tokens, head_dim {dim})"
            raise ValueError(f"SnippetCache.attend: q: expected {expected}, got {shape(q)}")
        check_scale("SnippetCache.attend", scale)
        q = unit_stride(q)
        scale = q.shape[3] ** -0.5 if scale is None else float(scale)
        # One group of rows per batch row, which sees one range.
        q_offsets = (torch.arange(2, device=q.device, dtype=torch.int32) * q.shape[2]).repeat(batch, 1)  # (B, 2)
        end = self.position.clamp(max=self.sink + self.window) * self.snippet_tokens
        k_ranges = torch.stack([torch.zeros_like(end), end], 1)[:, None, None]  # (B, 1, 1, 2)
        chosen = OP.select((q, self.k, self.v, q_offsets, k_ranges, scale, backend), backend)
        attend = reference.block_causal_attention if chosen is None else chosen.calls["fwd"]
        out, lse, *_ = attend(q, self.k, self.v, q_offsets, k_ranges, scale)
        return (out, lse) if return_lse else out

    def reset(self, rows: Tensor | Sequence[int] | None = None) -> None:
        """Forget everything, or only batch rows `rows`: indices, or a bool mask (B,)."""
        if rows is None:
            self.position.zero_()
            return
        chosen, batch = torch.as_tensor(rows), len(self.position)
        if chosen.dtype == torch.bool:
            if chosen.shape != (batch,):
                raise ValueError(f"SnippetCache.reset: rows: expected a mask ({batch},), got {shape(chosen)}")
        elif not chosen.numel():  # none; as_tensor takes an empty list for floats
            return
        elif chosen.is_floating_point() or chosen.is_complex():
            raise TypeError(f"SnippetCache.reset: rows: expected indices or a bool mask, got {chosen.dtype}")
        else:
            chosen = chosen.long()
            if chosen.is_cpu and not torch.compiler.is_compiling():  # no look at what is on a GPU
                wrong = chosen[(chosen < -batch) | (chosen >= batch)]
                if len(wrong):
                    raise ValueError(f"SnippetCache.reset: rows: expected 0 .. {batch - 1}, got {int(wrong[0])}")
        self.position[chosen.to(self.position.device)] = 0

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of everything that `load_state_dict` needs, of tensors only."""
        geometry = torch.tensor([self.snippet_tokens, self.window, self.sink])
        return {"k": self.k.clone(), "v": self.v.clone(), "position": self.position.clone(), "geometry": geometry}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a state of the same geometry, in place.  Dtype and device stay those of this cache."""
        mine = self.state_dict()
        if state.keys() != mine.keys():
            raise ValueError(f"SnippetCache.load_state_dict: expected {sorted(mine)}, got {sorted(state)}")
        if not torch.equal(state["geometry"].cpu(), mine["geometry"]):
            raise ValueError(
                "SnippetCache.load_state_dict: geometry: expected (snippet_tokens, window, sink) = "
                f"{tuple(mine['geometry'].tolist())}, got {tuple(state['geometry'].tolist())}"
            )
        for name in ("k", "v", "position"):
            if state[name].shape != mine[name].shape:
                raise ValueError(
                    f"SnippetCache.load_state_dict: {name}: expected {shape(mine[name])}, got {shape(state[name])}"
                )
        for name in ("k", "v", "position"):
            getattr(self, name).copy_(state[name])

    @torch.inference_mode(False)
    def fork(self) -> SnippetCache:
        """An independent copy, for instance to look ahead."""
        other = object.__new__(type(self))
        vars(other).update({name: x.clone() if isinstance(x, Tensor) else x for name, x in vars(self).items()})
        return other

    def _taken(self, call: str, name: str, x: Tensor) -> Tensor:
        """x as it is stored, or asks: under autocast in the cache's dtype, as keys of one dtype are asked in it."""
        if not isinstance(x, Tensor):
            raise TypeError(f"SnippetCache.{call}: {name}: expected a tensor, got {type(x).__name__}")
        if autocast_dtype(self.k.device.type) is not None:
            x = cast(x, self.k.dtype)
        if x.dtype != self.k.dtype:
            raise TypeError(f"SnippetCache.{call}: {name}: expected {self.k.dtype}, got {x.dtype}")
        if x.device != self.k.device:
            raise ValueError(f"SnippetCache.{call}: {name}: expected device {self.k.device}, got {x.device}")
        return x
