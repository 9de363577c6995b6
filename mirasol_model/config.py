"""Everything that can be chosen about a Mirasol model, one frozen dataclass per part, with a JSON round trip.

Each default says how firm it is: **paper** (arXiv 2311.05698 or its authors), **second-hand** (written down by
reviewers or leaderboards that had the paper, or a default of the authors' published code), **ours** (no source says).
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from mirasol_model.fields import build, expect, positive, typed

Triple = tuple[int, int, int]
Kind = Literal["transformer", "ttm", "perceiver", "token_learner"]
TubeSpec = tuple[Triple, Triple, Triple]  # kernel, stride, offset, each (frames, rows, columns)


def _heads(part: str, dim: int, heads: int) -> None:
    expect(dim % heads == 0, f"{part}.heads", f"a divisor of the width {dim}", heads)
    expect(dim // heads % 2 == 0, f"{part}.heads", f"an even head width (rotary pairs channels), width {dim}", heads)


@dataclass(frozen=True)
class VideoConfig:
    """Snippets of frames, read as sparse tubes plus image patches (TubeViT, arXiv 2212.03229)."""

    frames: int = 8  # second-hand: F, frames per snippet (the paper's range is 4 to 64)
    size: int = 224  # ours: height and width it is meant for; the model itself takes any
    tubes: tuple[TubeSpec, ...] | None = None  # ours: None picks the set that suits `frames`

    def __post_init__(self) -> None:
        typed("video", self)
        positive("video", self, "frames", "size")
        for tube in self.tubes or ():
            fits = min(*tube[0], *tube[1]) >= 1 and min(tube[2]) >= 0
            expect(fits, "video.tubes", "kernels and strides of at least 1, offsets of at least 0", tube)
        expect(self.tubes != (), "video.tubes", "None or at least one tube", self.tubes)


@dataclass(frozen=True)
class AudioConfig:
    """Log-mel spectrogram patches of one snippet's samples."""

    sample_rate: int = 16_000  # second-hand: 16 kHz mono, as in AST
    window_ms: float = 25.0  # second-hand
    hop_ms: float = 10.0  # second-hand
    mel_bins: int = 128  # second-hand
    patch: int = 16  # second-hand: 16 x 16 patches

    def __post_init__(self) -> None:
        typed("audio", self)
        positive("audio", self, "sample_rate", "mel_bins", "patch")
        expect(0 < self.hop_ms <= self.window_ms, "audio.hop_ms", "0 < hop <= window", self.hop_ms)
        expect(self.mel_bins % self.patch == 0, "audio.mel_bins", f"a multiple of patch {self.patch}", self.mel_bins)


@dataclass(frozen=True)
class EncoderConfig:
    """One ViT for both modalities (second-hand: shared weights, own patch projections)."""

    dim: int = 1280  # ours: d, the width of the whole audio-video side
    layers: int = 32  # ours
    heads: int = 16  # ours
    mlp_dim: int = 5120  # ours

    def __post_init__(self) -> None:
        typed("encoder", self)
        positive("encoder", self, "dim", "layers", "heads", "mlp_dim")
        _heads("encoder", self.dim, self.heads)


@dataclass(frozen=True)
class CombinerConfig:
    """(v_t, a_t) -> x_t, `tokens` per snippet."""

    kind: Kind = "transformer"  # paper: transformer and ttm; perceiver and token_learner for its ablations
    context: Literal["current", "all"] = "current"  # paper: the figure shows current, the formula all snippets so far
    order: Literal["queries", "last"] = (
        "queries"  # ours: [video | audio | learned queries]; "last" goes without queries
    )
    tokens: int = 32  # second-hand: m
    layers: int = 8  # ours: of the transformer, of the Perceiver, of the TTM's processor
    heads: int = 16  # ours
    mlp_dim: int = 5120  # ours
    window: int | None = None  # ours: snippets that context "all" looks back on, its own included; None: every one
    memory: int = 96  # second-hand: memory tokens of the TTM
    bottleneck: int = 64  # second-hand: hidden width of the token learners' score MLPs
    memory_mode: Literal["TL", "MHA", "AddErase"] = "TL"  # second-hand: how the TTM reads and writes
    processor: Literal["transformer", "mixer", "mlp"] = "transformer"  # second-hand: what the TTM computes with

    def __post_init__(self) -> None:
        typed("combiner", self)
        positive("combiner", self, "tokens", "layers", "heads", "mlp_dim", "memory", "bottleneck")
        expect(
            self.context == "current" or self.kind == "transformer",
            "combiner.context",
            f"'current' for kind {self.kind!r} (only the transformer attends over snippets)",
            self.context,
        )
        expect(
            self.window is None or (self.window >= 1 and self.context == "all"),
            "combiner.window",
            "None, or at least 1 together with context 'all'",
            self.window,
        )


