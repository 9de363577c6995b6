"""Whom the sweep compares the model with: itself compiled, and somebody else's model in an environment of its own."""

from __future__ import annotations

import contextlib
import json
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("tqdm", reason="tqdm draws the bar")

from benchmarks import harness, mirasol_pytorch, sweep, whole

# Only what is asked of it: the shapes that the real one asserts, and a loss.
FAKE = """
import torch
class Mirasol(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.s, self.scale = settings, torch.nn.Parameter(torch.ones(3))
    def forward(self, video, audio, text, return_loss):
        print("to the errors")
        s = self.s
        assert video.shape[2] % s["video_frames_per_timechunk"] == 0 and video.shape[3] == s["video_image_size"]
        columns = s["audio_time_dim_per_timechunk"]
        assert audio.shape[1:] == (s["audio_freq_dim"], columns**2) and columns % s["audio_patch_size"][1] == 0
        assert columns >= video.shape[2] // s["video_frames_per_timechunk"]
        assert torch.is_grad_enabled() == return_loss
        return self.scale.sum()
"""


@pytest.fixture
def installed(tmp_path, monkeypatch):
    (tmp_path / "mirasol_pytorch.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.parametrize("preset", ["small", "base"])
@pytest.mark.parametrize("frames", [16, 128, 512, 2048])
def test_it_is_built_like_ours(preset, frames):
    config = whole.configure(preset, "current")
    video, audio = whole.tokens_of(config)
    made = mirasol_pytorch.settings(config, frames, video, audio)
    patch, time = made["video_patch_size"]
    tokens = (made["video_image_size"] // patch) ** 2 * (config.video.frames // time)
    assert made["video_image_size"] % patch == config.video.frames % time == 0 and 0.5 < tokens / video < 2
    high, wide = made["audio_patch_size"]
    columns = made["audio_time_dim_per_timechunk"]
    assert columns % wide == 0 and columns // wide * (made["audio_freq_dim"] // high) == audio
    assert columns >= frames // config.video.frames
    assert made["dim"] % 12 == 0  # its position embedding of three axes


@pytest.fixture
def quick(monkeypatch):
    """Memory, which takes a process each, and ceilings are test_sweep's."""
    monkeypatch.setattr(harness, "peak_memory", lambda prepare, job, device: (harness.Memory(1, 2), 7))
    monkeypatch.setattr(harness, "ceilings", lambda device: {"gemm float32": 1e11, "copy": 1e10})


@pytest.mark.parametrize("train", [False, True])
def test_in_the_sweep(installed, quick, train, tmp_path):
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "4", "8", "--combiner", "current", "token_learner"]
    arguments += ["--mirasol-pytorch", sys.executable, "--out", str(tmp_path)] + ["--train"] * train
    assert sweep.main(arguments) == 0
    report = json.loads((tmp_path / "sweep.json").read_text())
    theirs = [row for row in report["rows"] if row["backend"] == mirasol_pytorch.NAME]
    assert [(row["combiner"], row["frames"]) for row in theirs] == [("current", 4), ("current", 8)]
    for row in theirs:
        assert row["parameters"] == 3 and row["error"] is None and row["seconds"] > 0
        assert row["peak_bytes"] >= row["step_bytes"] >= 0
    ours = [row for row in report["rows"] if row["backend"] == "native"]
    assert all(row["speed_up"] > 0 and row["limit"] >= row["speed_up"] * (1 - 1e-9) for row in ours)
    assert report["clip"] == "noise" and report["sound"]


def test_a_sweep_in_pieces(quick, tmp_path, capsys):
    def rows(*arguments):
        assert sweep.main(["--preset", "tiny", "--clip", "noise", "--out", str(tmp_path), *arguments]) == 0
        return json.loads((tmp_path / "sweep.json").read_text())["rows"]

    first = rows("--frames", "4", "--combiner", "current")
    more = rows("--frames", "4", "8", "--combiner", "token_learner", "current", "--resume")
    assert more[: len(first)] == first  # not measured again
    known = [row["backend"] for row in first]
    pieces = [("current", 4), ("token_learner", 4), ("token_learner", 8), ("current", 8)]
    assert [(r["combiner"], r["frames"], r["backend"]) for r in more] == [(*p, name) for p in pieces for name in known]
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["combiners"] == ["current", "token_learner"]
    report["rows"] = report["rows"][1:]  # half a size: its candidates did not take turns with these
    (tmp_path / "sweep.json").write_text(json.dumps(report))
    again = rows("--frames", "4", "--combiner", "current", "--resume")
    assert len(again) == len(more) and [row["backend"] for row in again[-len(known) :]] == known
    capsys.readouterr()
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "4", "--train", "--resume", "--out", str(tmp_path)]
    assert sweep.main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("sweep: --resume: ") and "expected train True, got False" in said.err
    assert len(rows("--frames", "4")) == len(known)  # anew without --resume


