"""A training step, part by part, small: nothing is missing and nothing twice, and what is counted is right."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks draw a bar with it")

from benchmarks import harness, parts, whole

BOTH = ("tokens", "encoder", "Combiner", "latent", "text", "losses")


@pytest.fixture(scope="module")
def model():
    return whole.build(whole.configure("tiny", "all"), "cpu")


@pytest.fixture(scope="module")
def clip(model):
    return whole.load(whole.NOISE, model.config, 8)


@pytest.fixture(scope="module")
def counts(model, clip):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    parts.train(model, clip, optimizer, lambda piece: None)
    return parts.count(model, clip, optimizer)


def test_parts_come_in_their_order(model, clip):
    seen = []
    with parts.marked(model, seen.append) as call:
        parts.train(model, clip, torch.optim.AdamW(model.parameters()), seen.append, call)
    order = [piece for piece, _ in itertools.groupby(piece for piece in seen if piece[0] in BOTH)]
    forward = [part for part, direction in order if direction == "forward"]
    assert list(dict.fromkeys(forward)) == list(BOTH)
    assert {part for part, direction in order if direction == "backward"} == set(BOTH)
    first_backward = order.index(("losses", "backward"))
    assert all(direction == "backward" for _, direction in order[first_backward:])
    assert seen.index(("optimizer", "forward")) > max(i for i, (_, d) in enumerate(seen) if d == "backward")
    assert model.encoder.forward.__func__ is type(model.encoder).forward  # as it was before


def test_a_step_is_the_same_with_marks(model, clip):
    def gradients(call):
        return whole.step(model, clip, None, True, call)["gradients"]

    plain = gradients(None)
    with parts.marked(model, lambda piece: None) as call:
        marked = gradients(call)
    assert all(torch.equal(a, b) for a, b in zip(plain, marked, strict=True))


def test_flops_are_those_of_the_modules(model, clip, counts):
    config = model.config.encoder
    video, audio = whole.tokens_of(model.config)
    snippets = 8 // model.config.video.frames
    linear = sum(p.numel() for p in model.encoder.parameters() if p.ndim == 2)
    scores = config.layers * 4 * config.dim * (video**2 + audio**2)  # with the values
    encoder = snippets * (2 * (video + audio) * linear + scores)
    assert counts.flops["encoder", "forward"] == encoder
    backward = 2 * snippets * 2 * (video + audio) * linear + 5 * snippets * scores // 2
    assert counts.flops["encoder", "backward"] == backward
    assert all(counts.flops[part, direction] > 0 for part in BOTH for direction in parts.DIRECTIONS)
    assert sum(counts.flops.values()) == counts.counter.get_total_flops()


def test_bytes_are_what_passes_between_parts(model, clip, counts):
    parameters = sum(p.numel() for p in model.parameters() if p.grad is not None) * 4
    # Parameters, gradients and two moments are read, all but the gradients written.
    assert 7 * parameters <= counts.bytes["optimizer", "forward"] < 7.01 * parameters
    weights = sum(p.numel() for p in model.encoder.parameters()) * 4
    video, audio = whole.tokens_of(model.config)
    passed = 2 * (8 // model.config.video.frames) * (video + audio) * model.config.encoder.dim * 4
    assert counts.bytes["encoder", "forward"] >= weights + passed


def test_stamps_are_the_whole_and_nothing_twice(monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))
    stamps = parts.Stamps("cpu")
    a, b = ("a", "forward"), ("a", "backward")
    for piece in (parts.NOTHING, a, a, parts.NOTHING, parts.OURS, b, a, parts.NOTHING):
        stamps(piece)
    assert stamps.seconds() == {parts.NOTHING: 2, a: 2, b: 1}


def test_stamps_of_a_gpu_are_events(monkeypatch):
    made = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = next(made)

        def elapsed_time(self, later):
            return 1000.0 * (later.at - self.at)  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    stamps = parts.Stamps("cuda")
    for piece in (parts.NOTHING, ("a", "forward"), parts.NOTHING):
        stamps(piece)
    assert stamps.seconds() == {parts.NOTHING: 1, ("a", "forward"): 1}


def row(part, direction, seconds, floor):
    return {"part": part, "direction": direction, "seconds": seconds, "floor": floor, "flops": 1, "bytes": 2}


def test_the_next_factor():
    rows = [row("encoder", "forward", 2.0, 1.0), row("encoder", "backward", 4.0, 1.0), row("text", "forward", 2.0, 3.0)]
    rows.append(row(parts.DECODING, "forward", 4.0, 0.1))  # beside the step
    found = parts.summarise(rows)
    assert found["encoder"]["share"] == 0.75 and found["encoder"]["factor"] == 8 / 4
    assert found["text"]["factor"] == 1 and found["text"]["of_floor"] == 1.5  # faster than this machine's GEMM
    assert found[parts.DECODING]["share"] == 0.5 and "factor" not in found[parts.DECODING]
    assert "backward" not in found["text"] and parts.next_factor(rows).startswith(
        "next: encoder; at its floor the step would be 2.00"
    )


@pytest.mark.parametrize("clip", ["noise", None])
def test_the_command(clip, tmp_path, capsys, monkeypatch):
    if clip is None:
        pytest.importorskip("av", reason="PyAV reads the clip")
    monkeypatch.setattr(harness, "ceilings", lambda device: {"gemm float32": 1e11, "copy": 1e10})
    arguments = ["--preset", "tiny", "--frames", "8", "--combiner", "current", "--seconds", "0", "--out", str(tmp_path)]
    assert parts.main([*arguments, *(["--clip", clip] if clip else [])]) == 0
    (step,) = json.loads((tmp_path / "parts.json").read_text())["steps"]
    rows = {(row["part"], row["direction"]): row for row in step["rows"]}
    assert {(part, direction) for part in BOTH for direction in parts.DIRECTIONS} < rows.keys()
    assert ((parts.DECODING, "forward") in rows) == (clip is None)
    for row in rows.values():
        assert 0 <= row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["rounds"] >= 3
        assert row["floor"] == max(row["flops"] / 1e11, row["bytes"] / 1e10)
    assert step["seconds"] > 0 and step["without_stamps"] > 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"wrote {tmp_path / 'parts.json'}" and printed[-2].startswith("  next: ")


def test_one_line_for_a_clip_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("av", reason="PyAV reads the clip")
    assert parts.main(["--preset", "tiny", "--clip", "missing.mp4", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "parts: [Errno 2] No such file or directory: 'missing.mp4'\n"
