"""`make gpu-check` without a GPU: times of its stages, what it keeps when stopped, whether its commands are right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("tqdm", reason="the benchmarks draw a bar with it")

from benchmarks import gpu_check, gpu_kernels, gpu_stages, harness
from benchmarks.gpu_stages import Stage
from benchmarks.run import OPS, parse, suite
from mirasol_kernels._dispatch import Op

WRITER = """
import json, sys, time
for n in range(1, 100):
    rows = [{"seconds": 1.0}] * n
    open(sys.argv[1], "w").write(json.dumps({"rows": rows, "notes": []}))
    time.sleep(0.1)
"""


def python(name: str, seconds: float, code: str, *arguments: str, **fields) -> Stage:
    return Stage(name, seconds, [sys.executable, "-c", code, *map(str, arguments)], **fields)


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "WORK", tmp_path)
    monkeypatch.setattr(gpu_check, "EVERY", 0.1)
    monkeypatch.setattr(gpu_check, "LEAST", 0.2)
    return tmp_path


def check(stages: list[Stage], seconds: float, work: Path) -> dict:
    """-> what is in the file at the end."""
    report = {"machine": {"cpu": "a", "torch": "b"}, "stages": []}
    gpu_check.check(stages, report, seconds, lambda now: harness.write(now, work / "all.json"))
    found = json.loads((work / "all.json").read_text())
    assert found == json.loads(json.dumps(report))
    return found


def test_a_stage_that_takes_too_long_is_stopped_with_what_it_started(work):
    child = (
        "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)', 'mirasol-child'])"
    )
    start = time.monotonic()
    first, second = check([python("slow", 1.0, child), python("next", 5, "print('here')")], 20, work)["stages"]
    assert time.monotonic() - start < 15
    assert (first["status"], first["code"]) == ("out of time", None) and 0.9 < first["seconds"] < 5
    assert (second["status"], second["code"], second["said"]) == ("passed", 0, "here\n")
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert "mirasol-child" not in commands


def test_what_a_stage_leaves_goes_to_those_after_it(work):
    stages = [python("quick", 30, "pass"), python("long", 0.1, "import time; time.sleep(1)"), python("late", 9, "pass")]
    assert [found["status"] for found in check(stages, 40, work)["stages"]] == ["passed"] * 3
    stages = [python("all of it", 9, "import time; time.sleep(60)"), python("late", 9, "pass")]
    first, second = check(stages, 1, work)["stages"]
    assert first["status"] == "out of time" and (second["status"], second["said"]) == ("skipped", "no time is left")


def test_what_is_measured_is_in_the_file_before_the_stage_ends(work):
    seen, result = [], work / "result.json"
    stage = python("writer", 9, WRITER, str(result), result=result)
    found = gpu_check.run(stage, 2.0, lambda now: seen.append(len((now["result"] or {"rows": []})["rows"])))
    assert found["status"] == "out of time" and len(found["result"]["rows"]) >= max(seen) > 1


def test_a_killed_check_leaves_its_file(tmp_path):
    """As when a machine is taken back: the file holds the stages so far, and what the present one has measured."""
    code = f"""
