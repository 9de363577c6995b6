"""`benchmarks.needle`: what it trains and asks, and its files and tables."""

import json
import re

import pytest
import torch
from torch import nn

from benchmarks import needle
from mirasol_model.needle import CHANCE, KINDS, Needle

OURS = [name for name in needle.VARIANTS if not name.startswith("mirasol-pytorch")]


def batch(clips=2):
    data = Needle(clips)
    return needle.collate([data.examples(i) for i in range(clips)])


def test_a_batch_asks_every_question_of_each_clip():
    made, data = batch(), Needle(2)
    assert made.video.shape == (2, 3, 32, 32, 32) and made.audio.shape == (2, 5120)
    for clip in range(2):
        for kind in range(4):
            example = data[4 * clip + kind]
            prompt = made.text[clip, kind, : made.lengths[clip, kind]]
            assert bytes((prompt - 3).tolist()).decode() == example.prompt
            assert chr(made.answers[clip, kind] - 3) == example.answer


@pytest.mark.parametrize("name", OURS)
def test_every_variant_answers_as_its_model_does(name):
    """Encoding once and asking four times is what four calls of the model say."""
    reader, made = needle.VARIANTS[name].build().eval(), batch()
    with torch.no_grad():
        logits = reader(made)
        assert logits.shape == (2, 4, 320)
        for kind in range(4):
            length = int(made.lengths[0, kind])
            audio = made.audio if reader.sound else None
            whole = reader.model(made.video, audio, made.text[:, kind, :length]).logits
            torch.testing.assert_close(logits[:, kind], whole[:, -1])


def test_what_the_ablations_do_without():
    made = batch()
    deaf, blind_to_the_past = (needle.VARIANTS[name].build().eval() for name in ("no-audio", "no-latent"))
    with torch.no_grad():
        assert torch.equal(deaf(made), deaf(made._replace(audio=torch.randn_like(made.audio))))
        encoded = blind_to_the_past.model.encode(made.video, made.audio)
    assert torch.equal(encoded.latents, encoded.combined)
    assert needle.VARIANTS["shifted"].shift == 1


def test_training_is_the_same_every_time():
    one, other = (needle.train(needle.VARIANTS["token_learner"], [32, 64], steps=3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one[0].parameters(), other[0].parameters(), strict=True))
    assert one[1]["steps"] == 3 and one[1]["trained_on"] == [32, 64] and set(one[1]["curve"][0]) > set(KINDS)


class Oracle(nn.Module):
    def forward(self, made):
        if made.video.shape[2] > 32:
            raise AssertionError("too long")
        return torch.nn.functional.one_hot(made.answers, 320).float()


def test_exact_match():
    assert needle.exact_match(Oracle(), 32, 20) == dict.fromkeys(KINDS, 1.0)


def test_main_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    def train(variant, frames, **budget):
        return Oracle(), {"parameters": 1, "steps": 2, "seconds": 3.0, "seconds_per_step": 1.5, "trained_on": [32]}

    monkeypatch.setattr(needle, "train", train)
    common = ["--clips", "4", "--test", "32", "64", "--out", str(tmp_path), "--note", "alone"]
    assert needle.main(["--variants", "ttm", *common]) == 0
    assert needle.main(["--variants", "shifted", *common]) == 0
    report = json.loads((tmp_path / "needle.json").read_text())
    assert [row["variant"] for row in report["rows"]] == ["ttm", "shifted"]
    row = report["rows"][0]
    assert row["exact"] == {"32": dict.fromkeys(KINDS, 1.0)} and row["refused"] == {"64": "AssertionError too long"}
    assert row["note"] == "alone" and row["machine"]["torch"] == torch.__version__
    assert set(row["exact_shifted"]) == {"32"} and "exact_shifted" not in report["rows"][1]
    assert (tmp_path / "needle.png").stat().st_size > 10_000
    text = capsys.readouterr().out
    assert "AssertionError too long" in text and f"{CHANCE['order']:.1%}" in text and "100.0%" in text
    assert needle.main(["--report", str(tmp_path / "needle.json")]) == 0


def test_no_length_that_a_variant_can_read():
    with pytest.raises(ValueError, match=r"frames: expected one of \(32,\), got \[64\]"):
        needle.train(needle.VARIANTS["ttm"]._replace(lengths=(32,)), [64], steps=1)


def test_a_run_replaces_only_its_like(tmp_path, monkeypatch, capsys):
    def train(variant, frames, **budget):
        return Oracle(), {"parameters": 1, "steps": 2, "seconds": 3.0, "seconds_per_step": 1.5, "trained_on": [32]}

    monkeypatch.setattr(needle, "train", train)
    common = ["--variants", "ttm", "--clips", "4", "--test", "32", "--out", str(tmp_path)]
    for more in ([], ["--seed", "1"], ["--minutes", "4"], ["--note", "again"]):
        assert needle.main([*common, *more]) == 0
    rows = json.loads((tmp_path / "needle.json").read_text())["rows"]
    kept = [(1, 1.0, ""), (0, 4.0, ""), (0, 1.0, "again")]
    assert [(row["seed"], row["minutes"], row["note"]) for row in rows] == kept
    assert re.search(r"ttm +1 +1 .*\n.*\nttm +0 +4 .*\n.*\nttm +0 +1 ", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "x"], "--variants: invalid choice: 'x'"),
        (["--clips", "0"], "--clips: expected a positive number"),
        (["--frames", "a"], "--frames: expected a positive number of frames, got 'a'"),
        (["--frames", "32", "66"], "--frames: Needle: frames: expected multiples of snippet 4, at least 32, got 66"),
        (["--test", "30"], "--test: Needle: frames: expected multiples of snippet 4, at least 32, got 30"),
        (["--test", "28"], "--test: Needle: frames: expected multiples of snippet 4, at least 32, got 28"),
        (["--minutes", "0"], "--minutes: expected a positive number of minutes, got '0'"),
        (["--minutes", "nan"], "--minutes: expected a positive number of minutes, got 'nan'"),
        (["--minutes", "inf"], "--minutes: expected a positive number of minutes, got 'inf'"),
        (["--minutes=-1"], "--minutes: expected a positive number of minutes, got '-1'"),
        (["--seed=-3"], "--seed: expected an integer of at least 0, got '-3'"),
    ],
)
def test_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        needle.read(arguments)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "usage: python -m benchmarks.needle" in said and message in said
