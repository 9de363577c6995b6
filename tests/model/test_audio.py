"""Log-mel: Kaldi's numbers, and what is absent is neither loud nor heard."""

import math

import pytest
import torch
from torch.nn import functional as F

from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.audio import AUDIOSET_MEAN, AUDIOSET_STD, SILENCE, LogMel, mel_filters
from mirasol_model.encoders import AudioTokenizer
from tests.numerics import assert_close_fp64, assert_golden, golden, peak


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kaldi_numbers(dtype):
    data = golden("extra/ast_frontend")
    # The original's table is made in float32, of mel values up to 129 times the distance of two triangles.
    rounding = 129 * torch.finfo(torch.float32).eps
    assert peak(mel_filters(128, 512, 16000) - torch.from_numpy(data["mid.mel_banks"])) <= rounding
    log_mel = LogMel().to(dtype)
    mel = log_mel(torch.from_numpy(data["in.waveform"]).to(dtype))[0]
    assert len(mel) == log_mel.frames(8000) == len(data["out.fbank"]) == 48
    assert mel.dtype == dtype
    # Before the normalisation, which divides the data's own rounding (float32, 8e-6 of the range) by less than itself.
    assert_golden(mel * 2 * AUDIOSET_STD + AUDIOSET_MEAN, data["out.fbank"])
    normalised = (torch.from_numpy(data["out.fbank"]) - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)
    assert_golden(normalised, data["out.normalised"][:48])


def test_patches_of_the_reference():
    """Its patches run through frequency first, ours through time; the projection is the same."""
    data = golden("extra/ast_frontend")
    spectrogram = torch.from_numpy(data["out.normalised"])[None]  # (1, 64, 128): 4 steps of 8 patches
    tokenizer = AudioTokenizer(24)
    with torch.no_grad():
        tokenizer.weight.copy_(torch.from_numpy(data["param.conv16.weight"]))
        tokenizer.bias.copy_(torch.from_numpy(data["param.conv16.bias"]))
        tokenizer.modality.zero_()
        tokens = tokenizer(spectrogram) - tokenizer.positions((4, 8), tokenizer.bias)
    ours = tokens.unflatten(1, (4, 8)).transpose(1, 2).flatten(1, 2)
    assert_golden(ours, data["out.patches_s16"])


def slow_log_mel(audio, counts, log_mel):
    """Row by row, frame by frame, DFT by its definition, from the words of the docstring."""
    window, hop, fft = log_mel.window_samples, log_mel.hop_samples, log_mel.fft
    _, filters = log_mel.tables(audio.device, torch.float64)
    hann = torch.hann_window(window, periodic=False).double()
    angle = 2 * math.pi * torch.arange(fft // 2).double()[:, None] * torch.arange(window) / fft
    total = 1 + max(audio.shape[1] - window, 0) // hop
    out = torch.full((len(audio), total, log_mel.mel_bins), SILENCE, dtype=torch.float64)
    for row, count in enumerate(counts):
        real = audio[row, :count]
        if count:
            real = F.pad(real - real.mean(), (0, max(window - count, 0)))
        for i, begin in enumerate(range(0, len(real) - window + 1, hop) if count else ()):
            x = real[begin : begin + window]
            x = x - x.mean()
            x = torch.stack([x[j] - 0.97 * x[max(j - 1, 0)] for j in range(window)]) * hann
            energy = (angle.cos() @ x) ** 2 + (angle.sin() @ x) ** 2
            out[row, i] = (filters @ energy).clamp(min=2**-23).log()
            out[row, i] = (out[row, i] - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)
    return out


@pytest.mark.parametrize("samples", [1, 39, 40, 41, 55, 56, 199])
def test_rows_of_different_lengths(samples):
    """A small spectrogram (window 40, hop 16) against the loop, with rows that are full, short, one sample and none."""
    log_mel = LogMel(1600, mel_bins=8).double()
    counts = [samples, max(samples - 17, 1), 1, 0]
    audio = torch.rand(4, samples, dtype=torch.float64) + 0.3
    assert_close_fp64(log_mel(audio, counts), slow_log_mel(audio, counts, log_mel).double())
    for row, count in enumerate(counts):
        audio[row, count:] = torch.nan  # padding may hold anything
    poisoned = log_mel(audio, torch.tensor(counts))
    assert torch.equal(poisoned, log_mel(audio.nan_to_num(7.0), counts))
    heard = [log_mel.frames(count) for count in counts]
    for row, count in enumerate(heard):
        assert (poisoned[row, count:] == SILENCE).all()
    assert heard[2:] == [1, 0]


def test_silence_is_silence():
    log_mel = LogMel()
    assert pytest.approx(-1.278, abs=5e-4) == SILENCE
    # Whatever is constant is silent: the mean is taken off before the log.
    digital = log_mel(torch.full((1, 800), 0.25, dtype=torch.float64))
    assert_close_fp64(digital, torch.full_like(digital, SILENCE))
    assert log_mel(torch.zeros(2, 0)).shape == (2, 1, 128)
    assert (log_mel(torch.zeros(2, 0)) == SILENCE).all()


def test_no_gradient_and_float32_under_autocast():
    audio = torch.rand(1, 800, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        mel = LogMel()(audio)
    assert mel.dtype == torch.float32 and not mel.requires_grad
    assert torch.equal(mel, LogMel()(audio))


def test_tables_are_exact_in_a_model_of_any_dtype():
    audio = torch.rand(1, 800)
    expected = LogMel()(audio)
    for log_mel in (LogMel().bfloat16(), LogMel().half(), LogMel().to_empty(device="cpu"), LogMel().double()):
        assert torch.equal(log_mel(audio), expected)
    with torch.device("meta"):
        model = LogMel()
    assert torch.equal(model.to_empty(device="cpu")(audio), expected)
    made = Mirasol(MirasolConfig.preset("tiny"))
    heard = made.log_mel(audio)
    assert torch.equal(made.bfloat16().log_mel(audio), heard)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: LogMel(16000, hop_ms=0.01),
            r"LogMel: window_ms, hop_ms: expected at least 2 and 1 samples at 16000 Hz",
        ),
        (lambda: LogMel()(torch.rand(800)), r"LogMel: audio: expected .* got torch.float32 \(800,\)"),
        (lambda: LogMel()(torch.zeros(1, 800, dtype=torch.int16)), "got torch.int16"),
        (lambda: LogMel()(torch.rand(2, 800), [800]), "counts: expected one per row, 2, got 1"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