import sys
from pathlib import Path
from benchmarks import gpu_check, harness
from tests.test_gpu_check import WRITER, python
gpu_check.WORK, gpu_check.EVERY = Path({str(tmp_path)!r}), 0.1
result = gpu_check.WORK / "result.json"
stages = [python("one", 5, "pass"), python("two", 60, WRITER, str(result), result=result)]
report = {{"stages": []}}
gpu_check.check(stages, report, 60, lambda now: harness.write(now, gpu_check.WORK / "all.json"))
"""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", code], cwd=harness.ROOT, stdout=subprocess.DEVNULL
    )
    file, rows = tmp_path / "all.json", []
    while len(rows) < 5 and process.poll() is None:
        time.sleep(0.1)
        stages = json.loads(file.read_text())["stages"] if file.exists() else []
        rows = (stages[1]["result"] or {"rows": []})["rows"] if len(stages) == 2 else []
    process.kill()
    process.wait()
    stages = json.loads(file.read_text())["stages"]
    assert [(stage["name"], stage["status"]) for stage in stages] == [("one", "passed"), ("two", "running")]
    assert len(stages[1]["result"]["rows"]) >= 5


def test_what_is_not_here_is_a_reason(work):
    stages = [Stage("sanitizer", 5, ["none"], missing="there is none"), python("bad", 5, "raise SystemExit('said so')")]
    no = "print('========= Device not supported by this tool'); raise SystemExit(1)"
    stages += [python("refused", 5, no, refusal="Device not supported")]
    skipped, failed, refused = check(stages, 20, work)["stages"]
    assert (refused["status"], refused["said"]) == ("skipped", "Device not supported by this tool")
    assert (skipped["status"], skipped["said"]) == ("skipped", "there is none") and not gpu_check.bad(skipped)
    assert gpu_check.bad(failed) and gpu_check.line(failed).endswith("said so")


ENDS = """
import json, sys
path, trying = sys.argv[1], "--resume" in sys.argv
if not trying:
    open(path, "w").write(json.dumps({"rows": [1], "notes": [], "trying": {"case": "a"}}))
    raise SystemExit(9)
