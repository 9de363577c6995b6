"""Video as it comes: one snippet after another, and a question at any time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mirasol_model.combiner import Past
from mirasol_model.config import MirasolConfig
from mirasol_model.generate import generate, generate_tokens
from mirasol_model.inputs import check_device, read_clips
from mirasol_model.text import Memory

if TYPE_CHECKING:
    from mirasol_model.model import Mirasol


class Stream:
    """A clip without end. What it keeps does not grow: the Combiner's state (the TTM's
    memory, or `combiner.window` snippets of keys and values in context "all"), and of the latent model the keys, values
    and latents of the first `sink` and the last `window` snippets.

    `state_dict` and `load_state_dict` save and restore it, on any device; `fork`, `select` and `batch` make new streams
    of what others have seen.

    Latents are those of `Mirasol.encode` on the whole clip with this window, and text attends to those that are kept.
    window, sink: by default those of config.latent; a model without a window needs one here, and is then exact for
    as many snippets. Raises ValueError where the state would grow.
    """

    def __init__(self, model: Mirasol, window: int | None = None, sink: int | None = None):
        latent, combiner = model.config.latent, model.config.combiner
        window = latent.window if window is None else window
        if window is None or window < 1:
            raise ValueError(f"stream: window: expected at least 1 snippet, as config.latent has none, got {window}")
        if combiner.context == "all" and combiner.window is None:
            raise ValueError(
                "stream: combiner.window: expected a number with context 'all', whose past grows, got None"
            )
        self.model, self.window, self.sink = model, window, latent.sink if sink is None else sink
        if self.sink < 0:
            raise ValueError(f"stream: sink: expected at least 0, got {self.sink}")
        self.reset()

    def reset(self) -> None:
        """Forget everything: the next snippet is the first."""
        self.seen = 0  # snippets so far
        self._combiner: Any = None
        self._caches: list | None = None
        self._first: list[Tensor] = []
        self._last: deque[Tensor] = deque(maxlen=self.window)

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of all that was kept, as tensors by name: what `safetensors.torch.save_file` takes."""
        made = {"size": torch.tensor([self.seen, self.window, self.sink]), "model": self._config()}
        if isinstance(self._combiner, Past):
            made |= {f"past.{name}": x for name, x in self._combiner.tensors().items()}
        elif self._combiner is not None:
            made["memory"] = self._combiner
        for i, cache in enumerate(self._caches or []):
            made |= {f"cache.{i}.{name}": x for name, x in cache.state_dict().items()}
        if self.seen:
            made["latents"] = torch.stack([*self._first, *self._last], 1)  # (B, kept, m, d)
        return {name: x.detach().clone().contiguous() for name, x in made.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from the `state_dict` of a stream of the same model, window and sink; the tensors come to the device
        and dtype of this model.  Raises ValueError before anything changes: for a model of another configuration (but
        for what is chosen anew for each training), and for tensors that are missing, too many or of another shape."""
        for name in ("size", "model"):
            if name not in state:
                raise ValueError(
                    f"stream.load_state_dict: state: expected a state_dict of a stream, got no {name!r} in it"
                )
        if not torch.equal(state["model"].cpu(), self._config()):
            was = MirasolConfig.from_json(bytes(state["model"].tolist()).decode())
            if different := was.differences(self.model.config):
                raise ValueError(f"stream.load_state_dict: state: is of another model: this one has {different}")
        seen, *reach = state["size"].flatten().tolist()
        window, sink = self.window, self.sink
        if reach != [window, sink]:
            raise ValueError(
                f"stream.load_state_dict: state: expected window {window} and sink {sink}, "
                f"got {' and '.join(map(str, reach))}"
            )
        like = self.model.latent.slots
        state = {name: x.to(like) if x.is_floating_point() else x.to(like.device) for name, x in state.items()}

        def named(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}

        caches, kept = None, []
        rows = len(state["latents"]) if "latents" in state else 0
        self._check(state, seen, rows)
        if seen:
            caches = self.model.latent.caches(rows, window, sink, like)
            for i, cache in enumerate(caches):
                cache.load_state_dict(named(f"cache.{i}."))
            kept = [h.contiguous() for h in state["latents"].unbind(1)]
        past = named("past.")
        self._combiner = Past.of_tensors(past) if past else state.get("memory")
        first = min(sink, len(kept))
        self._first, self._last = kept[:first], deque(kept[first:], maxlen=window)
        self._caches, self.seen = caches, seen

    def _config(self) -> Tensor:
        """The model's configuration as bytes: a state is of no use to another one, though all shapes may fit."""
        return torch.tensor(list(self.model.config.to_json().encode()), dtype=torch.uint8)

    def _check(self, state: Mapping[str, Tensor], seen: int, rows: int) -> None:
        """ValueError unless these are the tensors of a stream of this model, of so many snippets and rows."""
        config, first = self.model.config, min(seen, self.sink)
        combiner, dim = config.combiner, config.encoder.dim
        expected: dict[str, tuple[int, ...]] = {"size": (3,), "model": tuple(state["model"].shape)}
        if seen:
            expected["latents"] = (rows, first + min(seen - first, self.window), combiner.tokens, dim)
            like = torch.empty(0, device="meta")
            for i, cache in enumerate(self.model.latent.caches(rows, self.window, self.sink, like)):
                made = {"k": cache.k, "v": cache.v, "position": cache.position, "geometry": torch.empty(3)}
                expected |= {f"cache.{i}.{name}": tuple(x.shape) for name, x in made.items()}
        if seen and combiner.kind == "ttm":
            expected["memory"] = (rows, combiner.memory, dim)
        if seen and combiner.context == "all":
            expected["past.seen"] = ()
            for i in range(sum(name.endswith(".lengths") for name in state)):
                lengths = state.get(f"past.{i}.lengths", torch.zeros(rows, 1))
                expected[f"past.{i}.lengths"] = (rows, lengths.shape[-1])
                for name in (f"past.{i}.{j}.{kind}" for j in range(combiner.layers) for kind in "kv"):
                    batch = 1 if name in state and len(state[name]) == 1 else max(rows, 1)  # 1: packed
                    expected[name] = (batch, int(lengths.sum()) // batch, combiner.heads, dim // combiner.heads)
        if wrong := sorted(expected.keys() ^ state.keys()):
            raise ValueError(
                f"stream.load_state_dict: state: expected the {len(expected)} tensors of {seen} snippets, "
                f"got {len(state)}, different in {wrong[0]}"
            )
        for name, shape in expected.items():
            if tuple(state[name].shape) != shape:
                got = tuple(state[name].shape)
                raise ValueError(f"stream.load_state_dict: state: {name}: expected {shape}, got {got}")

    def fork(self) -> Stream:
        """An independent stream that has seen the same: what if the next snippet were another?"""
        other = Stream(self.model, self.window, self.sink)
        other.load_state_dict(self.state_dict())
        return other

    def select(self, rows: Sequence[int] | Tensor) -> Stream:
        """A new stream of these rows of the batch, in this order; a row may come several times, as in beam search."""
        have = len(self._caches[0].position) if self._caches else 0
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if not rows or not all(0 <= row < have for row in rows):
            raise ValueError(f"stream.select: rows: expected some of the {have} rows of this stream, got {rows}")
        past = self._combiner.select(rows) if isinstance(self._combiner, Past) else None
        return self._of([self.state_dict()], past, lambda each: each[0][rows])

    @staticmethod
    def batch(streams: Sequence[Stream]) -> Stream:
        """One stream of the rows of several that share a model, window and sink and have seen as many snippets."""
        first = streams[0]
        for other in streams:
            mine, its = ((stream.window, stream.sink, stream.seen) for stream in (first, other))
            if other.model is not first.model or mine != its or not first.seen:
                raise ValueError(
                    "stream.batch: streams: expected one model, and equal window, sink and number of snippets seen, at "
                    f"least one, got {mine} and {its}"
                )
        pasts = [stream._combiner for stream in streams]
        past = Past.batch(pasts) if isinstance(first._combiner, Past) else None
        return first._of([stream.state_dict() for stream in streams], past, torch.cat)

    def _of(self, states: list[dict[str, Tensor]], past: Past | None, rows: Callable[[list[Tensor]], Tensor]) -> Stream:
        """A stream like this one whose tensors are `rows` of those of the states; `past` replaces theirs."""
        whole = ("size", "model", "geometry")  # have no batch
        made = {
            name: x if name.endswith(whole) else rows([state[name] for state in states])
            for name, x in states[0].items()
            if not name.startswith("past.")
        }
        other = Stream(self.model, self.window, self.sink)
        other.load_state_dict(made | {f"past.{name}": x for name, x in (past.tensors() if past else {}).items()})
        return other

    @torch.no_grad()
    def push(self, video: Tensor | None, audio: Tensor | None = None) -> Tensor:
        """The next snippet -> its latents h_t (B, m, d).

        video: (B, 3, f, H, W), the snippet's config.video.frames frames, or fewer; or None.
        audio: (B, samples), its samples, or None. Types and errors as in `Mirasol.forward`.
        """
        check_device("stream.push", self.model.latent.slots.device, video=video, audio=audio)
        frames = self.model.config.video.frames
        if isinstance(video, Tensor) and video.ndim == 5 and video.shape[2] > frames:
            raise ValueError(f"stream.push: video: expected at most {frames} frames, got {video.shape[2]}")
        clips = read_clips("stream.push", video, audio, frames if video is None else None, None, frames)
        rows = len(clips.frames)
        if self._caches is not None and rows != len(self._caches[0].position):
            raise ValueError(f"stream.push: video, audio: expected {len(self._caches[0].position)} rows, got {rows}")
        x, self._combiner = self.model.step(clips, self._combiner)  # (B, 1, m, d)
        if self._caches is None:
            self._caches = self.model.latent.caches(rows, self.window, self.sink, x)
        h = self.model.latent.step(x[:, 0], self._caches)
        (self._first if self.seen < self.sink else self._last).append(h)
        self.seen += 1
        return h

    @torch.no_grad()
    def generate(self, prompt: Tensor, max_new_tokens: int = 32, **sampling: Any) -> Tensor:
        """Ask about what was seen so far. Arguments and errors as `mirasol_model.generate.generate`."""
        return generate(self.model.text, self._memory(), prompt, max_new_tokens, **sampling)

    @torch.no_grad()
    def generate_tokens(self, prompt: Tensor, max_new_tokens: int = 32, **sampling: Any) -> Iterator[Tensor]:
        """`generate`, token by token as they come: see `mirasol_model.generate.generate_tokens`."""
        return generate_tokens(self.model.text, self._memory(), prompt, max_new_tokens, **sampling)

    def _memory(self) -> Memory:
        if not self.seen:
            raise ValueError("stream.generate: expected a snippet to be pushed first, got none")
        kept = [*self._first, *self._last]
        ages = [*range(self.seen, self.seen - len(self._first), -1), *range(len(self._last), 0, -1)]
        age = np.tile(np.array(ages), (len(kept[0]), 1))  # (B, kept)
        return self.model.text.remember(torch.stack(kept, dim=1), age)