@dataclass(frozen=True)
class LatentConfig:
    """Block-causal transformer over x_1..x_T (paper), rotary by snippet index and a learned slot embedding (ours)."""

    layers: int = 28  # ours
    heads: int = 16  # ours
    mlp_dim: int = 5120  # ours
    window: int | None = None  # ours: snippets a snippet looks back on, its own included; None: every one (paper)
    sink: int = 0  # ours: first snippets that stay visible past the window
    mask_ratio: float = 0.15  # ours: share of x replaced by a learned token in training (paper: "randomly masked")

    def __post_init__(self) -> None:
        typed("latent", self)
        positive("latent", self, "layers", "heads", "mlp_dim")
        expect(self.window is None or self.window >= 1, "latent.window", "None or at least 1", self.window)
        expect(self.sink >= 0, "latent.sink", "0 or more", self.sink)
        expect(self.window is not None or self.sink == 0, "latent.sink", "0 where there is no window", self.sink)
        expect(0.0 <= self.mask_ratio < 1.0, "latent.mask_ratio", "a share in [0, 1)", self.mask_ratio)


@dataclass(frozen=True)
class TextConfig:
    """Causal decoder with cross-attention to every h_t (paper)."""

    vocabulary: int = 32_128  # ours: the size of the T5 vocabulary
    dim: int = 1536  # ours
    layers: int = 36  # ours
    heads: int = 16  # ours
    mlp_dim: int = 6144  # ours
    pad: int = 0  # ours: what fills a row after its last token
    eos: int = 1  # ours: ends a generated answer

    def __post_init__(self) -> None:
        typed("text", self)
        positive("text", self, "vocabulary", "dim", "layers", "heads", "mlp_dim")
        _heads("text", self.dim, self.heads)
        for name in ("pad", "eos"):
            token = getattr(self, name)
            expect(0 <= token < self.vocabulary, f"text.{name}", f"a token below {self.vocabulary}", token)


@dataclass(frozen=True)
class LossConfig:
    """L = latent * latent + reconstruction * (video + audio) + text * text."""

    latent: float = 1.0  # second-hand: all equal in pretraining
    reconstruction: float = 1.0  # second-hand
    text: float = 1.0  # second-hand: 10 in fine-tuning
    distance: Literal["cosine", "l2"] = "cosine"  # ours: of a reconstructed patch
    layers: int = 4  # ours: of each of the two reconstruction transformers
    heads: int = 16  # ours
    mlp_dim: int = 5120  # ours
    video_size: Triple = (4, 32, 32)  # ours: frames, rows, columns that a snippet is shrunk to before it is predicted
    video_patch: Triple = (2, 8, 8)  # ours
    audio_size: tuple[int, int] = (8, 64)  # ours: spectrogram frames, mel bins
    audio_patch: tuple[int, int] = (4, 16)  # ours

    def __post_init__(self) -> None:
        typed("losses", self)
        positive("losses", self, "layers", "heads", "mlp_dim")
        for name in ("latent", "reconstruction", "text"):
            expect(getattr(self, name) >= 0, f"losses.{name}", "a weight of at least 0", getattr(self, name))
        for name in ("video", "audio"):
            size, patch = getattr(self, f"{name}_size"), getattr(self, f"{name}_patch")
            fits = min(*size, *patch) >= 1 and all(s % p == 0 for s, p in zip(size, patch, strict=True))
            expect(fits, f"losses.{name}_patch", f"divisors of {name}_size {size}", patch)


