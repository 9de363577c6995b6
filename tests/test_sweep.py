"""The main job, small: the sweep's table, files and errors."""

import contextlib
import json
import os
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

pytest.importorskip("av", reason="PyAV reads the clip")
pytest.importorskip("matplotlib", reason="matplotlib draws the plot")

from benchmarks import harness, sweep

ROOT = harness.ROOT


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """`python -m benchmarks.sweep` on a terminal -> what it printed and showed, its folder, its report."""
    folder = tmp_path_factory.mktemp("sweep")
    out = folder / "new" / "folder"
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.sweep",
        "--preset",
        "tiny",
        "--frames",
        "16",
        "8",
        "8",
        "--train",
        "--out",
        str(out),
    ]
    terminal, screen = os.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    with open(folder / "printed", "w") as printed:
        environment = {**os.environ, "MIRASOL_COMMIT": "a plain copy"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=printed, stderr=screen, env=environment)
    os.close(screen)
    shown = b""
    with contextlib.suppress(OSError):  # Linux ends the reading with an error once the other side is closed
        while piece := os.read(terminal, 4096):
            shown += piece
    os.close(terminal)
    assert process.wait() == 0, shown.decode()
    return (folder / "printed").read_text(), shown.decode(), out, json.loads((out / "sweep.json").read_text())


def test_table(run):
    printed, shown, out, report = run
    lines = printed.splitlines()
    rows = [line.split() for line in lines if line.split()[:1] in (["8"], ["16"])]
    assert [row[:3] for row in rows] == [[str(r["frames"]), r["combiner"], r["backend"]] for r in report["rows"]]
    assert lines[-1] == f"wrote {out / 'sweep.json'} and {out / 'sweep.png'}"
    assert "16 frames, all" in shown and "100%" in shown  # the progress bar


def test_report(run):
    *_, report = run
    rows = report["rows"]
    assert report["machine"]["commit"] == "a plain copy" and report["machine"]["threads"] >= 1
    assert report["clip"] == "sample.mp4" and report["sound"] and report["fps"] == 25
    assert report["ceilings"]["gemm float32"] > 1e9 and report["ceilings"]["copy"] > 1e8
    assert {(row["frames"], row["backend"]) for row in rows} >= {(8, "reference"), (16, "reference")}
    assert len({row["parameters"] for row in rows}) == 1
    for row in rows:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["rounds"] >= harness.LEAST_ROUNDS
        assert 0 < row["step_bytes"] < row["peak_bytes"]
        assert 0 < row["error"] < 1e-3  # a wrong kernel shows as 1, single precision as 1e-6; kernels' tests judge


def test_report_names_no_host_user_or_path(run):
    text = json.dumps(run[3])
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(ROOT) not in text


def test_a_backend_that_refuses_says_why(run):
    *_, report = run
    ran = {row["backend"] for row in report["rows"]}
    for backend in {"native", "reference"} - ran:
        assert any(f"backend '{backend}' refuses this call: " in note for note in report["notes"])


def test_picture(run):
    from matplotlib import image

    picture = image.imread(run[2] / "sweep.png")
    assert picture.shape[1] > 1000 and picture[..., 3].max() == 1  # drawn, on a transparent ground


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--clip", "missing.mp4"], "sweep: [Errno 2] No such file or directory: 'missing.mp4'"),
        (["--clip", "{words}"], "sweep: {words}: cannot be read as video: Invalid data found when processing input"),
        (["--frames", "16", "100000"], "sample.mp4: only 640 frames, expected 100000"),
        (["--out", "{words}"], "sweep: [Errno 17] File exists: '{words}'"),
    ],
)
def test_one_line_for_what_cannot_be_read(arguments, message, tmp_path, capsys):
    words = tmp_path / "words.mp4"
    words.write_text("not a video\n" * 100)
    code = sweep.main(["--preset", "tiny", "--out", str(tmp_path / "out"), *(a.format(words=words) for a in arguments)])
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and len(said.err.splitlines()) == 1
    assert message.format(words=words) in said.err


@pytest.mark.parametrize("arguments", [["--frames", "0"], ["--frames", "x"], ["--preset", "huge"], ["--combiner", "x"]])
def test_arguments(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        sweep.main(arguments)
    assert caught.value.code == 2 and arguments[0] in capsys.readouterr().err


# The harness


def test_interleave_takes_turns():
    calls = []
    timings = harness.interleave({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, warmup=0)
    assert "".join(calls) == "abcbcacab" + "abc"
    assert all(t.rounds == 4 and t.low <= t.median <= t.high for t in timings.values())
    assert harness.interleave({"a": lambda: None}, rounds=50, warmup=0, budget=0)["a"].rounds == harness.LEAST_ROUNDS


def test_a_clock_may_settle_first():
    calls = []
    assert harness.clock(lambda: calls.append(1)) >= 0 and len(calls) == 1
    harness.clock(lambda: calls.append(1), settle=1e-9)  # however short, one untimed call
    assert len(calls) == 3
    assert harness.clock(lambda: time.sleep(0.02), settle=0.05) < 0.05  # of one call, not of all
    timings = harness.interleave({"a": lambda: calls.append(2)}, rounds=3, warmup=0, settle=1e-9)
    assert timings["a"].rounds == 3 and len(calls) == 3 + 6


def test_summary_is_median_and_tenths():
    assert harness.summary([float(i) for i in range(20, -1, -1)]) == harness.Timing(10, 2, 18, 21)
    assert harness.summary([3.0]) == harness.Timing(3, 3, 3, 1)


def _allocate(megabytes):
    import torch

    def work():
        torch.ones(megabytes * 2**18).sum()
        return os.getpid()

    return work


def _fail():
    raise ValueError("no")


def _die():
    return lambda: os._exit(9)


def test_peak_memory_is_that_of_a_fresh_process():
    import torch

    ballast = torch.ones(2**27)  # 512 MB here must not show there
    memory, process = harness.peak_memory(_allocate, 200)
    assert process != os.getpid() and ballast.nbytes > memory.before
    assert 200e6 < memory.peak - memory.before < 300e6


def test_peak_memory_says_what_went_wrong():
    with pytest.raises(RuntimeError, match="peak_memory: ValueError: no"):
        harness.peak_memory(_fail)
    with pytest.raises(RuntimeError, match="peak_memory: the process ended with code 9"):
        harness.peak_memory(_die)


def test_commit_of_a_plain_copy(monkeypatch):
    monkeypatch.setenv("MIRASOL_COMMIT", "abc")
    assert harness.commit() == {"commit": "abc", "dirty": None}
    monkeypatch.delenv("MIRASOL_COMMIT")
    monkeypatch.setattr(harness, "ROOT", Path("/"))
    assert harness.commit() == {"commit": None, "dirty": None}
