"""Video as it comes: one snippet after another, and a question at any time."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mirasol_model.generate import generate
from mirasol_model.inputs import read_clips

if TYPE_CHECKING:
    from mirasol_model.model import Mirasol


class Stream:
    """A clip without end, for a model in eval mode. What it keeps does not grow: the Combiner's state (the TTM's
    memory, or `combiner.window` snippets of keys and values in context "all"), and of the latent model the keys, values
    and latents of the first `sink` and the last `window` snippets.

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

    @torch.no_grad()
    def push(self, video: Tensor | None, audio: Tensor | None = None) -> Tensor:
        """The next snippet -> its latents h_t (B, m, d).

        video: (B, 3, f, H, W), the snippet's config.video.frames frames, or fewer; or None.
        audio: (B, samples), its samples, or None. Types and errors as in `Mirasol.forward`.
        """
        frames = self.model.config.video.frames
        if video is not None and video.ndim == 5 and video.shape[2] > frames:
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
        if not self.seen:
            raise ValueError("stream.generate: expected a snippet to be pushed first, got none")
        kept = [*self._first, *self._last]
        ages = [*range(self.seen, self.seen - len(self._first), -1), *range(len(self._last), 0, -1)]
        age = np.tile(np.array(ages), (len(kept[0]), 1))  # (B, kept)
        memory = self.model.text.remember(torch.stack(kept, dim=1), age)
        return generate(self.model.text, memory, prompt, max_new_tokens, **sampling)
