"""Every example runs, at a tiny size, as its first lines say that it is called."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("av", reason="PyAV reads the clips")
pytest.importorskip("tensorboard", reason="runs are logged to TensorBoard")

from mirasol_model import Mirasol, MirasolConfig
from mirasol_model.media import MediaError
from tests.model.media_files import write

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLE = str(EXAMPLES / "sample.mp4")


@pytest.fixture
def example(monkeypatch, capsys):
    """Run one -> the lines that it printed."""

    def run(name: str, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run


def test_ask(example, tmp_path):
    lines = example("ask.py", SAMPLE, "--preset", "tiny", "--frames", "8", "--most", "4", "--ask", "one?", "two?")
    assert lines[0] == "sample.mp4: 8 frames are 8 tokens"
    assert [line.split()[0] for line in lines[1:]] == ["one?", "two?"]
    assert all(len(line) > len("one? ") for line in lines[1:])


def test_ask_shows_a_clip_as_fast_as_training_did(example, tmp_path):
    clip = str(write(tmp_path / "fast.mp4", frames=10, fps=50))
    ask = ("ask.py", clip, "--preset", "tiny", "--most", "1", "--ask", "one?", "--frames")
    with pytest.raises(MediaError, match=r"fast.mp4: only 5 frames at 25 frames per second, expected 8"):
        example(*ask, "8")
    assert example(*ask, "4")[0] == example(*ask, "4", "--fps", "50")[0] == "fast.mp4: 4 frames are 4 tokens"


def test_live(example, tmp_path):
    clip = str(write(tmp_path / "clip.mp4", frames=50, sound={"codec": "aac", "rate": 16_000}))
    lines = example("live.py", clip, "--preset", "tiny", "--speed", "50", "--every", "3", "--window", "4")
    kept = [re.fullmatch(r" *([\d.]+) s, ([\d.]+) MB kept: What is heard\? .*", line) for line in lines[:-1]]
    assert [match[1] for match in kept] == ["0.5", "1.0", "1.4", "1.9"]
    assert len({match[2] for match in kept[1:]}) == 1  # from four snippets on
    assert lines[-1].startswith("12 snippets, 48 frames; at most ")


def test_live_without_sound_and_with_a_model_of_its_own_words(example, tmp_path):
    """A folder with a tokenizer.json is asked in its words, one without byte by byte."""
    from tokenizers import Tokenizer, models

    clip = str(write(tmp_path / "clip.mp4", frames=10))
    Mirasol(MirasolConfig.preset("tiny")).save_pretrained(tmp_path / "model")
    live = ("live.py", clip, "--model", str(tmp_path / "model"), "--speed", "50", "--every", "1", "--window", "4")
    ask = ("ask.py", clip, "--model", str(tmp_path / "model"), "--frames", "8", "--ask", "one?")
    assert example(*live)[-1].startswith("2 snippets, 8 frames") and example(*ask)[-1].startswith("one?")
    words = ["<pad>", "</s>", *(f"word{i}" for i in range(318))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="word0"))
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    answers = [re.fullmatch(r".*\? '(.*)'", line)[1] for line in example(*live)[-3:-1]]
    assert len(answers) == 2 and all(re.fullmatch(r"(word\d+ ?)+", answer) for answer in answers)
    assert re.fullmatch(r"one\? (word\d+ ?)+", example(*ask)[-1])


def test_live_reads_what_the_whole_clip_is():
    """The same sound, cut to the same snippets; pictures as they are."""
    import torch

    from mirasol_model.media import read_clip

    snippets = runpy.run_path(str(EXAMPLES / "live.py"))["snippets"]
    clip = read_clip(SAMPLE, frames=40, size=120, sample_rate=16_000)
    parts = snippets(Path(SAMPLE), 8, 25.0, 120, 16_000)
    video, audio = (
        torch.cat(each, dim)
        for each, dim in zip(zip(*(next(parts) for _ in range(5)), strict=True), (2, 1), strict=True)
    )
    assert torch.equal(video[0], (clip.video * 255).round().to(torch.uint8))
    assert (
        audio.shape == (1, len(clip.audio))
        and (audio[0] - clip.audio).square().mean() < 0.01 * clip.audio.square().mean()
    )


def test_finetune_and_ask_what_it_learned(example, tmp_path):
    """A short one; `python examples/finetune.py` answers everything right, in half a minute."""
    folder = tmp_path / "clips"
    lines = example("finetune.py", str(folder), "--clips", "8", "--steps", "4")
    assert re.fullmatch(r"exact match on clips it never saw: \{'all': .*, 'heard': .*, 'seen': .*\}", lines[-1])
    assert {"config.json", "train.jsonl", "test.jsonl", "train-7.mp4", "test-1.mp4", "run"} <= {
        path.name for path in folder.iterdir()
    }
    assert Mirasol.from_pretrained(folder / "run" / "model").config.text == MirasolConfig.preset("tiny").text
    clip = str(folder / "test-0.mp4")
    lines = example("ask.py", clip, "--model", str(folder / "run" / "model"), "--frames", "8", "--ask", "where?")
    assert "test-0.mp4: 8 frames are 8 tokens" in lines


def test_one_kernel(example):
    lines = example("one_kernel.py", "--frames", "4", "--tokens", "8", "--window", "2")
    assert lines[0].startswith("SnippetLayout(uniform 4 x 8, window 2, sink 1")
    same = [re.fullmatch(r".*: mean square ([\d.]+), \d+ ms", line)[1] for line in lines[1:3]]
    assert abs(float(same[0]) - float(same[1])) < 2e-6
    assert float(re.search(r"at most (\S+) of the largest", lines[3])[1]) < 1e-5


def test_make_clip(example, tmp_path):
    lines = example("make_clip.py", str(tmp_path / "clip.mp4"), "--frames", "4")
    assert lines == [f"{tmp_path / 'clip.mp4'}: 4 frames, {(tmp_path / 'clip.mp4').stat().st_size:,} bytes"]
