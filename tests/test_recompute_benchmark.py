"""The benchmark of a training step's memory, small: its table and file, and that it counts what it says."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("av", reason="the sweep, whose Combiners it takes, reads a clip")

import torch
from torch.utils._pytree import tree_map

from benchmarks import harness, recompute
from benchmarks.rank_step import Live
from benchmarks.whole import configure
from mirasol_model import Mirasol, MirasolConfig
from tests.model.clips import clip, model, words


def test_table_and_file(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MIRASOL_COMMIT", "a plain copy")
    arguments = ["--preset", "tiny", "--frames", "8", "64", "--combiner", "current", "--out", str(tmp_path / "new")]
    assert recompute.main(arguments) == 0
    text = (tmp_path / "new" / "recompute.json").read_text()
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(harness.ROOT) not in text
    rows = json.loads(text)["rows"]
    assert [(row["recompute"], row["frames"]) for row in rows] == [
        (how, n) for how in ("none", "snippet") for n in (8, 64)
    ]
    taken = {(row["recompute"], row["frames"]): row["step_bytes"] for row in rows}
    assert taken["none", 64] > taken["snippet", 64] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split()[-6:] == ["8", "64", "growth", "beyond", "k,", "v"]
    assert printed[2].startswith("current       snippet")


def test_growth_is_told_with_and_without_keys_and_values(capsys):
    row = {"combiner": "all", "recompute": "snippet"}
    rows = [row | {"frames": n, "step_bytes": n * 10**7, "past_bytes": n * 10**6 - 4 * 10**6} for n in (8, 16)]
    assert recompute.show(iter(rows), (8, 16)) == rows
    assert capsys.readouterr().out.splitlines()[1].split() == ["all", "snippet", "80", "160", "2.00", "1.95"]


@pytest.mark.parametrize("combiner", ["current", "all"])
def test_what_must_grow(combiner):
    config = configure("tiny", combiner)
    made = Mirasol(config)
    clip = torch.rand(1, 3, 8, 32, 32), torch.rand(1, 8 * 640)
    _, state = made.step(made._read("test", *clip, None, None), None)
    with torch.no_grad():
        x = made.encode(*clip).combined
    assert recompute.compact_bytes(config, 8) == x.nbytes
    kept = sum(t.nbytes for piece in state.layers for pair in piece for t in pair) if state else 0
    assert recompute.past_bytes(config, 8) == kept


def test_context_all_keeps_the_input_of_each_layer_and_the_attention_of_one():
    """All bytes of a step that are alive at a time, in copies of all tokens: the inputs of the 4 layers of 5 of which
    all tokens leave; of one layer the gradient of its residual, its normed input, q, k, v, their result, and the
    gradients of these four. Recomputed snippet by snippet, 5 layers' keys, values and gradients alone would be 20."""
    layers, least, most = 5, 64, 256
    made = model("all", dtype=torch.float32, recompute="snippet", combiner={"layers": layers}).train()
    peak = {}
    for frames in (least, most):
        text, (video, audio) = words(1), clip(frames, dtype=torch.float32)
        for p in made.parameters():
            p.grad = torch.zeros_like(p)
        live = Live({})
        tree_map(live.note, [video, audio, *((p, p.grad) for p in made.parameters())])
        known = live.now
        with live:
            made(video, audio, text, labels=text).loss.backward()
        peak[frames] = max(live.peaks.values()) - known
    added = recompute.past_bytes(made.config, most) - recompute.past_bytes(made.config, least)
    copies = (peak[most] - peak[least]) / (added / (2 * layers))
    assert 3 < copies <= layers - 1 + 10, copies


def test_a_step_leaves_gradients_and_nothing_else():
    model = Mirasol(MirasolConfig.preset("tiny"))
    assert recompute.step_of(model, 8, "cpu")() is None
    assert model.text.embed.weight.grad.any()
