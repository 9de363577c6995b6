"""Combiners: the tokens of a snippet's picture and sound become m tokens, x_t.

Four kinds, one call: `combiner(video (B, T, n_v, d), audio (B, T, n_a, d), counts) -> (B, T, m, d)`. Either modality
may be None; `counts` says how many leading tokens of each snippet are real, per modality (B, T) integers or None for
all. Tokens bring their modality and their position inside the snippet with them (`encoders`). A snippet without a
single real token still gives m finite tokens.

`step` is the same for a run of snippets in the middle: it also takes and returns what a combiner carries from snippet
to snippet (the TTM's memory, the keys and values of context "all", nothing otherwise).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirasol_kernels import (
    SnippetLayout,
    TokenTuringParameters,
    block_causal_attention,
    token_learner,
    token_turing_recurrence,
)
from mirasol_model.config import CombinerConfig
from mirasol_model.layers import Attend, Block, init_weights, merge_heads, rotary, rotate, split_heads
from mirasol_model.packing import Counts, join, last_tokens, look_back, merge_sources, row_order, to_index
from mirasol_model.spread import Spread

Pair = tuple[Counts, Counts]  # of video and of audio


class Combiner(nn.Module):
    """What the four kinds share: the call."""

    remembers = False  # whether a snippet's tokens depend on earlier snippets

    def __init__(self, config: CombinerConfig):
        super().__init__()
        self.config = config

    def forward(self, video: Tensor | None, audio: Tensor | None, counts: Pair = (None, None)) -> Tensor:
        """All snippets of some clips -> x (B, T, m, d), in the dtype of the tokens.

        video: (B, T, n_v, d), audio: (B, T, n_a, d), floating, of the parameters' dtype and device; either may be None.
        counts: of each, (B, T) integers on the host, how many leading tokens of a snippet are real, or None for all.
        Raises ValueError if both are None.
        """
        return self.step(video, audio, counts, keep=False)[0]

    def step(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        counts: Pair = (None, None),
        state: Any = None,
        *,
        keep: bool = True,
        recompute: bool = False,
    ) -> tuple[Tensor, Any]:
        """The snippets that follow those which left `state` (None: the first ones) -> x (B, T, m, d), state.

        A `Spread` as the state: these are the snippets of one rank, and all that there are.
        keep=False: nobody will go on from here, so nothing need be kept.
        recompute: of each layer of the transformer nothing but its input is kept for backward.
        """
        given = [(x, n) for x, n in zip((video, audio), counts, strict=True) if x is not None]
        if not given:
            raise ValueError("combiner: video, audio: expected at least one of them, got None for both")
        sources, real = zip(*given, strict=True)
        return self.combine(list(sources), list(real), state, keep, recompute)

    def combine(
        self, sources: list[Tensor], counts: list[Counts], state: Any, keep: bool, recompute: bool
    ) -> tuple[Tensor, Any]:
        raise NotImplementedError


class Past(NamedTuple):
    """Context "all": keys and values of earlier snippets, in the pieces in which they came: appending copies nothing.

    A piece is (B, T*n, H, D), or (1, total, H, D) packed; its keys are rotated already.
    """

    seen: int = 0  # snippets so far, forgotten ones included
    lengths: tuple[np.ndarray, ...] = ()  # per piece, (B, T)
    layers: tuple[list[tuple[Tensor, Tensor]], ...] = ()  # per piece and layer, k and v

    def append(self, lengths: np.ndarray, layers: list[tuple[Tensor, Tensor]], window: int | None) -> Past:
        """With one piece more, without those that no later snippet will see."""
        all_lengths, drop = (*self.lengths, lengths), 0
        if window is not None:
            left = np.cumsum([piece.shape[1] for piece in reversed(all_lengths)])[::-1]  # from each piece to the end
            drop = int(sum(np.append(left[1:], 0) >= window - 1))
        return Past(self.seen + lengths.shape[1], all_lengths[drop:], (*self.layers, layers)[drop:])

    def select(self, rows: Sequence[int]) -> Past:
        """Of these rows of the batch, in this order; the pieces are packed."""

        def chosen(x: Tensor, lengths: np.ndarray) -> Tensor:
            each = x.flatten(0, 1).split(lengths.sum(1).tolist())
            return torch.cat([each[row] for row in rows])[None]

        layers = tuple(
            [(chosen(k, lengths), chosen(v, lengths)) for k, v in piece]
            for piece, lengths in zip(self.layers, self.lengths, strict=True)
        )
        return Past(self.seen, tuple(lengths[list(rows)] for lengths in self.lengths), layers)

    @staticmethod
    def batch(pasts: Sequence[Past]) -> Past:
        """The rows of several that came in the same pieces."""

        def joined(*each: Tensor) -> Tensor:
            return torch.cat([x.flatten(0, 1) for x in each])[None]

        layers = tuple(
            [(joined(*(k for k, _ in layer)), joined(*(v for _, v in layer))) for layer in zip(*pieces, strict=True)]
            for pieces in zip(*(past.layers for past in pasts), strict=True)
        )
        lengths = tuple(np.concatenate(each) for each in zip(*(past.lengths for past in pasts), strict=True))
        return Past(pasts[0].seen, lengths, layers)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name."""
        made = {"seen": torch.tensor(self.seen)}
        for i, (lengths, piece) in enumerate(zip(self.lengths, self.layers, strict=True)):
            made[f"{i}.lengths"] = torch.from_numpy(lengths.copy())
            for j, (k, v) in enumerate(piece):
                made |= {f"{i}.{j}.k": k, f"{i}.{j}.v": v}
        return made

    @staticmethod
    def of_tensors(made: Mapping[str, Tensor]) -> Past:
        """The inverse of `tensors`."""
        lengths = [made[f"{i}.lengths"].cpu().numpy() for i in range(sum(name.endswith(".lengths") for name in made))]
        depth = sum(name.startswith("0.") and name.endswith(".k") for name in made)
        layers = tuple([(made[f"{i}.{j}.k"], made[f"{i}.{j}.v"]) for j in range(depth)] for i in range(len(lengths)))
        return Past(int(made["seen"]), tuple(lengths), layers)


