"""mirasol-pytorch 0.0.16 on the clips of `benchmarks.needle`, as large as `tiny`; x-transformers must be 1.26 to 1.28.

What it must be spared: its loss wants spectrograms even where encoded sound is given, hence logits and our own loss; it
masks snippets in evaluation too, hence a mask probability of 0; widths must be multiples of 12, hence 72 and not 64;
its decoder turns 32 channels of a head, hence 2 heads of 32 and not 4 of 16.
"""

from __future__ import annotations

from typing import Any

import torch
from mirasol_pytorch import Mirasol
from mirasol_pytorch.mirasol_pytorch import posemb_sincos_nd
from torch import Tensor, nn

from benchmarks.needle import Batch, at_last
from mirasol_model.audio import LogMel
from mirasol_model.config import BYTES

SNIPPET, SIZE, DIM, MELS, STEPS = 4, 32, 72, 16, 8  # frames; pixels; width; mel bins; spectrogram frames of a snippet
LAYER = {"depth": 2, "heads": 2, "attn_dim_head": 32, "ff_mult": 2}


class Peer(nn.Module):
    """mended=False: sound goes in as its documentation says. Its chunks of sound are then interleaved, so it runs only
    where a clip has as many snippets as a snippet has spectrogram frames, and refuses others with an AssertionError.
    mended=True: its own encoder is given the sound snippet by snippet, for clips of any length."""

    def __init__(self, *, mended: bool):
        super().__init__()
        self.mended = mended
        self.log_mel = LogMel(4000, 25, 19.25, MELS)
        self.model = Mirasol(
            dim=DIM,
            num_text_tokens=BYTES,
            text_max_seq_len=16,
            video_image_size=SIZE,
            video_frames_per_timechunk=SNIPPET,
            audio_freq_dim=MELS,
            audio_time_dim_per_timechunk=STEPS,
            audio_patch_size=(8, 4),
            video_patch_size=(16, SNIPPET),
            audio_encoder=LAYER,
            video_encoder=LAYER,
            encoder_depth=2,
            decoder_depth=2,
            combiner_depth=2,
            combiner_output_num_tokens=4,
            attn_dim_head=32,
            attn_heads=2,
            attn_layers_kwargs={"ff_mult": 2, "attn_dim_head": 32},  # attn_dim_head alone does not reach its layers
            audio_video_mask_prob=0.0,
            text_forgetful_causal_mask_prob=0.0,
        )
        # All questions of a clip read what was encoded once.
        self.model.decoder.register_forward_pre_hook(_repeat_context, with_kwargs=True)

    def forward(self, batch: Batch) -> Tensor:
        """-> logits of the answers (B, K, vocabulary)"""
        clips, samples = batch.audio.shape
        snippets = batch.video.shape[2] // SNIPPET
        mel = self.log_mel(batch.audio.view(clips * snippets, samples // snippets))  # (B*T, STEPS, MELS)
        if self.mended:
            sound = {"encoded_audio": self._encode(mel.mT).unflatten(0, (clips, snippets))}
        else:
            sound = {"audio": mel.view(clips, -1, MELS).mT}  # (B, MELS, T*STEPS)
        logits = self.model(video=batch.video / 255, text=batch.text.flatten(0, 1), return_loss=False, **sound)
        return at_last(logits, batch.lengths + 1)  # it puts a token in front

    def _encode(self, mel: Tensor) -> Tensor:
        """(N, MELS, STEPS) -> (N, n, d), as its forward does it to a chunk."""
        model = self.model
        tokens = model.to_audio_tokens(model.to_timechunked_audio(mel))  # (N, mel patches, time patches, d)
        tokens = tokens.flatten(1, 2) + posemb_sincos_nd(tokens)
        registers = model.audio_register_tokens
        encoded = model.audio_encoder(torch.cat([registers.expand(len(mel), -1, -1), tokens], dim=1))
        return encoded[:, len(registers) :]


def _repeat_context(decoder: nn.Module, inputs: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    context, rows = named["context"], len(inputs[0])
    return inputs, named | {"context": context.repeat_interleave(rows // len(context), 0)}
