"""One op against everybody: the peers compute the same, what is wrong gets no time, the command's table and files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib", reason="matplotlib draws the plot")
pytest.importorskip("tqdm", reason="tqdm draws the bar")

from benchmarks import against, contest, harness, plot, run, tables
from benchmarks.cases.block_causal_attention import CASES, Case
from benchmarks.peers import Peer, Problem
from benchmarks.peers.block_causal_attention import PEERS, pieces
from mirasol_kernels import SnippetLayout, _check
from mirasol_kernels.block_causal_attention.cases import PROBLEMS

OP, DIRECTIONS = "block_causal_attention", ("forward", "backward")
LAYOUTS = {
    name: problem
    for name, problem in PROBLEMS.items()
    if name not in ("no_batch", "no_queries", "no_keys")
    and problem.value_dim is None
    and problem.scale is None
    and problem.logits is None
}
PEER_NAMES = ("dense_mask", "per_snippet", "flash_per_snippet")


def case_of(name):
    """A named problem of the op's own tests as a case to measure."""
    p = LAYOUTS[name]
    return Case(name, "a test", p.layout, p.heads, p.dim, p.group, p.batch)


def results_of(name, peer, direction, dtype):
    """-> results of a peer in float64 on inputs rounded to `dtype`, and what they must be."""
    case = case_of(name)
    inputs = case.inputs(dtype, "cpu", 0)
    truth = case.truth(inputs, direction)
    problem = Problem(case, torch.float64, direction, "cpu", tuple(x.double() for x in inputs))
    with torch.set_grad_enabled(direction == "backward"):
        reason = peer.why_not(problem)
        if reason:
            pytest.skip(reason)
        return truth.cut(peer.prepare(problem)(*problem.inputs)), truth


# The peers


@pytest.mark.parametrize(
    ("peer", "direction"),
    [(p, d) for p in PEER_NAMES for d in DIRECTIONS if (p, d) != ("flash_per_snippet", "forward")],
)
@pytest.mark.parametrize("name", LAYOUTS)
def test_peers_compute_the_same(name, peer, direction):
    """In float64: what they differ by there must be rounding that float32 would be forgiven."""
    found, truth = results_of(name, PEERS[peer], direction, torch.float32)
    assert found.keys() == truth.exact.keys() == ({"out"} if direction == "forward" else {"out", "dq", "dk", "dv"})
    for result, exact in truth.exact.items():
        most, mean = _check.budget(truth.low[result], exact, torch.float32)
        error = found[result] - exact
        assert _check.peak(error) <= most and _check.rms(error) <= mean, result


@pytest.mark.slow
@pytest.mark.parametrize("name", ["small", "window_sink", "batch"])  # one range, two, one layout per row
def test_flex_computes_the_same(name):
    case = case_of(name)
    problem = Problem(case, torch.float32, "forward", "cpu", case.inputs(torch.float32, "cpu", 0))
    reason = PEERS["flex"].why_not(problem)
    if reason:
        pytest.skip(reason)
    truth = case.truth(problem.inputs, "forward")
    with torch.no_grad():
        (out,) = truth.cut(PEERS["flex"].prepare(problem)(*problem.inputs)).values()
    most, _ = _check.budget(truth.low["out"].bfloat16(), truth.exact["out"], torch.bfloat16)
    assert _check.peak(out - truth.exact["out"]) <= most


def test_pieces_of_a_loop():
    """A range is a slice, a window with a sink two; a run of text tokens, each a snippet, is one call with a mask."""
    (mine,) = pieces(SnippetLayout.uniform(6, 20, window=2, sink=1), torch.float32, "cpu")
    assert [(p.rows, p.keys, p.mask) for p in mine][4] == (slice(80, 100), [slice(0, 20), slice(60, 100)], None)
    (mine,) = pieces(SnippetLayout.from_block_ids([-1] * 30 + [0] * 20 + [-1]), torch.float32, "cpu")
    assert [(p.rows, p.keys) for p in mine] == [
        (slice(0, 30), [slice(0, 30)]),
        (slice(30, 50), [slice(0, 50)]),
        (slice(50, 51), [slice(0, 51)]),
    ]
    assert torch.equal(mine[0].mask == 0, torch.ones(30, 30).tril().bool())


