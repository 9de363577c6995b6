"""Log-mel spectrogram as Kaldi computes it (torchaudio 2.11 `compliance/kaldi.py`, as called by YuanGongND/ast@31088be
`src/dataloader.py`), for a batch of rows of different lengths. That Mirasol reads audio like the AST is our choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Mean and standard deviation of log-mel values over AudioSet, as published with the AST.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974
PRE_EMPHASIS = 0.97
LOWEST_HZ = 20.0
# Kaldi clamps the energy here before the logarithm, which makes this the value of digital silence.
FLOOR = torch.finfo(torch.float32).eps
SILENCE = (math.log(FLOOR) - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)  # -1.278


def count_frames(samples: int, window: int, hop: int) -> int:
    """Spectrogram frames of `samples` samples: whole windows only, but at least one where there is any sound."""
    return 0 if samples <= 0 else 1 + max(samples - window, 0) // hop


def mel_filters(mel_bins: int, fft: int, sample_rate: int) -> Tensor:
    """(mel_bins, fft // 2) float64: triangles linear in mel = 1127 ln(1 + f/700), from 20 Hz to half the rate.

    The original computes them in float32, where the logarithm's last bit is worth 1e-5 and differs between processors;
    rounded from float64 they are the same everywhere, and as near to the original's as two machines' are to each other.
    """
    lowest, highest = (1127.0 * math.log(1.0 + hz / 700.0) for hz in (LOWEST_HZ, sample_rate / 2))
    edges = torch.linspace(lowest, highest, mel_bins + 2, dtype=torch.float64)[:, None]  # (mel_bins + 2, 1)
    hertz = torch.arange(fft // 2, dtype=torch.float64) * (sample_rate / fft)
    bins = 1127.0 * (1.0 + hertz / 700.0).log()  # (fft // 2)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


class LogMel(nn.Module):
    """audio (N, S) float -> (N, frames, mel_bins), natural log of the mel energies, (x - mean) / (2 std).

    Per frame: mean removed, pre-emphasis 0.97, symmetric Hann window, |FFT|^2, mel filters, log of max(energy, eps).
    Before that the mean of the waveform is removed, over the row's own real samples: padding, and in a snippet the
    future, do not enter it. There are `frames(S)` frames, at least one (a row shorter than a window is zero-padded).
    What lies past a row's real frames is SILENCE after normalisation; zero there would look like loud sound.
    It runs in float32 (float64 for float64 input), also under autocast and in a model of half precision: energies span
    nine decades.
    """

    def __init__(self, sample_rate: int = 16000, window_ms: float = 25, hop_ms: float = 10, mel_bins: int = 128):
        super().__init__()
        self.sample_rate, self.mel_bins = sample_rate, mel_bins
        self.window_samples = int(sample_rate * window_ms / 1000)
        self.hop_samples = int(sample_rate * hop_ms / 1000)
        if self.hop_samples < 1 or self.window_samples < 2:
            raise ValueError(
                f"LogMel: window_ms, hop_ms: expected at least 2 and 1 samples at {sample_rate} Hz, "
                f"got {window_ms} and {hop_ms} ms"
            )
        self.fft = 1 << (self.window_samples - 1).bit_length()
        self._tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def tables(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Hann window (window_samples,) and mel filters (mel_bins, fft // 2), of float32's precision in any dtype.

        Not buffers: `model.bfloat16()` would round them."""
        found = self._tables.get((device, dtype))
        if found is None:
            window = torch.hann_window(self.window_samples, periodic=False, dtype=torch.float32)
            filters = mel_filters(self.mel_bins, self.fft, self.sample_rate).float()
            found = window.to(device, dtype), filters.to(device, dtype)
            if not torch.compiler.is_compiling():  # a tensor of a trace must not outlive it
                self._tables[device, dtype] = found
        return found

    def frames(self, samples: int) -> int:
        """Spectrogram frames with real sound in a row of `samples` real samples."""
        return count_frames(samples, self.window_samples, self.hop_samples)

    @torch.no_grad()
    def forward(self, audio: Tensor, counts: Tensor | Sequence[int] | None = None) -> Tensor:
        """audio (N, S), counts: real samples of each row (N), all of them by default -> (N, frames, mel_bins)."""
        if audio.ndim != 2 or not audio.is_floating_point():
            raise ValueError(
                f"LogMel: audio: expected floating point (N, samples), got {audio.dtype} {tuple(audio.shape)}"
            )
        if counts is not None and len(counts) != len(audio):
            raise ValueError(f"LogMel: counts: expected one per row, {len(audio)}, got {len(counts)}")
        device = audio.device.type
        with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
            return self._spectrogram(audio, counts)

    def _spectrogram(self, audio: Tensor, counts: Tensor | Sequence[int] | None) -> Tensor:
        dtype = torch.float64 if audio.dtype == torch.float64 else torch.float32
        audio, samples = audio.to(dtype), audio.shape[1]
        window, filters = self.tables(audio.device, dtype)
        if counts is None:
            counts = [samples] * len(audio)
        real = torch.as_tensor(counts, device=audio.device)[:, None]  # (N, 1)
        inside = torch.arange(samples, device=audio.device) < real  # (N, S)
        audio = audio.masked_fill(~inside, 0)
        audio = (audio - audio.sum(1, keepdim=True) / real.clamp(min=1)).masked_fill(~inside, 0)

        x = F.pad(audio, (0, max(self.window_samples - samples, 0))).unfold(1, self.window_samples, self.hop_samples)
        x = x - x.mean(-1, keepdim=True)  # (N, frames, window)
        # The first sample of a frame has no predecessor in it and stands in for its own.
        x = x - PRE_EMPHASIS * torch.cat([x[..., :1], x[..., :-1]], dim=-1)
        spectrum = torch.fft.rfft(x * window, n=self.fft)[..., :-1]  # Kaldi has no filter at Nyquist
        energy = spectrum.real.square() + spectrum.imag.square()  # (N, frames, fft // 2)
        mel = (energy @ filters.T).clamp(min=FLOOR).log()  # (N, frames, mel_bins)
        mel = (mel - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)

        sounding = 1 + (real - self.window_samples).clamp(min=0) // self.hop_samples  # count_frames, on the device
        sounding = torch.where(real > 0, sounding, 0)
        heard = torch.arange(mel.shape[1], device=mel.device) < sounding  # (N, frames)
        return mel.masked_fill(~heard[..., None], SILENCE)
