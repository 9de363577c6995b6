"""One op against everybody who can do it: its tests, then errors, times, memory. Table, JSON and PNG.

python -m benchmarks.run OP [--case NAME ...] [--dtype float32 ...] [--peer NAME ...] [--out DIR]
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch

from benchmarks import against, contest, harness, tables
from benchmarks.bar import tqdm
from benchmarks.cases import DIRECTIONS, NAMES
from benchmarks.peers import Peer, Problem
from mirasol_kernels.__main__ import instruction_set

OPS = sorted(path.stem for path in (Path(__file__).parent / "peers").glob("[a-z]*.py"))
DTYPES = {contest.dtype_name(dtype): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
# What makes ours, ATen, oneDNN and MKL use one instruction set; all of them read it once, when they are loaded. On AMD
# MKL obeys MKL_CBWR alone: "COMPATIBLE" is SSE2 (81 Gflop/s on two cores of a Zen 4, else 190), all else AVX2.
VARIABLES = ("MIRASOL_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "MKL_CBWR")
ISAS = {
    "base": ("base", "default", "SSE41", "SSE4_2", "COMPATIBLE"),
    "avx2": ("avx2", "avx2", "AVX2", "AVX2", "AVX2"),
    "avx512": ("avx512", "avx512", "AVX512_CORE", "AVX512", "AUTO"),
    "avx512bf16": ("avx512bf16", "avx512", "AVX512_CORE_BF16", "AVX512", "AUTO"),
    "amx": ("amx", "avx512", "AVX512_CORE_AMX", "AVX512", "AUTO"),
}


class Job(NamedTuple):
    """What a fresh process whose memory is watched needs to know."""

    op: str
    case: str
    dtype: str
    direction: str
    device: str
    peer: str
    threads: int


def suite(op: str) -> tuple[ModuleType, dict[str, Any], dict[str, Peer]]:
    cases, peers = (importlib.import_module(f"benchmarks.{part}.{op}") for part in ("cases", "peers"))
    return cases, cases.CASES, peers.PEERS


def watched(job: Job) -> Callable[[], int]:
    """In a fresh process: everything but the call, which returns the bytes in use before anything was prepared for it:
    a mask that is kept counts, what making it takes for a moment does not."""
    start = 0 if job.device == "cpu" else torch.cuda.memory_allocated()  # by others: there it is not a fresh process
    torch.set_num_threads(job.threads)
    _, cases, peers = suite(job.op)
    torch.set_grad_enabled(job.direction == "backward")

    def problem(case: Any) -> Problem:
        inputs = case.inputs(DTYPES[job.dtype], job.device, 0)
        return Problem(case, DTYPES[job.dtype], job.direction, job.device, inputs)

    small, this = problem(next(case for case in cases.values() if case.kind == "quick")), problem(cases[job.case])
    peers[job.peer].prepare(small)(*small.inputs)  # libraries and threads that start with a first call are not of this
    before = harness.forget_peak(job.device) - start
    call = peers[job.peer].prepare(this)

    def work() -> int:
        call(*this.inputs)
        return before

    return work


def memory(job: Job) -> dict[str, Any]:
    spent, before = harness.peak_memory(watched, job, device=job.device)
    return job._asdict() | {"candidate": job.peer, "bytes": max(0, spent.peak - before)}


def measure(
    options: argparse.Namespace, save: Callable[[dict[str, Any]], None], other: Any, before: Any = None
) -> dict[str, Any]:
    """Every case, dtype and direction; `save` gets the report whenever it has grown. before: a report to go on with."""
    _, cases, known = suite(options.op)
    peers = [known[name] for name in options.peer]
    if other is not None:
        ours = [peer.name for peer in known.values() if peer.ours and options.device in peer.devices]
        peers.insert(1, against.peer(options.op, ours, other))
    warmup = contest.Effort().warmup / (1 if options.device == "cpu" else 4)
    effort = contest.QUICK if options.quick else contest.Effort(seconds=options.seconds, warmup=warmup)
    report: dict[str, Any] = {
        "op": options.op,
        "machine": harness.machine(options.device),
        "kernels": instruction_set(),
        "forced": {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "against": options.against,
        "effort": effort._asdict(),
        "ceilings": harness.ceilings(options.device, seconds=0.05 if options.quick else 0.5),
        "trying": None,
        "rows": [],
        "notes": [],
        "memory": [],
        "summary": [],
    }
    if before is not None:
        resume(report, before)
        save(report)
    print(tables.introduction(report), end="\n\n", flush=True)
    known_already = {call_of(x) for x in (*report["rows"], *report["notes"])}
    jobs = [
        (cases[name], dtype, direction)
        for dtype in options.dtype
        for name in options.case
        for direction in DIRECTIONS
        if direction in options.direction and direction in cases[name].directions
        if (name, dtype, direction) not in known_already
    ]
    with tqdm(total=len(jobs), bar_format="{desc:<50} {percentage:3.0f}% |{bar}| {elapsed}", disable=None) as bar:
        for case, dtype, direction in jobs:
            bar.set_description(f"{case.name}, {dtype}, {NAMES[direction]}")
            key = {"case": case.name, "kind": case.kind, "dtype": dtype, "direction": direction}
            report["trying"] = key  # who finds this in a file knows what the process ended in
            save(report)
            rows: list[dict[str, Any]] = []
            try:
                rows, notes = one(case, dtype, direction, peers, report["ceilings"], effort, options)
            except Exception as failure:  # this call has no numbers, and the others may
                if not options.keep_going:
                    raise
                notes = [key | {"name": "ours", "reason": contest.first_line(failure), "failed": True}]
            report["rows"] += rows
            report["notes"] += notes
            report["summary"] = tables.summarise(report["rows"])
            save(report)
            bar.write(tables.block(case, rows, notes, direction, dtype), file=sys.stdout)
            sys.stdout.flush()
            if options.memory and direction in case.memory and dtype == options.dtype[0]:
                for name in [row["candidate"] for row in rows if row["candidate"] in known]:
                    bar.set_description(f"{case.name}: memory of {name}")
                    job = Job(options.op, case.name, dtype, direction, options.device, name, options.threads)
                    try:
                        report["memory"].append(memory(job))
                    except RuntimeError as failure:  # mostly too little of it
                        if not options.keep_going:
                            raise
                        report["notes"].append(key | {"name": name, "reason": f"memory: {contest.first_line(failure)}"})
            if harness.broken(options.device):
                break
            report["trying"] = None
            save(report)
            bar.update()
    return report


def one(
    case: Any, dtype: str, direction: str, peers: Sequence[Peer], limits: dict[str, float], effort: contest.Effort,
    options: argparse.Namespace,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:  # fmt: skip
    """Rows and notes of one call."""
    inputs = case.inputs(DTYPES[dtype], options.device, 0)
    problem = Problem(case, DTYPES[dtype], direction, options.device, inputs)
    with torch.set_grad_enabled(direction == "backward"):
        return contest.compete(problem, peers, limits, effort, options.keep_going)


def call_of(x: dict[str, Any]) -> tuple[str, str, str]:
    return x["case"], x["dtype"], x["direction"]


def resume(report: dict[str, Any], before: dict[str, Any]) -> None:
    """What an earlier process measured, into the report. What it ended in is not tried again."""
    for key in ("op", "machine", "kernels", "effort"):
        now = json.loads(json.dumps(report[key]))
        if before.get(key) != now:
            raise ValueError(f"--resume: expected {key} {now!r}, got {before.get(key)!r}")
    report |= {key: before[key] for key in ("ceilings", "rows", "notes", "memory", "summary")}
    ended = before.get("trying")
    if ended and not any(call_of(note) == call_of(ended) and note.get("failed") for note in report["notes"]):
        report["notes"].append(ended | {"name": "ours", "reason": "the process ended in it", "failed": True})


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"run: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    parser.add_argument("op", choices=OPS)
    parser.add_argument("--case", nargs="+", help="shapes (default: all of the device)")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument(
        "--direction", nargs="+", choices=DIRECTIONS, default=list(DIRECTIONS), help="backward: with its forward"
    )
    parser.add_argument("--peer", nargs="+", help="who takes part (default: everybody)")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=positive, default=4, help="of timing, per case, dtype and direction")
    parser.add_argument("--isa", choices=ISAS, help="of ours, ATen, oneDNN and MKL, where they obey")
    parser.add_argument("--against", metavar="REF", help="another commit as one more candidate")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds: does everything work?")
    parser.add_argument("--no-tests", dest="tests", action="store_false", help="do not run the op's tests first")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="times only: what compiles does once")
    parser.add_argument("--keep-going", action="store_true", help="when ours fails in a call, go on without it")
    parser.add_argument("--resume", action="store_true", help="go on with the file in --out, where a process ended")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files (default: out)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    _, cases, peers = suite(options.op)
    fit = [name for name, case in cases.items() if options.device in case.devices]
    options.case = options.case or [name for name in fit if (cases[name].kind == "quick") == options.quick]
    able = [name for name, peer in peers.items() if options.device in peer.devices]
    options.peer = [name for name in able if name in options.peer] if _known(parser, options, "peer", able) else able
    _known(parser, options, "case", fit)
    return options


def _known(parser: Parser, options: argparse.Namespace, name: str, known: Sequence[str]) -> bool:
    """Whether anything was asked for; an error where it is unknown."""
    asked = getattr(options, name)
    for value in asked or ():
        if value not in known:
            parser.error(f"--{name}: expected some of {', '.join(known)}, got {value!r}")
    return bool(asked)


def with_isa(isa: str, arguments: Sequence[str]) -> int | None:
    """The exit code of the same command under `isa` in a fresh process; None where this process is already that."""
    forced = dict(zip(VARIABLES, ISAS[isa], strict=True))
    if all(os.environ.get(name) == value for name, value in forced.items()):
        return None
    command = [sys.executable, "-m", "benchmarks.run", *arguments]
    path = os.pathsep.join(filter(None, [str(harness.ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run(command, env={**os.environ, **forced, "PYTHONPATH": path}).returncode


def red(op: str) -> bool:
    """Whether the op's tests fail: then there are no numbers."""
    tests = harness.ROOT / "tests" / "ops" / f"test_{op}.py"
    command = [sys.executable, "-m", "pytest", str(tests), "-x", "-q"]
    return subprocess.run(command, cwd=harness.ROOT).returncode != 0


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    other = None
    try:  # what can be wrong with the arguments is found out before anything is measured
        if options.isa and (code := with_isa(options.isa, arguments)) is not None:
            return code
        if options.isa and "not on this CPU" in instruction_set():
            raise ValueError(f"--isa {options.isa}: ours run on {instruction_set()}")
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError(f"{options.out}: no permission to write into this folder")
        torch.set_num_threads(options.threads)
        if options.against:
            options.against, tree = against.checkout(options.against)
            other = against.start(tree, options.threads)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"run: {error}", file=sys.stderr)
        return 2
    if options.tests and red(options.op):
        print(f"run: the tests of {options.op} fail, so there are no numbers", file=sys.stderr)
        return 1
    stem = options.op + (f"-{options.isa}" if options.isa else "")
    files = [options.out / f"{stem}.json", options.out / f"{stem}.png"]
    try:
        before = json.loads(files[0].read_text()) if options.resume and files[0].exists() else None
        report = measure(options, lambda now: harness.write(now, files[0]), other, before)
    except ValueError as error:
        if not str(error).startswith("--resume"):
            raise
        print(f"run: {files[0]}: {error}", file=sys.stderr)
        return 2
    finally:
        if other is not None:
            other.close()
    print(tables.summary(report))
    print(f"wrote {files[0]}{drawn(report, files[1])}")
    failed = [note for note in report["notes"] if note.get("failed")]
    for note in failed:
        print(f"run: {note['case']}, {note['dtype']}, {note['direction']}: {note['reason']}", file=sys.stderr)
    if report["trying"]:
        print("run: the GPU is broken in this process; --resume goes on in another", file=sys.stderr)
        return 3
    return int(bool(failed))


def drawn(report: dict[str, Any], path: Path) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return "; no picture, since matplotlib is not installed"
    from benchmarks import plot

    return f" and {path}" if plot.draw_ratios(report, path) else "; there is no ratio to draw"


if __name__ == "__main__":
    sys.exit(main())