def test_widened_peers_take_half_precision_only():
    for name, peer in PEERS.items():
        if "cpu" in peer.devices:
            assert (torch.float32 in peer.dtypes) != name.startswith("float32")


# The contest


def test_what_a_case_costs():
    case = CASES["vjepa2_ac"]
    assert case.seen() == 258**2 * 36
    assert case.flops("forward") == 4 * 258**2 * 36 * 64 * 16 and case.flops("backward") == 3.5 * case.flops("forward")
    for case in CASES.values():
        assert case.seen() <= case.batch * case.layout.q_len * case.layout.k_len
        assert case.bytes("forward", torch.bfloat16) < case.bytes("forward", torch.float32)


def test_a_part_is_exact(monkeypatch):
    """Where all heads are too much, some from the first to the last, and the same numbers for them."""
    from benchmarks.cases import block_causal_attention as cases

    case, direction = CASES["quick_uniform"], "backward"
    inputs = case.inputs(torch.float32, "cpu", 0)
    whole = case.truth(inputs, direction)
    monkeypatch.setattr(cases, "EXACT_FLOPS", {"cpu": 0.6 * case.flops(direction)})
    part = case.truth(inputs, direction)
    assert whole.part == "all heads" and part.part == "key heads 0, 3"
    assert all(torch.equal(part.exact[name], whole.exact[name][:, [0, 3]]) for name in whole.exact)


def compete(*peers, name="quick_uniform", direction="backward", dtype=torch.float32, keep_going=False):
    case = CASES[name]
    problem = Problem(case, dtype, direction, "cpu", case.inputs(dtype, "cpu", 0))
    limits = {"gemm float32": 1e11, "copy": 1e10}
    with torch.set_grad_enabled(direction == "backward"):
        return contest.compete(problem, peers, limits, contest.QUICK, keep_going)


def changed(by, **fields):
    """The reference, changed."""

    def prepare(problem):
        call = PEERS["reference"].prepare(problem)
        return lambda *inputs: by(call(*inputs))

    return Peer("changed", prepare, **fields)


@pytest.mark.parametrize("by", [lambda r: (r[0] * 1.001, *r[1:]), lambda r: (*r[:3], r[3] * torch.nan)])
def test_ours_gets_no_time_where_it_is_wrong(by):
    rows, notes = compete(PEERS["reference"], changed(by, ours=True))
    assert [row["candidate"] for row in rows] == ["reference"]
    assert [note["name"] for note in notes] == ["changed"] and notes[0]["reason"].startswith("wrong: error ")


def test_the_error_of_a_peer_stands_beside_its_time():
    rows, notes = compete(PEERS["reference"], changed(lambda r: (r[0] * 1.5, *r[1:])))
    assert not notes and [row["candidate"] for row in rows] == ["reference", "changed"]
    assert max(rows[0]["errors"].values()) < 0.01 < 0.4 < rows[1]["errors"]["out"] < 0.6
    assert rows[0]["excess"] <= 1 < rows[1]["excess"]


def test_refusals_are_reasons(monkeypatch):
    def fail(results):
        raise ValueError("two\nlines")

    rows, notes = compete(PEERS["flash_per_snippet"], changed(fail), direction="forward")
    assert not rows and [note["reason"] for note in notes] == [
        "backward only: forward it is per_snippet",
        "ValueError: two",
    ]
    with pytest.raises(ValueError, match="two"):  # ours may refuse, it may not fail
        compete(changed(fail, ours=True))
    peers = changed(fail, ours=True), PEERS["reference"]
    rows, notes = compete(*peers, keep_going=True)
    assert [row["candidate"] for row in rows] == ["reference"]
    assert [(note["name"], note["reason"], note["failed"]) for note in notes] == [("changed", "ValueError: two", True)]
    monkeypatch.setattr(harness, "broken", lambda device: True)  # then nobody can go on
    with pytest.raises(ValueError, match="two"):
        compete(*peers, keep_going=True)