class _AllSnippets:
    """Attention of one step in context "all": the layers of the transformer ask it for theirs.

    lengths (B, T): the tokens of the snippets. spread: they are one rank's, and those of all are `everyone` (B, all T).
    """

    def __init__(
        self,
        past: Past,
        lengths: np.ndarray,
        dense: bool,
        like: Tensor,
        config: CombinerConfig,
        keep: bool,
        spread: Spread | None,
        everyone: np.ndarray,
    ):
        self.past, self.keep, self.config, self.spread = past, keep, config, spread
        self.kept: list[tuple[Tensor, Tensor]] = []
        rows, snippets = lengths.shape
        earlier = np.concatenate([np.zeros((rows, 0), int), *past.lengths], axis=1)
        # Of keys, then of queries: all tokens of a snippet, and in the last layer those that leave.
        asking = everyone, np.minimum(everyone, config.tokens)
        self.layouts = [look_back(earlier, everyone, each, config.window, dense) for each in asking]
        self.asking = [each[:1] if dense else each for each in asking]
        self.dense, self.order = dense, None if dense else row_order([*past.lengths, lengths])
        self.leave = last_tokens(lengths, np.minimum(lengths, config.tokens), dense)
        positions = past.seen + (np.arange(snippets) if spread is None else spread.own)
        positions = np.concatenate([np.repeat(positions, row) for row in (lengths[:1] if dense else lengths)])
        precise = torch.promote_types(like.dtype, torch.float32)
        self.angles = rotary(to_index(positions, like), like.shape[2] // config.heads, precise)  # (N, D/2)
        cos, sin = (self.leave(a[None])[0] for a in self.angles)
        self.leaving_angles = cos, sin

    def layer(self, i: int, last: bool) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k = rotate(q, self.leaving_angles if last else self.angles), rotate(k, self.angles)
            v = v.contiguous()  # else the keys as they were before would stay with it, in the same memory
            if self.keep:
                self.kept.append((k.transpose(1, 2), v.transpose(1, 2)))
            if self.spread is not None:
                return self.spread.attend(q, k, v, self.layouts[last], self.asking[last], self.asking[0])
            keys, values = zip(*(piece[i] for piece in self.past.layers), strict=True) if self.past.layers else ((), ())
            return block_causal_attention(q, self._join(keys, k), self._join(values, v), self.layouts[last])

        return attend

    def _join(self, pieces: tuple[Tensor, ...], own: Tensor) -> Tensor:
        """Earlier keys or values, and our own (B, H, N, D) -> (B, H, all, D), or (1, H, all, D) packed."""
        if not pieces:
            return own
        rows = len(own)  # 1 where packed; a piece may have been packed and look dense now
        every = [p.reshape(rows, -1, *p.shape[2:]).to(own.dtype) for p in (*pieces, own.transpose(1, 2))]
        return (torch.cat(every, dim=1) if self.dense else join(every, self.order)).transpose(1, 2)


class TransformerCombiner(Combiner):
    """A transformer over [video | audio | m queries] (order "last": without queries); the last m tokens leave.

    context "current": a snippet sees itself. "all": it sees all snippets up to itself (`window` of them), positions
    rotary by snippet index. The parameters are the same, and for one snippet so is the result.
    """

    def __init__(self, dim: int, config: CombinerConfig):
        super().__init__(config)
        self.queries = nn.Parameter(torch.empty(config.tokens, dim)) if config.order == "queries" else None
        if self.queries is not None:
            nn.init.trunc_normal_(self.queries, std=0.02)
        self.blocks = nn.ModuleList(Block(dim, config.heads, config.mlp_dim) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self.remembers = config.context == "all"
        init_weights(self, config.layers)

    def combine(
        self, sources: list[Tensor], counts: list[Counts], state: Past | Spread | None, keep: bool, recompute: bool
    ) -> tuple[Tensor, Past | None]:
        rows, snippets, _, dim = sources[0].shape
        m = self.config.tokens
        if self.queries is not None:
            sources, counts = [*sources, self.queries.expand(rows, snippets, m, dim)], [*counts, None]
        x, lengths, dense = merge_sources(sources, counts)
        if dense and lengths[0, 0] < m:  # order "last" with fewer tokens than leave: dealt with below, as if packed
            dense = False
        sight = None
        if self.config.context == "all":
            past, spread, everyone = state if isinstance(state, Past) else Past(), None, lengths
            if isinstance(state, Spread):
                spread, learned = state, m if self.queries is not None else 0
                everyone = np.sum([count for count in state.counts if count is not None], axis=0) + learned
            dense = dense and all((piece == lengths[0, 0]).all() for piece in (*past.lengths, everyone))
            x = x if dense else x.flatten(0, 1)[None]
            sight = _AllSnippets(past, lengths, dense, x, self.config, keep, spread, everyone)
            leave = sight.leave
        else:
            if dense:  # snippets that do not see each other are rows of a batch
                x, lengths = x.unflatten(1, (snippets, -1)).flatten(0, 1), lengths.reshape(-1, 1)  # (B*T, n, d)
            else:
                x = x.flatten(0, 1)[None]
            asking = np.minimum(lengths, m)
            earlier = np.zeros((len(lengths), 0), int)
            layouts = [look_back(earlier, lengths, each, 1, dense) for each in (lengths, asking)]
            leave = last_tokens(lengths, asking, dense)

        for i, block in enumerate(self.blocks):
            last = i == len(self.blocks) - 1
            attend = sight.layer(i, last) if sight else _within(layouts[last])
            x = block(x, attend, leave, recompute=recompute) if last else block(x, attend, recompute=recompute)
        x = self._place(self.norm(x), lengths).reshape(rows, snippets, m, dim)
        return x, past.append(lengths, sight.kept, self.config.window) if sight and keep else None

    def _place(self, x: Tensor, lengths: np.ndarray) -> Tensor:
        """Order "last", and a snippet with fewer than m tokens: those that it lacks are zeros, in front."""
        m = self.config.tokens
        if (lengths >= m).all():
            return x
        place = np.flatnonzero(np.arange(m) >= m - lengths.reshape(-1, 1))
        return x.new_zeros(lengths.size * m, x.shape[-1]).index_copy(0, to_index(place, x), x.flatten(0, 1))


def _within(layout: SnippetLayout) -> Attend:
    return lambda q, k, v: block_causal_attention(q, k, v, layout)


class _PerceiverLayer(nn.Module):
    """Latents attend to [tokens | latents], no biases, erf GELU (lucidrains/flamingo-pytorch@10913ab and
    mlfoundations/open_flamingo@655f693, which agree)."""

    def __init__(self, dim: int, heads: int, head_dim: int, mlp_dim: int):
        super().__init__()
        self.heads = heads
        self.norm_tokens, self.norm_latents, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query = nn.Linear(dim, heads * head_dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, mlp_dim, bias=False), nn.Linear(mlp_dim, dim, bias=False)

    def forward(self, latents: Tensor, tokens: Tensor, order: np.ndarray | None, layout: SnippetLayout) -> Tensor:
        """latents (B, m, d), tokens (B, n, d) -> (B, m, d); `order` puts [tokens | latents] snippet by snippet."""
        asking = self.norm_latents(latents)
        q = split_heads(self.query(asking), self.heads)
        both = join((self.key_value(self.norm_tokens(tokens)), self.key_value(asking)), order)
        k, v = (split_heads(part, self.heads) for part in both.chunk(2, dim=-1))
        latents = latents + self.out(merge_heads(block_causal_attention(q, k, v, layout)))
        return latents + self.down(F.gelu(self.up(self.norm(latents))))


class PerceiverCombiner(Combiner):
    """m learned latents that read the snippet, layer by layer: the Perceiver resampler, one snippet as one medium."""

    def __init__(self, dim: int, config: CombinerConfig, head_dim: int | None = None):
        super().__init__(config)
        head_dim = dim // config.heads if head_dim is None else head_dim
        self.latents = nn.Parameter(torch.randn(config.tokens, dim))
        self.layers = nn.ModuleList(
            _PerceiverLayer(dim, config.heads, head_dim, config.mlp_dim) for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(dim)
        init_weights(self, config.layers)

    def combine(
        self, sources: list[Tensor], counts: list[Counts], state: None, keep: bool, recompute: bool
    ) -> tuple[Tensor, None]:
        rows, snippets, _, dim = sources[0].shape
        m = self.config.tokens
        x, lengths, dense = merge_sources(sources, counts)
        lengths = lengths.reshape(-1, 1)  # every snippet by itself
        latents = self.latents.expand(len(lengths), m, dim)  # (B*T, m, d)
        asking = np.full_like(lengths, m)
        layout = look_back(np.zeros((len(lengths), 0), int), lengths + m, asking, 1, dense)
        if dense:
            x = x.unflatten(1, (snippets, -1)).flatten(0, 1)  # (B*T, n, d)
            order = None
        else:
            x, latents = x.flatten(0, 1)[None], latents.flatten(0, 1)[None]
            order = row_order([lengths, asking])
        for layer in self.layers:
            latents = layer(latents, x, order, layout)
        return self.norm(latents).reshape(rows, snippets, m, dim), None


class _Scorer(nn.Module):
    """The parameters of `token_learner`, initialised as google-research/scenic@4a38d475 does."""

    def __init__(self, dim: int, hidden: int, tokens: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, tokens)
        for layer in (self.up, self.down):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)

    def tensors(self) -> tuple[Tensor, ...]:
        """norm_weight, norm_bias, w1, b1, w2, b2"""
        return (
            self.norm.weight,
            self.norm.bias,
            self.up.weight,
            self.up.bias,
            self.down.weight,
            self.down.bias,
        )


class TokenLearnerCombiner(Combiner):
    """One pooled read: each of the m tokens is a softmax-weighted mean of the snippet's tokens."""

    def __init__(self, dim: int, config: CombinerConfig):
        super().__init__(config)
        self.scorer = _Scorer(dim, config.bottleneck, config.tokens)

    def combine(
        self, sources: list[Tensor], counts: list[Counts], state: None, keep: bool, recompute: bool
    ) -> tuple[Tensor, None]:
        rows, snippets = sources[0].shape[:2]
        valid = valid_tensor(sources, counts)
        x = token_learner(
            [source.flatten(0, 1) for source in sources],
            *self.scorer.tensors(),
            valid=None if valid is None else valid.flatten(0, 1),
        )
        return x.unflatten(0, (rows, snippets)), None


def valid_tensor(sources: list[Tensor], counts: list[Counts]) -> Tensor | None:
    """counts as one tensor (B, T, S) on the device of the S sources, None where everything is real."""
    if all(count is None or (count >= x.shape[2]).all() for x, count in zip(sources, counts, strict=True)):
        return None
    shape = sources[0].shape[:2]
    filled = [np.full(shape, x.shape[2]) if n is None else n for x, n in zip(sources, counts, strict=True)]
    return to_index(np.stack(filled, axis=-1), sources[0])


class TuringCombiner(Combiner):
    """A Token Turing Machine: a memory of `memory` tokens goes from snippet to snippet, x_t is what it says at t.

    Memory starts as zeros, as in google-research/scenic@4a38d475; in mode AddErase as learned tokens (ours), because
    equal slots would stay equal for ever. In mode MHA the learned queries are drawn with deviation 1 (ours), because
    with the reference's 0.02 all memory tokens begin nearly equal.
    """

    remembers = True

    def __init__(self, dim: int, config: CombinerConfig):
        super().__init__(config)
        self.skeleton = TokenTuringParameters.init(
            dim,
            config.memory,
            config.tokens,
            memory_mode=config.memory_mode,
            processor=config.processor,
            layers=config.layers,
            mlp=config.mlp_dim,
            heads=config.heads,
            hidden=config.bottleneck,
            query_std=1.0,
        )
        self.names = {name: name.replace(".", "_") for name, _ in self.skeleton.named_tensors()}
        self.tensors = nn.ParameterDict(
            {self.names[name]: nn.Parameter(tensor.detach()) for name, tensor in self.skeleton.named_tensors()}
        )
        self.start = None
        if config.memory_mode == "AddErase":
            self.start = nn.Parameter(nn.init.trunc_normal_(torch.empty(config.memory, dim), std=0.02))

    def combine(
        self, sources: list[Tensor], counts: list[Counts], state: Tensor | Spread | None, keep: bool, recompute: bool
    ) -> tuple[Tensor, Tensor]:
        rows, _, _, dim = sources[0].shape
        spread = state if isinstance(state, Spread) else None
        if not isinstance(state, Tensor):
            empty = sources[0].new_zeros(rows, self.config.memory, dim)
            state = empty if self.start is None else empty + self.start
        parameters = self.skeleton.replace({name: self.tensors[key] for name, key in self.names.items()})
        valid, gather = valid_tensor(sources, counts), spread.gather if spread else None
        memory, x = token_turing_recurrence(state, sources, parameters, valid=valid, gather=gather)
        return x[:, spread.own] if spread else x, memory


KINDS: dict[str, Callable[[int, CombinerConfig], Combiner]] = {
    "transformer": TransformerCombiner,
    "ttm": TuringCombiner,
    "perceiver": PerceiverCombiner,
    "token_learner": TokenLearnerCombiner,
}


def build_combiner(dim: int, config: CombinerConfig) -> Combiner:
    return KINDS[config.kind](dim, config)
