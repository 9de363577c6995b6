"""Where the model meets the outside: saved and loaded, and everything that it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from mirasol_model import Mirasol
from tests.model.clips import clip, model, tiny, words


def test_saved_and_loaded(tmp_path):
    made = model("ttm", dtype=torch.float32)
    made.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    again = Mirasol.from_pretrained(tmp_path)
    assert again.config == made.config and not again.training
    video, audio = clip(8, dtype=torch.float32)
    assert torch.equal(again.encode(video, audio).latents, made.encode(video, audio).latents)
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "config.json").read_text() == (tmp_path / "config.json").read_text()

    tuned = replace(made.config, recompute="snippet", losses=replace(made.config.losses, text=10.0))
    assert Mirasol.from_pretrained(tmp_path, config=tuned).config == tuned


def test_a_checkpoint_of_another_model_does_not_load(tmp_path):
    made = model("current", dtype=torch.float32)
    made.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"from_pretrained: config: .* combiner.context 'all' \(not 'current'\)"):
        Mirasol.from_pretrained(tmp_path, config=tiny("all"))
    values = json.loads((tmp_path / "config.json").read_text())
    values["combiner"]["kind"] = "ttm"
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(RuntimeError, match="Missing key"):
        Mirasol.from_pretrained(tmp_path)
    values["combiner"]["speed"] = 1
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config: combiner: expected only .*, got speed"):
        Mirasol.from_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"from_pretrained: expected a config.json in .*, found none"):
        Mirasol.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"video": None, "audio": None}, ValueError, "Mirasol: video, audio: expected at least one of them"),
        ({"video": torch.rand(2, 8, 32, 32)}, ValueError, r"video: expected \(B, 3, frames, H, W\), got \(2, 8"),
        ({"video": torch.ones(2, 3, 8, 32, 32).long()}, TypeError, "video: expected floating point .*int64"),
        ({"video": torch.rand(2, 3, 0, 32, 32)}, ValueError, r"video: expected \(B, 3, frames, H, W\), got \(2, 3, 0"),
        ({"audio": torch.rand(2, 1, 100)}, ValueError, r"audio: expected \(B, samples\), got \(2, 1, 100\)"),
        ({"audio": torch.ones(2, 100).short()}, TypeError, "audio: expected floating point"),
        ({"audio": torch.rand(3, 100)}, ValueError, "audio: expected 2 rows like video, got 3"),
        ({"video": None}, ValueError, "frames: expected the number of video frames that the audio lasts"),
        ({"frames": [8]}, ValueError, "frames: expected 2, one per row, got 1"),
        ({"frames": [8, 9]}, ValueError, r"frames: expected 1 .. 8, got \[8, 9\]"),
        ({"frames": [8, 0]}, ValueError, r"frames: expected 1 .. 8, got \[8, 0\]"),
        ({"frames": [8, 2.5]}, TypeError, "frames: expected integers"),
        ({"has_audio": [True]}, ValueError, "has_audio: expected 2, one per row, got 1"),
        ({"audio": None, "has_audio": [True, False]}, ValueError, "has_audio: expected no row to have any"),
        ({"video": None, "frames": 8, "has_audio": [1, 0]}, ValueError, "has_audio: expected every row to"),
        ({"text": torch.ones(2, 6)}, TypeError, "text: expected an int64 tensor, got torch.float32"),
        ({"text": np.ones((2, 6), np.int64)}, TypeError, "text: expected an int64 tensor, got ndarray"),
        ({"text": words(3)}, ValueError, r"text: expected \(2, L\) with L at least 1, got \(3, 6\)"),
        ({"text": words(2) + 320}, ValueError, "text: expected tokens 0 .. 319, got"),
        ({"labels": words(2, 5)}, ValueError, r"labels: expected \(2, 6\) like text, got \(2, 5\)"),
        ({"labels": words(2) - 1000}, ValueError, r"labels: expected -100 or tokens 0 .. 319, got -\d+ .. -\d+"),
        ({"labels": torch.full((2, 6), -1)}, ValueError, r"labels: expected -100 or tokens 0 .. 319, got -1 .. -1"),
        ({"text": words(2) - 1000}, ValueError, r"text: expected tokens 0 .. 319, got -\d+ .. -\d+"),
        ({"video": np.zeros((2, 3, 8, 32, 32))}, TypeError, "video: expected a tensor or None, got ndarray"),
        ({"audio": [0.0]}, TypeError, "audio: expected a tensor or None, got list"),
        ({"video": torch.empty(2, 3, 8, 32, 32, device="meta")}, ValueError, "video: expected .* cpu .*, got .* meta"),
        ({"audio": torch.empty(2, 5120, device="meta")}, ValueError, "audio: expected .* cpu like .*, got .* meta"),
        ({"text": words(2).to("meta")}, ValueError, "text: expected a tensor on cpu like the model, got one on meta"),
        ({"labels": words(2).to("meta")}, ValueError, "labels: expected a tensor on cpu like the model, got .* meta"),
        ({"text": None, "labels": words(2)}, ValueError, r"labels: expected None without text, got \(2, 6\)"),
    ],
)
def test_what_does_not_fit_is_an_error(change, error, message):
    video, audio = clip(8, 2, dtype=torch.float32)
    call = {"video": video, "audio": audio, "text": words(2), **change}
    with pytest.raises(error, match=message):
        model(dtype=torch.float32)(**call)


def test_the_other_ways_in_refuse_it_too():
    made, (video, audio) = model(dtype=torch.float32), clip(4, dtype=torch.float32)
    for call, name in (
        (made.encode, "encode"),
        (lambda *clip: made.generate(*clip, words(1)), "encode"),
        (made.stream(window=2).push, "stream.push"),
    ):
        with pytest.raises(
            ValueError, match=f"{name}: video: expected a tensor on cpu like the model, got one on meta"
        ):
            call(video.to("meta"), audio)
        with pytest.raises(TypeError, match=f"{name}: audio: expected a tensor or None, got ndarray"):
            call(video, audio.numpy())
    with pytest.raises(ValueError, match="generate: prompt: expected a tensor on cpu like the model, got one on meta"):
        made.generate(video, audio, words(1).to("meta"))


def test_counts_may_be_arrays():
    made, (video, audio) = model(dtype=torch.float32), clip(8, 2, dtype=torch.float32)
    frames, has_audio = [8, 5], [True, False]
    expected = made.encode(video, audio, frames=frames, has_audio=has_audio).latents
    got = made.encode(video, audio, frames=np.array(frames), has_audio=np.array(has_audio)).latents
    assert torch.equal(got, expected)


def test_labels_may_be_hidden():
    made, text = model(dtype=torch.float32), words(2)
    made(*clip(4, 2, dtype=torch.float32), text, labels=text.masked_fill(text > 100, -100))
    made(*clip(4, 2, dtype=torch.float32), text, labels=torch.full_like(text, -100))