class Fixed:
    """A candidate that says how long it took."""

    def __init__(self, seconds):
        self.seconds = seconds

    def clock(self):
        return self.seconds


def test_who_is_beaten_leaves():
    candidates = {"fast": Fixed(0.2), "close": Fixed(0.5), "beaten": Fixed(0.7)}
    timings = harness.interleave(candidates, rounds=9, warmup=0, budget=2, beaten=3)
    assert {name: (t.median, t.rounds) for name, t in timings.items()} == {
        "fast": (0.2, 9),
        "close": (0.5, 9),
        "beaten": (0.7, 1),
    }
    timings = harness.interleave(candidates, rounds=9, warmup=0, budget=20, beaten=3)  # it costs little: it may stay
    assert all(t.rounds == 9 for t in timings.values())


def test_calls_find_nothing_in_a_cache(monkeypatch):
    case = CASES["quick_uniform"]
    problem = Problem(case, torch.float32, "forward", "cpu", case.inputs(torch.float32, "cpu", 0))
    size = sum(x.nbytes for x in problem.inputs)
    for cache, count in ((size, 2), (3 * size, 6), (2**40, contest.MOST_SETS), (0, 1)):
        monkeypatch.setattr(contest, "cache_bytes", lambda device, cache=cache: cache)
        sets = contest.input_sets(problem)
        assert len(sets) == count and len({x.data_ptr() for some in sets for x in some}) == 4 * count
    assert contest.cache_bytes("cpu") == 0


# Another commit


def test_another_process_takes_turns():
    """Its tree is this one here: nothing to build."""
    other = against.start(harness.ROOT, 1)
    rows, _ = compete(PEERS["reference"], against.peer(OP, ["triton", "reference"], other))
    assert [(row["candidate"], row["ours"]) for row in rows] == [("reference", False), ("against", True)]
    assert rows[0]["errors"] == rows[1]["errors"]  # the same inputs, the same results
    _, notes = compete(against.peer(OP, ["triton"], other))
    assert [note["name"] for note in notes] == ["against"] and "triton" in notes[0]["reason"]
    with pytest.raises(RuntimeError, match="KeyError"):
        other.ask("begin", OP, ["reference"], "no such case", torch.float32, "forward", "cpu")
    other.close()
    assert other.process.returncode == 0


def test_another_process_that_dies():
    other = against.start(harness.ROOT, 1)
    other.process.kill()
    with pytest.raises(RuntimeError, match="the other process ended with code -9"):
        other.ask("turn")
    other.close()


def test_a_commit_that_does_not_build(tmp_path, monkeypatch):
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler of the right colour')\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@y"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    monkeypatch.setattr(against, "BUILDS", tmp_path / "build")
    with pytest.raises(RuntimeError, match=r"^HEAD does not build: no compiler of the right colour$"):
        against.checkout("HEAD")
    with pytest.raises(RuntimeError, match=r"^no commit 'nothing'$"):
        against.checkout("nothing")