found = json.load(open(path))
assert found["trying"]
open(path, "w").write(json.dumps({"rows": [1, 2], "notes": ["FAILED a"], "trying": None}))
"""


def test_a_stage_whose_process_ends_goes_on_in_another(work):
    result = work / "result.json"
    (found,) = check([python("ends", 20, ENDS, str(result), result=result)], 20, work)["stages"]
    assert (found["status"], found["code"], found["result"]["rows"]) == ("passed", 0, [1, 2])
    assert gpu_check.line(found).endswith("2 timings, 1 FAILED") and gpu_check.bad(found)
    always = ENDS.replace("if not trying", "if True")  # until the time is over, and not longer
    (found,) = check([python("ends", 2, always, str(result), result=result)], 2, work)["stages"]
    assert found["status"] == "failed" and found["seconds"] < 4


def test_a_step_by_parts_has_its_lines():
    row = {"part": "text", "direction": "forward", "seconds": 1.0, "floor": 0.5, "flops": 1, "bytes": 1}
    result = {"steps": [{"frames": 64, "combiner": "all", "rows": [row, row | {"direction": "backward"}]}]}
    stage = {"name": "parts", "status": "passed", "seconds": 1.0, "result": result, "said": ""}
    assert gpu_check.line(stage).endswith("2 timings") and not gpu_check.bad(stage)
    said = gpu_check.table({"machine": {"cpu": "a", "torch": "b"}, "stages": [stage]})
    assert "a training step of 64 frames by parts:" in said and "next: text" in said


def test_layers_have_their_lines():
    row = {"combiner": "all", "part": "latent", "snippets": 8, "seconds": 1e-3, "flops": 10**12}
    rows = [row, row | {"snippets": 64}, row | {"snippets": 16}, row | {"part": "text", "flops": None}]
    result = {"layers_of": "3b", "rows": rows}
    stage = {"name": "layers", "status": "passed", "seconds": 1.0, "result": result, "said": ""}
    assert gpu_check.line(stage).endswith("4 timings") and not gpu_check.bad(stage)
    said = gpu_check.table({"machine": {"cpu": "a", "torch": "b"}, "stages": [stage]}).splitlines()
    assert said[1] == "layers of 3b:" and said[2].endswith(" 64 snippets     1.000 ms  1000.0 TFLOP/s")
    assert said[3].endswith("  8 snippets     1.000 ms") and "text" in said[3]


LOG = """
[gw0] [  1%] PASSED tests/test_every_backend.py::test_budget[op-triton-small case-float32]
[gw1] [  2%] FAILED tests/test_every_backend.py::test_budget[op-triton-b]
tests/ops/test_x.py::test_y SKIPPED (no GPU)                     [ 50%]
tests/ops/test_x.py::test_z PASSED                               [100%]
ERROR tests/model/test_gpu.py - ModuleNotFoundError: No module named 'x'
FAILED tests/test_every_backend.py::test_budget[op-triton-b] - AssertionError
"""


def test_outcomes_of_a_log_that_may_end_anywhere():
    found = gpu_check.outcomes(LOG)
    assert found["counts"] == {"passed": 2, "failed": 1, "skipped": 1, "error": 1}
    assert found["bad"] == ["tests/test_every_backend.py::test_budget[op-triton-b]", "tests/model/test_gpu.py"]
    cut = gpu_check.outcomes(LOG[:200])
    assert cut == {"counts": {"passed": 1, "failed": 1}, "bad": found["bad"][:1]}
    stage = {"name": "tests", "status": "out of time", "seconds": 1.0, "result": cut, "said": ""}
    assert gpu_check.bad(stage) and gpu_check.line(stage).endswith("1 passed, 1 failed")
    without_pytest = stage | {"result": gpu_check.outcomes("all cases\n"), "said": "all cases\n", "status": "passed"}
    assert not gpu_check.bad(without_pytest) and gpu_check.line(without_pytest).endswith("all cases")


def test_ceilings_are_measured_once(tmp_path, monkeypatch):
    """By the first stage that needs them; the others read its file."""
    monkeypatch.setattr(harness, "_best", lambda work, device, seconds: 1.0)
    assert harness.ceilings() == harness.ceilings() and not list(tmp_path.iterdir())
    monkeypatch.setenv("MIRASOL_CEILINGS", str(tmp_path / "ceilings.json"))
    first = harness.ceilings()
    monkeypatch.setattr(harness, "_best", lambda work, device, seconds: pytest.fail("measured again"))
    assert harness.ceilings() == first and first["copy"] > 0


def test_every_stage_is_told_where_ceilings_are(work):
    (found,) = check([python("told", 9, "import os; print(os.environ['MIRASOL_CEILINGS'])")], 20, work)["stages"]
    assert found["said"].strip() == str(work / gpu_check.CEILINGS)


@pytest.mark.parametrize(("cores", "workers"), [(None, 1), (1, 1), (2, 1), (4, 2), (16, 14), (64, 14)])
def test_workers(monkeypatch, cores, workers):
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert gpu_stages.workers_here() == workers


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return gpu_stages.stages("cuda")


def test_commands_are_what_the_benchmarks_take(fake_gpu, monkeypatch):
    """Every stage of a GPU: its options parse, its cases and peers exist, its times fit."""
    assert sum(stage.seconds for stage in fake_gpu) <= gpu_check.SECONDS < 540
    assert len({stage.name for stage in fake_gpu}) == len(fake_gpu)
    ran = set()
    for stage in fake_gpu:
        if "benchmarks.run" in stage.command:
            options = parse(stage.command[3:])
            ran.add(options.op)
            assert options.device == "cuda" and not options.tests and options.keep_going
            assert stage.result == options.out / f"{options.op}.json"
            ours = [name for name in options.peer if suite(options.op)[2][name].ours]
            assert ours and len(options.peer) > len(ours)
        if "benchmarks.sweep" in stage.command:
            import benchmarks.sweep as sweep

            assert stage.command[stage.command.index("--frames") + 1] == "512"  # what there are targets for comes first

            monkeypatch.setattr(sweep, "load", lambda *_: (_ for _ in ()).throw(ValueError("parsed")))
            assert sweep.main(stage.command[3:]) == 2
        if "benchmarks.parts" in stage.command:
            import benchmarks.parts as parts

            monkeypatch.setattr(parts, "load", lambda *_: (_ for _ in ()).throw(ValueError("parsed")))
            assert parts.main(stage.command[3:]) == 2
        if "benchmarks.layer_times" in stage.command:
            import benchmarks.layer_times as layer_times

            monkeypatch.setattr(layer_times, "device", lambda: "cpu")  # there is no GPU to describe
            monkeypatch.setattr(layer_times, "measure", lambda config, *_: (_ for _ in ()).throw(EOFError(config)))
            with pytest.raises(EOFError, match="dim=1280"):
                layer_times.main(stage.command[3:])
            assert stage.result.name == "layers-3b.json"
    assert ran == set(OPS)
    (build,) = (stage for stage in fake_gpu if stage.name == "build")
    assert build.environment == {"TORCH_CUDA_ARCH_LIST": "9.0a"} and "MIRASOL_LIBRARY=cuda" in build.command[2]
    assert gpu_stages.architecture((12, 0)) == "12.0"


def test_every_shape_of_a_gpu_has_its_stage(fake_gpu):
    ran: dict[str, set[str]] = {name: set() for name in OPS}
    for options in (parse(stage.command[3:]) for stage in fake_gpu if "benchmarks.run" in stage.command):
        ran[options.op] |= set(options.case)
    for name in OPS:
        assert ran[name] == {c.name for c in suite(name)[1].values() if "cuda" in c.devices and c.kind != "quick"}


def test_without_pytest_and_tqdm(monkeypatch):
    """What is most likely to be missing there: the ops' own cases are checked all the same, and everything measured."""
    absent = ("pytest", "tqdm", "av", "matplotlib", "hypothesis", "xdist")
    found = gpu_stages.importlib.util.find_spec
    monkeypatch.setattr(gpu_stages.importlib.util, "find_spec", lambda name: None if name in absent else found(name))
    stages = {stage.name: stage for stage in gpu_stages.stages("cpu")}
    assert stages["tests"].command[1:] == ["-m", "mirasol_kernels", "--check"]
    assert not any(stage.missing for name, stage in stages.items() if name not in ("build", *gpu_stages.SANITIZERS))
    assert "noise" in stages["parts"].command
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.delitem(sys.modules, "benchmarks.bar")
    from benchmarks.bar import tqdm

    with tqdm(total=1, bar_format="x", disable=None) as bar:
        bar.set_description("x")
        bar.update()
        bar.write("seen", file=sys.stdout)
    monkeypatch.delitem(sys.modules, "benchmarks.bar")


