"""Mirasol3B (arXiv 2311.05698): one model for what is dense and aligned in time, one for text, which is neither.

    video, audio -> snippets -> tokens -> one ViT -> Combiner: m tokens x_t per snippet
    x_1..x_T     -> block-causal transformer -> latents h_1..h_T, which also predict snippet t+1
    text         -> causal decoder with cross-attention to all h_t

Whatever the length of the clip, a snippet is m tokens, and no parameter depends on the number of snippets. A modality
may be missing and clips of a batch may differ in length: what is not there is packed away, not masked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mirasol_model import generate
from mirasol_model.audio import LogMel
from mirasol_model.combiner import build_combiner
from mirasol_model.config import MirasolConfig
from mirasol_model.encoders import AudioTokenizer, Tube, TubeTokenizer, ViT, default_tubes
from mirasol_model.inputs import Clips, PerRow, check_text, read_clips
from mirasol_model.latent import LatentModel
from mirasol_model.losses import LatentLoss, Reconstruction, mean_of, text_loss
from mirasol_model.packing import to_index
from mirasol_model.snippets import to_unit_range
from mirasol_model.stream import Stream
from mirasol_model.text import TextDecoder

# Snippets that encoders and Combiner hold activations of at a time under recompute="snippet".
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
        clips = self._read("Mirasol", video, audio, frames, has_audio)
        for name, tokens in (("text", text), ("labels", labels)):
            if tokens is not None:
                check_text("Mirasol", name, tokens, len(clips.frames), self.config.text.vocabulary)
        if labels is not None and (text is None or labels.shape != text.shape):
            expected = "None without text" if text is None else f"{tuple(text.shape)} like text"
            raise ValueError(f"Mirasol: labels: expected {expected}, got {tuple(labels.shape)}")

        encoded = self._encode(clips)
        logits = None if text is None else self.text(text, self.text.remember(encoded.latents, encoded.age))
        losses = self._predict_next(clips, encoded)
        losses["text"] = None if labels is None or logits is None else text_loss(logits, labels)
        return MirasolOutput(self._total(losses), losses, logits, encoded.latents)

    def encode(
        self,
        video: Tensor | None,
        audio: Tensor | None,
        *,
        frames: int | PerRow | None = None,
        has_audio: PerRow | None = None,
    ) -> Encoded:
        """Everything the text decoder needs of the clips, for any number of `answer`s. Arguments as in `forward`."""
        return self._encode(self._read("encode", video, audio, frames, has_audio))

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
        """`encode` and `answer` in one; greedy unless a temperature is given."""
        encoded = self.encode(video, audio, frames=frames, has_audio=has_audio)
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, **more}
        return self.answer(encoded, prompt, max_new_tokens, **sampling)

    def stream(self, window: int | None = None, sink: int | None = None) -> Stream:
        """Clips of any length, snippet by snippet, in memory that does not grow. See `Stream`."""
        return Stream(self, window, sink)

    # ------------------------------------------------------------------------------------- from pixels to latents

    def _read(self, op: str, video, audio, frames, has_audio) -> Clips:
        return read_clips(op, video, audio, frames, has_audio, self.config.video.frames)

    def _encode(self, clips: Clips) -> Encoded:
        x = self._combine(clips)
        age = clips.lengths[:, None] - np.arange(clips.frames.shape[1])
        return Encoded(self.latent(x, self._recomputed), x, age)

    def _combine(self, clips: Clips) -> Tensor:
        """-> x (B, T, m, d)"""
        if self.config.recompute == "none":
            return self.step(clips, None, keep=False)[0]
        pieces, state = [], None
        for begin in range(0, clips.frames.shape[1], AT_A_TIME):
            x, state = self._recomputed(self.step, clips.part(begin, begin + AT_A_TIME), state)
            pieces.append(x)
        return torch.cat(pieces, dim=1)

    def step(self, clips: Clips, state: Any, *, keep: bool = True) -> tuple[Tensor, Any]:
        """The next snippets of the clips, after those that left `state` -> x (B, T, m, d), state."""
        video = audio = None
        video_counts = audio_counts = None
        if clips.video is not None:
            height, width = clips.video.shape[-2:]
            video_counts = _each(lambda n: self.video_tokens.valid_tokens(n, (height, width)), clips.frames)
            video = self._see(clips.video, video_counts, lambda x, rows: self.video_tokens(x))
        if clips.audio is not None:

            def hear(audio: Tensor, rows: np.ndarray) -> Tensor:
                return self.audio_tokens(self._spectrogram(audio, clips.samples.flat[rows]))

            audio_counts = _each(self.audio_tokens.valid_tokens, clips.samples)
            audio = self._see(clips.audio, audio_counts, hear)
        return self.combiner.step(video, audio, (video_counts, audio_counts), state, keep=keep)

    def _spectrogram(self, audio: Tensor, samples: np.ndarray) -> Tensor:
        """(R, S), of which `samples` (R,) are real -> (R, spectrogram frames, mel bins)"""
        precision = torch.promote_types(audio.dtype, self.audio_tokens.weight.dtype)
        return self.log_mel(audio.to(precision), samples.tolist())

    def _see(self, snippets: Tensor, counts: np.ndarray, tokenize: Callable[[Tensor, np.ndarray], Tensor]) -> Tensor:
        """snippets (B, T, ...) of which counts (B, T) tokens will be real -> encoded tokens (B, T, n, d).

        Snippets without a token are not computed."""
        flat, real = snippets.flatten(0, 1), counts.reshape(-1)
        rows = np.flatnonzero(real) if real.any() else np.zeros(1, np.int64)
        some = len(rows) < len(real)
        index = to_index(rows, flat)
        tokens = self.encoder(tokenize(flat[index] if some else flat, rows), real[rows].tolist())
        if some:
            tokens = tokens.new_zeros(len(real), *tokens.shape[1:]).index_copy(0, index, tokens)
        return tokens.unflatten(0, snippets.shape[:2])

    def _recomputed(self, function: Callable, *args: Any) -> Any:
        """function(*args), of which under recompute="snippet" nothing but the arguments is kept for backward."""
        if self.config.recompute == "none" or not torch.is_grad_enabled():
            return function(*args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)

    # ------------------------------------------------------------------------------------------------ predictions

    def _predict_next(self, clips: Clips, encoded: Encoded) -> dict[str, Tensor | None]:
        """latent, video and audio loss of every snippet but the first."""
        losses: dict[str, Tensor | None] = {"latent": None, "video": None, "audio": None}
        snippets, weights = clips.frames.shape[1], self.config.losses
        there = np.flatnonzero(clips.frames[:, 1:] > 0)  # of (B, T-1): row b has a snippet t + 1
        if not len(there):
            return losses
        after = there + there // (snippets - 1) + 1  # where that lies in (B, T); before it lies t
        h, x = encoded.latents.flatten(0, 1), encoded.combined.flatten(0, 1)  # (B*T, m, d)
        if weights.latent > 0:
            losses["latent"] = self.latent_loss(h[to_index(after - 1, h)], x[to_index(after, x)])
        if weights.reconstruction > 0 and clips.video is not None:
            real = self.video_loss.real_patches(clips.frames.reshape(-1), self.config.video.frames)
            losses["video"] = self._reconstruct(self.video_loss, h, after, real, clips, self._picture)
        if weights.reconstruction > 0 and clips.audio is not None:
            heard = _each(self.log_mel.frames, clips.samples).reshape(-1)
            real = self.audio_loss.real_patches(heard, self.log_mel.frames(clips.audio.shape[2]))
            losses["audio"] = self._reconstruct(self.audio_loss, h, after, real, clips, self._sound)
        return losses

    def _reconstruct(
        self,
        loss: Reconstruction,
        h: Tensor,
        after: np.ndarray,
        real: np.ndarray,
        clips: Clips,
        sense: Callable[[Clips, np.ndarray], Tensor],
    ) -> Tensor | None:
        """Mean error of the patches that are `real` (B*T, P), of the snippets `after`, each predicted from the h before
        it (B*T, m, d). `sense` gives the snippets to predict."""
        after = after[real[after].any(axis=1)]
        if not len(after):
            return None

        def errors(rows: np.ndarray) -> Tensor:
            return loss(h[to_index(rows - 1, h)], sense(clips, rows))

        size = len(after) if self.config.recompute == "none" else AT_A_TIME * len(clips.frames)
        pieces = [self._recomputed(errors, after[i : i + size]) for i in range(0, len(after), size)]
        return mean_of(torch.cat(pieces), real[after])

    def _picture(self, clips: Clips, rows: np.ndarray) -> Tensor:
        """Snippets `rows` of (B, T), in [-1, 1]: (R, 3, F, H, W)"""
        return to_unit_range(_pick(clips.video, rows), self.video_loss.query.dtype) * 2 - 1

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


def _each(count: Callable[[int], int], numbers: np.ndarray) -> np.ndarray:
    """count(n) for each of `numbers`, of which few differ."""
    values, index = np.unique(numbers, return_inverse=True)
    return np.array([count(int(value)) for value in values])[index].reshape(numbers.shape)


def _pick(snippets: Tensor | None, rows: np.ndarray) -> Tensor:
    """snippets (B, T, ...), rows of the flattened (B*T): without copying the others."""
    assert snippets is not None
    row, snippet = np.divmod(rows, snippets.shape[1])
    return snippets[to_index(row, snippets), to_index(snippet, snippets)]