# The command


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """`python -m benchmarks.run` under a forced instruction set -> what it printed, its folder, its report."""
    out = tmp_path_factory.mktemp("run") / "new" / "folder"
    options = ["--quick", "--no-tests", "--dtype", "float32", "float16", "--threads", "1", "--isa", "base"]
    options += ["--peer", "native", "reference", *PEER_NAMES, "float32_flash", "--out", str(out)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.run", OP, *options]
    environment = {**os.environ, "MIRASOL_COMMIT": "a plain copy"}
    done = subprocess.run(command, cwd=harness.ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, out, json.loads((out / f"{OP}-base.json").read_text())


def test_report(report):
    _, _, found = report
    assert found["machine"]["commit"] == "a plain copy" and found["machine"]["threads"] == 1
    assert found["forced"]["MIRASOL_ISA"] == "base" and found["machine"]["isa"] in ("DEFAULT", "NO AVX")
    assert found["ceilings"]["gemm float32"] > 1e8 and found["ceilings"]["copy"] > 1e8
    seen = {(row["case"], row["dtype"], row["direction"], row["candidate"]) for row in found["rows"]}
    quick = [case.name for case in CASES.values() if case.kind == "quick"]
    for dtype in ("float32", "float16"):
        assert {(c, dtype, d, p) for c in quick for d in DIRECTIONS for p in ("reference", *PEER_NAMES[:2])} <= seen
    for row in found["rows"]:
        assert 0 < row["seconds_low"] <= row["seconds"] <= row["seconds_high"] and row["rounds"] >= 1
        assert row["flops_per_second"] > 0 and row["of_floor"] > 0 and max(row["errors"].values()) > 0
        assert row["excess"] <= 1 or not row["ours"]
    names = {row["candidate"] for row in found["rows"]} | {note["name"] for note in found["notes"]}
    assert names == {"native", "reference", *PEER_NAMES, "float32_flash"}  # everybody has a time or a reason
    assert {spent["candidate"] for spent in found["memory"]} >= {"reference", "dense_mask", "per_snippet"}


def test_report_names_no_host_user_or_path(report):
    text = json.dumps(report[2])
    assert os.uname().nodename not in text and str(Path.home()) not in text and str(harness.ROOT) not in text


def test_table(report):
    printed, out, found = report
    for row in found["rows"]:
        assert f"\n{row['case']}, {row['dtype']}, " in printed and f"\n  {row['candidate']} " in printed
    for note in found["notes"]:
        assert note["reason"] in printed
    assert printed.splitlines()[-1].startswith(f"wrote {out / OP}-base.json")


def test_picture(report):
    from matplotlib import image

    _, out, found = report
    if not any(row["ours"] for row in found["rows"]):
        pytest.skip(next(note["reason"] for note in found["notes"] if note["name"] == "native"))
    picture = image.imread(out / f"{OP}-base.png")
    assert picture.shape[1] > 1000 and picture[..., 3].max() == 1  # drawn, on a transparent ground


@pytest.fixture
def quick_run(monkeypatch, tmp_path):
    """`run` on quick shapes in this process -> code, report; memory, which takes a process each, is `test_report`'s."""
    monkeypatch.setattr(run, "memory", lambda job: job._asdict() | {"candidate": job.peer, "bytes": 1})
    monkeypatch.setattr(harness, "ceilings", lambda *_, **__: {"gemm float32": 1e11, "copy": 1e10})
    monkeypatch.setattr(plot, "draw_ratios", lambda *_: False)

    def go(*options):
        command = [OP, "--quick", "--no-tests", "--dtype", "float32", "--peer", "reference", "--keep-going"]
        code = run.main([*command, "--direction", "forward", "--out", str(tmp_path), *options])
        return code, json.loads((tmp_path / f"{OP}.json").read_text())

    return go


def test_a_run_goes_on_after_what_it_ended_in(quick_run, monkeypatch, tmp_path, capsys):
    cases = [case.name for case in CASES.values() if case.kind == "quick"]
    measured = contest.compete

    def killed(problem, *rest):
        if problem.case.name == cases[1]:
            raise KeyboardInterrupt
        return measured(problem, *rest)

    monkeypatch.setattr(contest, "compete", killed)
    with pytest.raises(KeyboardInterrupt):
        quick_run()
    found = json.loads((tmp_path / f"{OP}.json").read_text())
    assert found["trying"]["case"] == cases[1] and [row["case"] for row in found["rows"]] == cases[:1]
    code, again = quick_run("--resume")  # it is not tried again: it would end this process too
    assert code == 1 and again["rows"] == found["rows"] and again["trying"] is None
    assert [(note["case"], note["reason"]) for note in again["notes"]] == [(cases[1], "the process ended in it")]
    changed = json.loads((tmp_path / f"{OP}.json").read_text()) | {"kernels": "others"}
    (tmp_path / f"{OP}.json").write_text(json.dumps(changed))
    capsys.readouterr()
    code, _ = quick_run("--resume")
    assert code == 2 and "--resume: expected kernels" in capsys.readouterr().err


def test_a_broken_gpu_ends_the_process_after_its_case(quick_run, monkeypatch, capsys):
    monkeypatch.setattr(harness, "broken", lambda device: True)
    code, found = quick_run()
    assert code == 3 and len({row["case"] for row in found["rows"]}) == 1 and found["trying"] is not None
    assert "--resume goes on in another" in capsys.readouterr().err
    code, again = quick_run("--resume")
    assert code == 3 and len(again["rows"]) > len(found["rows"])


def test_what_has_too_little_memory_is_a_note(quick_run, monkeypatch):
    def fail(job):
        raise torch.OutOfMemoryError("too much")

    monkeypatch.setattr(run, "memory", fail)
    code, found = quick_run()
    assert code == 0 and found["rows"] and not found["memory"]
    assert {note["reason"] for note in found["notes"]} == {"memory: OutOfMemoryError: too much"}


def test_whether_a_gpu_is_broken(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    assert not harness.broken("cpu")
    monkeypatch.setattr(torch, "zeros", lambda *_, device: torch.ones(1))
    assert not harness.broken("cuda")
    monkeypatch.setattr(torch, "zeros", fail)
    assert harness.broken("cuda")


def row(case, candidate, seconds, ours=False):
    key = {"case": case, "kind": "k", "dtype": "float32", "direction": "forward"}
    return key | {"candidate": candidate, "ours": ours, "seconds": seconds, "of_floor": 0.5 / seconds}


def test_summary():
    rows = [row("a", "native", 1, True), row("a", "x", 4), row("a", "y", 3)]
    rows += [row("b", "native", 2, True), row("b", "x", 1), row("c", "x", 1)]
    (found,) = tables.summarise(rows)
    assert found["best"] == {"a": "y", "b": "x"}
    assert found["of_best"] == {"mean": pytest.approx(1.5**0.5), "least": 0.5, "least_case": "b"}
    assert found["of_each"]["x"]["mean"] == pytest.approx(2**0.5) and found["of_each"]["y"]["mean"] == pytest.approx(3)
    assert found["of_floor"] == [0.25, 0.5] and found["cases"] == 2


def test_no_picture_without_ours(tmp_path):
    assert not plot.draw_ratios({"rows": [row("a", "x", 1)]}, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "argument op: invalid choice: 'nothing'"),
        ([OP, "--case", "latent", "huge"], "--case: expected some of vjepa2_ac, "),
        ([OP, "--case", "magi"], "got 'magi'"),  # a shape of GPUs
        ([OP, "--peer", "me"], "--peer: expected some of native, reference, dense_mask, "),
        ([OP, "--peer", "triton"], "got 'triton'"),
        ([OP, "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        ([OP, "--direction", "sideways"], "argument --direction: invalid choice: 'sideways'"),
        ([OP, "--threads", "0"], "argument --threads: expected a whole number above 0, got '0'"),
        ([OP, "--isa", "mmx"], "argument --isa: invalid choice: 'mmx'"),
        ([OP, "--against", "no such commit"], "no commit 'no such commit'"),
        ([OP, "--out", "{words}"], "[Errno 17] File exists: '{words}'"),
    ],
)
def test_one_line_for_bad_arguments(arguments, message, tmp_path, capsys):
    words = tmp_path / "words"
    words.touch()
    code: object
    try:
        code = run.main([a.format(words=words) for a in [*arguments, "--no-tests"]])
    except SystemExit as caught:
        code = caught.code
    said = capsys.readouterr()
    assert code == 2 and said.out == "" and len(said.err.splitlines()) == 1
    assert said.err.startswith("run: ") and message.format(words=words) in said.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys):
    with pytest.raises(SystemExit):
        run.main([OP, "--device", "cuda"])
    assert capsys.readouterr().err == "run: --device cuda: torch sees no GPU here\n"


def test_red_tests_mean_no_numbers(tmp_path, monkeypatch, capfd):
    (tmp_path / "tests/ops").mkdir(parents=True)
    tests = tmp_path / f"tests/ops/test_{OP}.py"
    monkeypatch.setattr(harness, "ROOT", tmp_path)
    tests.write_text("def test(): assert True\n")
    assert not run.red(OP)
    tests.write_text("def test(): assert False\n")
    assert run.main([OP, "--quick", "--out", str(tmp_path / "out")]) == 1
    assert f"run: the tests of {OP} fail, so there are no numbers" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())