def test_what_goes_wrong_there_is_said_here(installed):
    other = mirasol_pytorch.start(sys.executable, 1)
    try:
        with pytest.raises(RuntimeError, match="KeyError: 'audio_time_dim_per_timechunk'"):
            mirasol_pytorch.There(other, {}, 8, 5, False)
    finally:
        other.close()


def test_a_size_that_fails_is_a_note(quick, monkeypatch, tmp_path):
    measured = sweep.measure

    def fails(clip, models, jobs, *rest):
        if jobs[0].frames == 4:
            raise RuntimeError("CUDA error: an illegal memory access")
        return measured(clip, models, jobs, *rest)

    monkeypatch.setattr(sweep, "measure", fails)
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "4", "8", "--out", str(tmp_path)]
    with pytest.raises(RuntimeError, match="illegal"):
        sweep.main(arguments)
    assert sweep.main([*arguments, "--keep-going"]) == 0
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert {row["frames"] for row in report["rows"]} == {8}
    assert report["notes"] == ["FAILED all, 4 frames: RuntimeError: CUDA error: an illegal memory access"]
    monkeypatch.setattr(sweep, "serving", lambda *_: (_ for _ in ()).throw(Exception("no kernel")))
    assert sweep.main([*arguments, "--keep-going"]) == 0
    assert json.loads((tmp_path / "sweep.json").read_text())["notes"] == ["FAILED all: Exception: no kernel"]


def test_what_users_get_where_triton_refuses(quick, monkeypatch, tmp_path):
    """As on a GPU, where it refuses an op of some models; here it refuses all, and the automatic choice is native."""
    monkeypatch.setitem(sweep.BACKENDS, "cpu", ("triton", "reference"))
    assert sweep.main(["--preset", "tiny", "--clip", "noise", "--frames", "8", "4", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "sweep.json").read_text())
    rows = [(row["frames"], row["backend"]) for row in report["rows"]]
    assert rows == [
        (frames, name) for frames in (8, 4) for name in ("automatic", "reference")
    ]  # in the order asked for
    assert len(report["notes"]) == 1 and "backend 'triton' refuses this call: " in report["notes"][0]


def test_seconds_in_ops_on_a_gpu(monkeypatch):
    """What an op calls is within its time: counted once."""
    times = {"mirasol_cuda::a_fwd": 5e6, "mirasol_cuda_raw::a_fwd": 5e6, "mirasol_triton::b_fwd": 2e6, "aten::mm": 9e6}
    events = [SimpleNamespace(key=key, device_time_total=time) for key, time in times.items()]
    profiler = contextlib.nullcontext(SimpleNamespace(key_averages=lambda: events))
    monkeypatch.setattr(torch.profiler, "profile", lambda activities: profiler)
    assert whole.seconds_in_ops(lambda: None, "cuda") == 7


def test_the_compiled_reference(quick, monkeypatch, tmp_path):
    """Traced as it is, but not through Inductor, which takes a minute for this."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "8", "--compile", "--out", str(tmp_path)]
    assert sweep.main(arguments) == 0
    rows = {row["backend"]: row for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]}
    assert rows["compiled"]["error"] < 1e-3 and rows["compiled"]["step_bytes"] >= 0
    assert "speed_up" not in rows["compiled"] and "speed_up" not in rows["reference"]


def test_ours_and_the_reference_recomputing(quick, tmp_path, capsys):
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "8", "--recompute", "--out", str(tmp_path)]
    assert sweep.main(arguments) == 2 and "--recompute: expected with --train" in capsys.readouterr().err
    assert sweep.main([*arguments, "--train"]) == 0
    rows = {row["backend"]: row for row in json.loads((tmp_path / "sweep.json").read_text())["rows"]}
    assert list(rows) == ["native", "reference", "native, recomputing", "reference, recomputing"]
    assert all(row["error"] < 1e-3 for row in rows.values()) and rows["native, recomputing"]["speed_up"] > 0


def test_half_precision_and_other_snippets(quick, tmp_path):
    arguments = ["--preset", "tiny", "--clip", "noise", "--frames", "8", "--dtype", "bfloat16", "--snippet", "8"]
    assert sweep.main([*arguments, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "sweep.json").read_text())
    assert report["dtype"] == "bfloat16" and {row["snippet"] for row in report["rows"]} == {8}
    assert all(1e-5 < row["error"] < 0.5 for row in report["rows"])


def test_noise_is_a_clip_of_any_length():
    config = whole.configure("tiny", "all")
    clip = whole.load(whole.NOISE, config, 700)
    assert clip.video.shape == (3, 700, config.video.size, config.video.size) and clip.fps == 25
    assert clip.audio.shape == (700 * config.audio.sample_rate // 25,)
    again = whole.load(whole.NOISE, config, 700)
    assert torch.equal(clip.video, again.video) and torch.equal(clip.audio, again.audio)
