"""Mirasol3B (arXiv 2311.05698): one model for what is dense and aligned in time, one for text, which is neither.

    video, audio -> snippets -> tokens -> one ViT -> Combiner: m tokens x_t per snippet
    x_1..x_T     -> block-causal transformer -> latents h_1..h_T, which also predict snippet t+1
    text         -> causal decoder with cross-attention to all h_t

Whatever the length of the clip, a snippet is m tokens, and no parameter depends on the number of snippets. A modality
may be missing and clips of a batch may differ in length: what is not there is packed away, not masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mirasol_model import generate
from mirasol_model.audio import LogMel
from mirasol_model.combiner import build_combiner
from mirasol_model.config import MirasolConfig
from mirasol_model.encoders import AudioTokenizer, Tube, TubeTokenizer, ViT, default_tubes
from mirasol_model.inputs import Clips, PerRow, check_device, check_text, read_clips
from mirasol_model.latent import LatentModel
from mirasol_model.layers import recomputed
from mirasol_model.losses import LatentLoss, Reconstruction, mean_of, text_loss
from mirasol_model.packing import Counts, to_index
from mirasol_model.snippets import to_unit_range
from mirasol_model.spread import Spread
from mirasol_model.stream import Stream
from mirasol_model.text import TextDecoder

try:
    from huggingface_hub import PyTorchModelHubMixin
except ModuleNotFoundError as error:
    raise ModuleNotFoundError("the model needs huggingface_hub: pip install 'mirasol-kernels[model]'") from error

# Snippets that encoders and Combiner hold activations of at a time under recompute="snippet", at most.
AT_A_TIME = 4


class MirasolOutput(NamedTuple):
    loss: Tensor | None  # the weighted sum of `losses`; None where nothing was to be predicted
    losses: dict[str, Tensor | None]  # latent, video, audio, text
    logits: Tensor | None  # (B, L, vocabulary); None without text
    latents: Tensor  # (B, T, m, d)


class Encoded(NamedTuple):
    """Clips as the text decoder reads them: encode once, ask often."""

    latents: Tensor  # h (B, T, m, d); meaningless past the end of a clip
    combined: Tensor  # x (B, T, m, d), what the latents are made from
    age: np.ndarray  # (B, T): 1 for the last snippet of a clip, 2 for the one before; 0 and less past its end


class Mirasol(nn.Module, PyTorchModelHubMixin, library_name="mirasol-kernels", license="apache-2.0"):
    """See `forward`, `encode`, `generate`, `stream`; `save_pretrained` and `from_pretrained` are Hugging Face's."""

    def __init__(self, config: MirasolConfig):
        super().__init__()
        self.config = config
        video, audio, encoder, losses, dim = (
            config.video,
            config.audio,
            config.encoder,
            config.losses,
            config.encoder.dim,
        )
        tubes = default_tubes(video.frames) if video.tubes is None else [Tube(*tube) for tube in video.tubes]
        self.video_tokens = TubeTokenizer(dim, tubes, frames=video.frames, size=(video.size, video.size))
        self.log_mel = LogMel(audio.sample_rate, audio.window_ms, audio.hop_ms, audio.mel_bins)
        self.audio_tokens = AudioTokenizer(
            dim, audio.mel_bins, audio.patch, window=self.log_mel.window_samples, hop=self.log_mel.hop_samples
        )
        self.encoder = ViT(dim, encoder.layers, encoder.heads, encoder.mlp_dim)
        self.combiner = build_combiner(dim, config.combiner)
        self.latent = LatentModel(dim, config.combiner.tokens, config.latent)
        self.latent_loss = LatentLoss(dim)
        self.video_loss = Reconstruction(dim, losses.video_size, losses.video_patch, 3, losses)
        self.audio_loss = Reconstruction(dim, losses.audio_size, losses.audio_patch, 1, losses)
        self.text = TextDecoder(dim, config.text)

    def forward(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        text: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        frames: int | PerRow | None = None,
        has_audio: PerRow | None = None,
    ) -> MirasolOutput:
        """All losses that the inputs allow, and the logits of the text.

        video: (B, 3, frames, H, W), floating in [0, 1] or uint8, any number of frames at a constant rate, or None.
        audio: (B, samples), floating in [-1, 1] at config.audio.sample_rate, over the same time as the video, or None.
        text: (B, L) int64, padded behind; None trains the audio-video side alone.
        labels: (B, L) int64, the token that should stand at each place of text (so labels[:, 1:] are predicted from
            text[:, :-1], as in Hugging Face), -100 where it does not matter; None predicts no text.
        frames: how many frames of each row are real, where clips differ in length (the rest is padding); without
            video, how many frames the audio lasts.
        has_audio: which rows have sound, by default all; the audio of the others is not looked at.

        `frames` and `has_audio` are needed on the host: give lists, or tensors there. Raises ValueError or TypeError
        naming the argument, before anything is computed.
        """
        check_device("Mirasol", self.latent.slots.device, video=video, audio=audio)
        clips = self.read(video, audio, text, labels=labels, frames=frames, has_audio=has_audio)
        return self.predict(clips, text, labels)

    def read(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        text: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        frames: int | PerRow | None = None,
        has_audio: PerRow | None = None,
    ) -> Clips:
        """The arguments of `forward`, checked, and its clips cut into snippets: these may be on any device."""
        check_device("Mirasol", self.latent.slots.device, text=text, labels=labels)
        clips = self._read("Mirasol", video, audio, frames, has_audio)
        for name, tokens in (("text", text), ("labels", labels)):
            if tokens is not None:
                check_text("Mirasol", name, tokens, len(clips.frames), self.config.text.vocabulary)
        if labels is not None and (text is None or labels.shape != text.shape):
            expected = "None without text" if text is None else f"{tuple(text.shape)} like text"
            raise ValueError(f"Mirasol: labels: expected {expected}, got {tuple(labels.shape)}")
        return clips

    def predict(
        self, clips: Clips, text: Tensor | None, labels: Tensor | None, spread: Spread | None = None
    ) -> MirasolOutput:
        """`forward` of what `read` gave. spread: its snippets lie on several ranks; see `SnippetParallel`."""
        own = clips if spread is None else clips.take(spread.own, self.latent.slots.device)
        encoded = self._encode(clips, own, spread, mask=self.training)
        logits = None if text is None else self.text(text, self.text.remember(encoded.latents, encoded.age))
        losses = self._predict_next(clips, own, encoded, spread)
        losses["text"] = None if labels is None or logits is None else text_loss(logits, labels)
        if spread is not None:
            losses = spread.total(losses)
        return MirasolOutput(self._total(losses), losses, logits, encoded.latents)

    def encode(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        *,
        frames: int | PerRow | None = None,
        has_audio: PerRow | None = None,
    ) -> Encoded:
        """Everything the text decoder needs of the clips, for any number of `answer`s. Nothing of x is hidden, also in
        train mode. Arguments and errors as in `forward`. Differentiable.

        The latents (B, T, m, d) are in the dtype of the parameters, T the snippets of the longest clip.
        """
        check_device("encode", self.latent.slots.device, video=video, audio=audio)
        clips = self._read("encode", video, audio, frames, has_audio)
        return self._encode(clips, clips)

    @torch.no_grad()
    def answer(self, encoded: Encoded, prompt: Tensor, max_new_tokens: int = 32, **sampling: Any) -> Tensor:
        """prompt (Q, L) -> the tokens that follow it, (Q, <= max_new_tokens). One clip serves any number of prompts,
        otherwise there is one for each. Sampling, padding and errors as in `mirasol_model.generate.generate`."""
        memory = self.text.remember(encoded.latents, encoded.age)
        return generate.generate(self.text, memory, prompt, max_new_tokens, **sampling)

    @torch.no_grad()
    def answer_tokens(
        self, encoded: Encoded, prompt: Tensor, max_new_tokens: int = 32, **sampling: Any
    ) -> Iterator[Tensor]:
        """`answer`, token by token as they come: see `mirasol_model.generate.generate_tokens`."""
        memory = self.text.remember(encoded.latents, encoded.age)
        return generate.generate_tokens(self.text, memory, prompt, max_new_tokens, **sampling)

    @torch.no_grad()
    def generate(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        prompt: Tensor,
        max_new_tokens: int = 32,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        *,
        frames: int | PerRow | None = None,
        has_audio: PerRow | None = None,
        **more: Any,
    ) -> Tensor:
        """`encode` and `answer` in one; greedy unless a temperature is given. The same in train mode.

        video, audio, frames, has_audio: as in `forward`. prompt: (Q, L) int64, Q rows like the clips, or any number of
        them for one clip; `Text.prompt` makes a row. -> (Q, <= max_new_tokens) int64, padded behind.
        more: as in `mirasol_model.generate.generate_tokens`. Raises ValueError or TypeError naming the argument.
        """
        check_device("generate", self.latent.slots.device, prompt=prompt)  # before the clip is encoded
        encoded = self.encode(video, audio, frames=frames, has_audio=has_audio)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **more}
        return self.answer(encoded, prompt, max_new_tokens, **sampling)

    def stream(self, window: int | None = None, sink: int | None = None) -> Stream:
        """Clips of any length, snippet by snippet, in memory that does not grow. See `Stream`, also for the errors.

        window, sink: snippets that the latent model looks back on, and the first ones that stay visible; by default
        those of config.latent.
        """
        return Stream(self, window, sink)

    # ------------------------------------------------------------------------------------- from pixels to latents

    def _read(self, op: str, video, audio, frames, has_audio) -> Clips:
        return read_clips(op, video, audio, frames, has_audio, self.config.video.frames)

    def _encode(self, clips: Clips, own: Clips, spread: Spread | None = None, *, mask: bool = False) -> Encoded:
        """own: those snippets of `clips` that are computed here, all of them without `spread`. mask: hide some of x."""
        x = self._combine(own, spread)
        h = self.latent(x, spread, mask=mask, recompute=self.config.recompute == "snippet")
        age = clips.lengths[:, None] - np.arange(clips.frames.shape[1])
        return Encoded(h if spread is None else spread.gather(h), x, age)

    def _combine(self, clips: Clips, spread: Spread | None = None) -> Tensor:
        """-> x (B, T, m, d)"""
        state: Any = spread if self.combiner.remembers else None  # whose ranks see each other's snippets
        if self.config.recompute == "none":
            return self.step(clips, state, keep=False)[0]
        cuts = np.linspace(0, clips.frames.shape[1], self._parts(clips, spread) + 1).astype(int)
        parts = [clips.part(*part) for part in pairwise(cuts)]
        if state is None and self.config.combiner.context == "current":
            pieces = []
            for part in parts:
                x, state = recomputed(self.step, part, state)
                pieces.append(x)
            return torch.cat(pieces, dim=1)
        # The Combiner in one step: snippet by snippet, the keys and values of all its layers would have to be kept.
        video, audio = (
            None if pieces[0] is None else torch.cat(pieces, dim=1)
            for pieces in zip(*(recomputed(self._sense, part) for part in parts), strict=True)
        )
        return self.combiner.step(video, audio, self.counts(clips), state, keep=False, recompute=True)[0]

    def _parts(self, clips: Clips, spread: Spread | None) -> int:
        """In how many parts our own snippets are computed, each recomputed by itself: as many on every rank, since
        under `fully_shard` all gather the parameters for each."""
        if self.config.recompute == "none":
            return 1
        return -(-(clips.frames.shape[1] if spread is None else spread.most) // AT_A_TIME)

    def step(self, clips: Clips, state: Any, *, keep: bool = True) -> tuple[Tensor, Any]:
        """The next snippets of the clips, after those that left `state` -> x (B, T, m, d), state."""
        return self.combiner.step(*self._sense(clips), self.counts(clips), state, keep=keep)

    def counts(self, clips: Clips) -> tuple[Counts, Counts]:
        """The real tokens of each snippet (B, T), of video and of audio; None where the modality is missing."""
        video = audio = None
        if clips.video is not None:
            height, width = clips.video.shape[-2:]
            video = _each(lambda n: self.video_tokens.valid_tokens(n, (height, width)), clips.frames)
        if clips.audio is not None:
            audio = _each(self.audio_tokens.valid_tokens, clips.samples)
        return video, audio

    def _sense(self, clips: Clips) -> tuple[Tensor | None, Tensor | None]:
        """The encoded tokens (B, T, n, d) of video and of audio."""

        def hear(audio: Tensor, rows: np.ndarray) -> Tensor:
            return self.audio_tokens(self._spectrogram(audio, clips.samples.flat[rows]))

        video, audio = clips.video, clips.audio
        video_counts, audio_counts = self.counts(clips)
        return (
            None if video is None else self._see(video, video_counts, lambda x, rows: self.video_tokens(x)),
            None if audio is None else self._see(audio, audio_counts, hear),
        )

    def _spectrogram(self, audio: Tensor, samples: np.ndarray) -> Tensor:
        """(R, S), of which `samples` (R,) are real -> (R, spectrogram frames, mel bins)"""
        precision = torch.promote_types(audio.dtype, self.audio_tokens.weight.dtype)
        return self.log_mel(audio.to(precision), samples.tolist())

    def _see(self, snippets: Tensor, counts: Counts, tokenize: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
        """snippets (B, T, ...) of which counts (B, T) tokens will be real -> encoded tokens (B, T, n, d).

        Snippets without a token are not computed."""
        assert counts is not None
        flat, real = snippets.flatten(0, 1), counts.reshape(-1)
        rows = np.flatnonzero(real) if real.any() else np.zeros(1, np.int64)
        some = len(rows) < len(real)
        index = to_index(rows, flat)
        tokens = self.encoder(tokenize(flat[index] if some else flat, rows), real[rows].tolist())
        if some:
            tokens = tokens.new_zeros(len(real), *tokens.shape[1:]).index_copy(0, index, tokens)
        return tokens.unflatten(0, snippets.shape[:2])

    # ------------------------------------------------------------------------------------------------ predictions

    def _predict_next(
        self, clips: Clips, own: Clips, encoded: Encoded, spread: Spread | None
    ) -> dict[str, Tensor | None]:
        """latent, video and audio loss of every snippet but the first; with `spread` what our own add to them."""
        losses: dict[str, Tensor | None] = {"latent": None, "video": None, "audio": None}
        (rows, snippets), weights = clips.frames.shape, self.config.losses
        predicted = (clips.frames > 0) & (np.arange(snippets) > 0)  # (B, T)
        where = np.arange(snippets) if spread is None else spread.own
        before = (snippets * np.arange(rows)[:, None] + where - 1).reshape(-1)  # of own snippets, in (B, T)
        h, x = encoded.latents.flatten(0, 1), encoded.combined.flatten(0, 1)  # (B*T, m, d), (B*t, m, d)

        def chosen(counted: np.ndarray, least: int = 1) -> Chosen | None:
            return _choose((counted & predicted[..., None])[:, where], (counted & predicted[..., None]).sum(), least)

        def reconstruct(loss: Reconstruction, real: np.ndarray, sense: Callable[[Clips, np.ndarray], Tensor]):
            def errors(rows: np.ndarray) -> Tensor:
                target = loss.target(sense(own, rows))  # first, so that the large pictures are gone when it predicts
                return loss(h[to_index(before[rows], h)], target)

            parts = self._parts(own, spread)
            if (some := chosen(real.reshape(rows, snippets, -1), parts)) is None:
                return None
            if self.config.recompute == "none":
                return some.share * mean_of(errors(some.rows), some.counted)
            pieces = [recomputed(errors, part) for part in np.array_split(some.rows, parts)]
            return some.share * mean_of(torch.cat(pieces), some.counted)

        if weights.latent > 0 and (some := chosen(predicted[..., None])) is not None:
            guess, target = h[to_index(before[some.rows], h)], x[to_index(some.rows, x)]
            losses["latent"] = some.share * self.latent_loss(guess, target)
        if weights.reconstruction > 0 and clips.video is not None:
            real = self.video_loss.real_patches(clips.frames.reshape(-1), self.config.video.frames)
            losses["video"] = reconstruct(self.video_loss, real, self._picture)
        if weights.reconstruction > 0 and clips.audio is not None:
            heard = _each(self.log_mel.frames, clips.samples).reshape(-1)
            real = self.audio_loss.real_patches(heard, self.log_mel.frames(clips.audio.shape[2]))
            losses["audio"] = reconstruct(self.audio_loss, real, self._sound)
        return losses

    def _picture(self, clips: Clips, rows: np.ndarray) -> Tensor:
        """Snippets `rows` of (B, T), in [-1, 1]: (R, 3, F, H, W)"""
        return to_unit_range(_pick(clips.video, rows), self.video_loss.query.dtype).mul_(2).sub_(1)  # a copy already

    def _sound(self, clips: Clips, rows: np.ndarray) -> Tensor:
        """Snippets `rows` of (B, T): (R, 1, spectrogram frames, mel bins)"""
        return self._spectrogram(_pick(clips.audio, rows), clips.samples.flat[rows])[:, None]

    def _total(self, losses: dict[str, Tensor | None]) -> Tensor | None:
        weights = self.config.losses
        factors = {
            "latent": weights.latent,
            "video": weights.reconstruction,
            "audio": weights.reconstruction,
            "text": weights.text,
        }
        terms = [factors[name] * loss for name, loss in losses.items() if loss is not None]
        return torch.stack(terms).sum() if terms else None

    # ------------------------------------------------------------------------------------------------------- disk

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *, config: MirasolConfig | None = None, **options: Any
    ) -> Mirasol:
        """A saved model, from a folder or the Hugging Face hub. It is in eval mode.

        config: by default the saved one. Another one may differ in what is chosen anew for each training (`recompute`,
        the weights of the losses, the mask ratio); anything else is a ValueError that names it.
        """
        return super().from_pretrained(pretrained_model_name_or_path, wanted=config, **options)

    @classmethod
    def _from_pretrained(cls, *, model_id: str, config: Any = None, wanted: Any = None, **options: Any) -> Mirasol:
        if config is None:
            raise ValueError(f"from_pretrained: expected a config.json in {model_id}, found none")
        saved = MirasolConfig.from_dict(config)
        if wanted is not None and (different := saved.differences(wanted)):
            raise ValueError(f"from_pretrained: config: expected what {model_id} was saved with, got {different}")
        return super()._from_pretrained(model_id=model_id, config=wanted or saved, **{**options, "strict": True})


class Chosen(NamedTuple):
    """Snippets that a loss is taken of, and what of them."""

    rows: np.ndarray  # (R,) of own snippets
    counted: np.ndarray  # (R, P)
    share: float  # of what counts on all ranks


def _choose(counted: np.ndarray, total: int, least: int) -> Chosen | None:
    """counted (B, t, P), of which `total` on all ranks; None if nothing counts anywhere.

    A rank on which fewer than `least` snippets count predicts more all the same, which do not: all do the same in
    backward, where they wait for each other. Where nothing counts, the whole has weight 0.
    """
    if not total:
        return None
    counted = counted.reshape(-1, counted.shape[2])
    rows = np.flatnonzero(counted.any(axis=1))
    more = (max(least - len(rows), 0), 0)
    taken = np.pad(counted[rows], (more, (0, 0)), constant_values=not len(rows))
    return Chosen(np.pad(rows, more), taken, counted.sum() / total)


def _each(count: Callable[[int], int], numbers: np.ndarray) -> np.ndarray:
    """count(n) for each of `numbers`, of which few differ."""
    values, index = np.unique(numbers, return_inverse=True)
    return np.array([count(int(value)) for value in values])[index].reshape(numbers.shape)


def _pick(snippets: Tensor | None, rows: np.ndarray) -> Tensor:
    """snippets (B, T, ...), rows of the flattened (B*T): without copying the others."""
    assert snippets is not None
    row, snippet = np.divmod(rows, snippets.shape[1])
    return snippets[to_index(row, snippets), to_index(snippet, snippets)]