@dataclass(frozen=True)
class MirasolConfig:
    """The whole model. Read one from `MirasolConfig.preset(name)`; change it with `dataclasses.replace`."""

    video: VideoConfig = field(default_factory=VideoConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    combiner: CombinerConfig = field(default_factory=CombinerConfig)
    latent: LatentConfig = field(default_factory=LatentConfig)
    text: TextConfig = field(default_factory=TextConfig)
    losses: LossConfig = field(default_factory=LossConfig)
    recompute: Literal["none", "snippet"] = "none"  # ours: "snippet" recomputes all but the text decoder in backward

    def __post_init__(self) -> None:
        expect(self.recompute in ("none", "snippet"), "recompute", "'none' or 'snippet'", self.recompute)
        dim = self.encoder.dim
        for part in ("combiner", "latent", "losses"):
            _heads(part, dim, getattr(self, part).heads)
        frames = self.losses.video_size[0]
        expect(frames <= self.video.frames, "losses.video_size", f"at most video.frames {self.video.frames}", frames)
        expect(
            self.losses.audio_size[1] <= self.audio.mel_bins,
            "losses.audio_size",
            "at most audio.mel_bins",
            self.losses.audio_size,
        )

    @staticmethod
    def preset(name: str) -> MirasolConfig:
        """One of "tiny", "small", "base", "3b"; every width and depth in them is ours."""
        if name not in PRESETS:
            raise ValueError(f"config: preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return PRESETS[name]

    def differences(self, other: MirasolConfig) -> str:
        """The fields in which `other` is another model, as "combiner.kind 'ttm' (not 'transformer')"; "" if none.

        What may be chosen anew for each training of the same weights does not count.
        """
        mine, theirs = _flat(self.to_dict()), _flat(other.to_dict())
        return ", ".join(
            f"{name} {theirs[name]!r} (not {value!r})"
            for name, value in mine.items()
            if value != theirs[name] and name not in FREE
        )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MirasolConfig:
        """The inverse of `to_dict`; parts and fields left out keep their defaults, unknown ones are an error."""
        return build(cls, values, "")

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> MirasolConfig:
        return cls.from_dict(json.loads(text))


FREE = ("recompute", "latent.mask_ratio", "losses.latent", "losses.reconstruction", "losses.text", "losses.distance")


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    """{"video": {"frames": 8}} -> {"video.frames": 8}"""
    return {
        f"{part}.{name}" if isinstance(fields, dict) else part: value
        for part, fields in values.items()
        for name, value in (fields.items() if isinstance(fields, dict) else [(part, fields)])
    }


BYTES = 320  # pad, eos, unknown and 256 bytes, rounded up to a multiple of 64

THREE_B = MirasolConfig()

BASE = MirasolConfig(
    encoder=EncoderConfig(dim=768, layers=12, heads=12, mlp_dim=3072),
    combiner=CombinerConfig(layers=4, heads=12, mlp_dim=3072),
    latent=LatentConfig(layers=12, heads=12, mlp_dim=3072),
    text=TextConfig(dim=768, layers=12, heads=12, mlp_dim=3072),
    losses=LossConfig(layers=2, heads=12, mlp_dim=3072),
)

SMALL = MirasolConfig(
    video=VideoConfig(size=112),
    encoder=EncoderConfig(dim=384, layers=4, heads=6, mlp_dim=1536),
    combiner=CombinerConfig(tokens=16, layers=3, heads=6, mlp_dim=1536, memory=64),
    latent=LatentConfig(layers=3, heads=6, mlp_dim=1536),
    text=TextConfig(vocabulary=BYTES, dim=384, layers=4, heads=6, mlp_dim=1536),
    losses=LossConfig(layers=1, heads=6, mlp_dim=1536),
)

TINY = MirasolConfig(
    video=VideoConfig(frames=4, size=32),
    audio=AudioConfig(mel_bins=32),
    encoder=EncoderConfig(dim=64, layers=2, heads=4, mlp_dim=128),
    combiner=CombinerConfig(tokens=4, layers=2, heads=4, mlp_dim=128, memory=8, bottleneck=16),
    latent=LatentConfig(layers=2, heads=4, mlp_dim=128),
    text=TextConfig(vocabulary=BYTES, dim=64, layers=2, heads=4, mlp_dim=128),
    losses=LossConfig(
        layers=1,
        heads=4,
        mlp_dim=128,
        video_size=(2, 16, 16),
        video_patch=(2, 8, 8),
        audio_size=(4, 16),
        audio_patch=(4, 8),
    ),
)

PRESETS = {"tiny": TINY, "small": SMALL, "base": BASE, "3b": THREE_B}

__all__ = [
    "AudioConfig",
    "CombinerConfig",
    "EncoderConfig",
    "LatentConfig",
    "LossConfig",
    "MirasolConfig",
    "TextConfig",
    "VideoConfig",
    "replace",
]