def test_every_gpu_backend_of_every_op_is_tested(fake_gpu):
    """What pytest -m gpu would run on a GPU, asked of pytest."""
    (stage,) = (stage for stage in fake_gpu if stage.name == "tests")
    command = [word for word in stage.command if word not in ("-v", "-n", "-p") and "=" not in word]
    files = [word for word in command if word.endswith(".py")]
    assert files[0] == "tests/test_every_backend.py"  # where time is short, the last are cut off
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "pytest", "-m", "gpu", "--collect-only", "-q", *files],
        cwd=harness.ROOT, capture_output=True, text=True, env={**os.environ, **stage.environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:]
    for op in Op.all:
        for backend in op.backends:
            if backend.device == "cuda":
                assert f"test_budget[{op.name}-{backend.name}" in done.stdout
    assert "tests/model/test_gpu.py" in done.stdout and "test_cuda_graph" in done.stdout


def test_one_small_case_of_every_kernel(capsys):
    assert gpu_kernels.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for op in Op.all:
        for backend in op.backends:
            if backend.device == "cpu":
                said = [line for line in lines if line.startswith(f"{op.name}, {backend.name}")]
                assert said and (backend.absent or any("forward" in line for line in said))


@pytest.mark.slow
def test_small_on_a_cpu(tmp_path):
    """Two of its stages as they are, and the table."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.gpu_check", "--device", "cpu", "--out", str(tmp_path)]
    environment = {**os.environ, "MIRASOL_COMMIT": "a plain copy"}
    done = subprocess.run(
        [*command, "--seconds", "3000", "--stage", "attention", "forward"],
        cwd=harness.ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (file,) = tmp_path.glob("*-gpu-check.json")
    report = json.loads(file.read_text())
    assert [(found["name"], found["status"]) for found in report["stages"]] == [
        ("attention", "passed"),
        ("forward", "passed"),
    ]
    assert report["machine"]["commit"] == "a plain copy" and report["packages"]["torch"] and file.stat().st_size < 2e6
    assert done.stdout.splitlines()[-1] == f"wrote {file}" and "of floor" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    assert gpu_check.main([]) == 2
    assert "sees no GPU here" in capsys.readouterr().err


def test_every_case_of_a_gpu_costs_something():
    for name in OPS:
        for case in suite(name)[1].values():
            if "cuda" in case.devices:
                assert case.flops("forward") > 0 and case.bytes("forward", torch.float32) > 0
