"""All that needs a GPU, in under nine minutes: build, tests, benchmarks, compute-sanitizer; one file, a table.

python -m benchmarks.gpu_check [--seconds 505] [--out DIR]      (make gpu-check)

It uses this Python and its torch and installs nothing, needs no network, and runs from a plain copy of the tree, of
which MIRASOL_COMMIT names the commit.  Every stage is a process that is stopped when its time is out; what one leaves
goes to those after it.  The file is benchmarks/results/<gpu>-<date>-gpu-check.json, or lies in the folder that the
variable OUT names.  It is written whenever a stage has something new: whoever stops this early keeps what there is.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness, tables
from benchmarks.gpu_stages import PATH, WORK, Stage, stages

SECONDS = 505.0  # with what starts and ends them, all stages together stay under nine minutes
LEAST = 3.0  # seconds below which a stage is not started
EVERY = 2.0  # seconds between looks at what it has written
CEILINGS = "ceilings.json"  # the first stage that needs them measures them, in some 4 s
TAIL = 3_000  # characters kept of what a stage printed, and ten times as many where it failed
PACKAGES = ("torch", "triton", "numpy", "pytest", "pytest-xdist", "hypothesis", "tqdm", "matplotlib", "huggingface_hub",
            "av", "xformers", "flash-attn", "nvidia-ml-py")  # fmt: skip
Save = Callable[[dict[str, Any]], None]


def run(stage: Stage, seconds: float, save: Save) -> dict[str, Any]:
    """The stage, for so many seconds at most -> how it went, and what it measured; `save` gets that as it grows."""
    found: dict[str, Any] = {"name": stage.name, "status": "running", "seconds": 0.0, "said": "", "result": None}
    if stage.missing or seconds < LEAST:
        return found | {"status": "skipped", "said": stage.missing or "no time is left"}
    log = WORK / f"{stage.name}.log"
    log.write_text("")
    if stage.result:
        stage.result.unlink(missing_ok=True)  # an earlier check's
    caches = {"TRITON_CACHE_DIR": str(WORK / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(WORK / "inductor")}
    once_for_all = {"MIRASOL_CEILINGS": str(WORK / CEILINGS), "PATH": PATH, "PYTHONUNBUFFERED": "1"}
    environment = {**caches, **os.environ, **once_for_all, **stage.environment}
    start, command = time.monotonic(), list(stage.command)

    def look() -> None:
        found.update(so_far(stage, log, start))
        save(found)

    while True:
        code = once(command, environment, log, start + seconds, look)
        found.update(so_far(stage, log, start))
        ended = code not in (None, 0) and (found["result"] or {}).get("trying")
        if not ended or seconds - found["seconds"] < LEAST:
            break
        command = [*stage.command, "--resume"]  # what a call has broken, a new process may not have
    status = "out of time" if code is None else "passed" if code == 0 else "failed"
    kept, text = TAIL if status == "passed" else 10 * TAIL, log.read_text(errors="replace")
    if status == "failed" and stage.refusal and (refused := re.search(f".*{stage.refusal}.*", text)):
        return found | {"status": "skipped", "said": refused[0].strip("= ")}
    return found | {"status": status, "code": code, "said": text[-kept:]}


def once(
    command: Sequence[str], environment: dict[str, str], log: Path, until: float, look: Callable[[], None]
) -> int | None:
    """The exit code of a command, which is stopped at that time: None. `look` is called every now and then."""
    looked = 0.0
    with log.open("a") as output:
        process = subprocess.Popen(
            command, cwd=harness.ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < until:
                time.sleep(0.05)
                if time.monotonic() - looked > EVERY:
                    looked = time.monotonic()
                    look()
            stopped = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):  # and whatever it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return None if stopped else process.returncode


def so_far(stage: Stage, log: Path, start: float) -> dict[str, Any]:
    return {"seconds": time.monotonic() - start} | written(stage, log)


def written(stage: Stage, log: Path) -> dict[str, Any]:
    """What the stage has come to so far."""
    if stage.name == "tests":
        return {"result": outcomes(log.read_text(errors="replace"))}
    result = None
    if stage.result and stage.result.exists():
        with contextlib.suppress(ValueError):  # it is being written at this moment
            result = json.loads(stage.result.read_text())
    return {"result": result}


def outcomes(log: str) -> dict[str, Any]:
    """Of pytest -v, by itself and in several processes: how many passed and so on, and which did not."""
    kinds = "PASSED|FAILED|ERROR|SKIPPED|XFAIL"
    lines = [(name, kind) for name, kind in re.findall(rf"^(tests/\S+::.+?) ({kinds})\b", log, re.M)]
    lines += [(name, kind) for kind, name in re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({kinds}) (tests/.+?) *$", log, re.M)]
    lines += [(name, "ERROR") for name in re.findall(r"^ERROR (tests/\S+)", log, re.M)]  # not even collected
    last = dict(lines)
    bad = [name for name, kind in last.items() if kind in ("FAILED", "ERROR")]
    return {"counts": {kind.lower(): n for kind, n in Counter(last.values()).items()}, "bad": bad}


def check(every: Sequence[Stage], report: dict[str, Any], seconds: float, save: Save) -> None:
    """All stages into `report`, in order, until the time is over."""
    start, allowed = time.monotonic(), 0.0
    for stage in every:
        allowed += stage.seconds
        # What is not asked for by a later stage is free; the last may have whatever there is.
        until = seconds if stage is every[-1] else min(seconds, allowed)
        print(f"{stage.name} ...", flush=True)

        def grown(found: dict[str, Any]) -> None:
            save(report | {"stages": [*report["stages"], found]})

        report["stages"].append(run(stage, until - (time.monotonic() - start), grown))
        print("  " + line(report["stages"][-1]), flush=True)
        save(report)


def line(found: dict[str, Any]) -> str:
    result = found["result"]
    if found["status"] == "skipped":
        said = found["said"]
    elif found["name"] == "tests":
        said = ", ".join(f"{n} {kind}" for kind, n in result["counts"].items()) or last_line(found["said"])
    elif result is not None:
        failed = [note for note in result.get("notes", ()) if is_failure(note)]
        rows = result["rows"] if "rows" in result else [row for step in result["steps"] for row in step["rows"]]
        said = f"{len(rows)} timings" + (f", {len(failed)} FAILED" if failed else "")
    else:
        said = "" if found["status"] == "passed" else last_line(found["said"])
    return f"{found['name']:<22} {found['status']:<12} {found['seconds']:>6.1f} s  {said}"


def is_failure(note: Any) -> bool:
    """Of an op's measurements, or of the sweep's."""
    return bool(note.get("failed")) if isinstance(note, dict) else str(note).startswith("FAILED")


def last_line(text: str) -> str:
    return next((line.strip()[:150] for line in reversed(text.splitlines()) if line.strip()), "")


def table(report: dict[str, Any]) -> str:
    """Short, for a terminal that keeps only the end."""
    lines = [f"{report['machine'].get('gpu', report['machine']['cpu'])}, torch {report['machine']['torch']}"]
    for found in report["stages"]:
        result = found["result"]
        if found["name"] == "tests" and result:
            lines += [f"  FAILED {name}" for name in result["bad"][:20]]
        elif result and "summary" in result:
            lines += [f"{found['name']}:", *ratios(result)]
        elif result and "layers_of" in result:
            lines += [f"layers of {result['layers_of']}:", *layer_lines(result["rows"])]
        elif result and "rows" in result:
            from benchmarks import sweep  # needs more packages, which are here if it has run

            lines += [f"{found['name']}, {'training step' if result['train'] else 'forward pass'}:", sweep.HEADER]
            lines += [sweep.line(row) for row in result["rows"]]
            lines += [f"  {note}" for note in result["notes"] if is_failure(note)]
        elif result and "steps" in result:
            from benchmarks import parts

            for step in result["steps"]:
                lines += [f"a training step of {step['frames']} frames by parts:", parts.table(step["rows"])]
    return "\n".join([*lines, "", *map(line, report["stages"])])


def ratios(result: dict[str, Any]) -> list[str]:
    """Per case and direction: time of ours, share of the floor, error, and how long the peers take of it."""
    lines = []
    for (case, dtype, direction), rows in tables.groups(result["rows"], "case", "dtype", "direction"):
        ours = next((row for row in rows if row["ours"]), None)
        if ours is None:
            continue
        others = [f"{row['candidate']} {row['seconds'] / ours['seconds']:.2f}" for row in rows if row is not ours]
        said = f"{ours['seconds'] * 1e3:9.3f} ms {ours['of_floor']:4.0%} of floor, {ours['excess']:.2f} of error budget"
        lines.append(f"  {case:<17} {dtype:<8} {direction:<8} {said}; {', '.join(others)}")
    failed = [note for note in result["notes"] if note.get("failed")]
    return lines + [f"  FAILED {note['case']}, {note['direction']}: {note['reason']}" for note in failed]


def layer_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """At their largest; of the whole file `benchmarks.scale --layers` makes steps."""
    most: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if row["snippets"] >= most.get((row["combiner"], row["part"]), row)["snippets"]:
            most[row["combiner"], row["part"]] = row
    return [
        f"  {combiner:<8} {part:<27}{row['snippets']:>4} snippets {row['seconds'] * 1e3:9.3f} ms"
        + (f" {row['flops'] / row['seconds'] / 1e12:7.1f} TFLOP/s" if row["flops"] else "")
        for (combiner, part), row in most.items()
    ]


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"of all stages together (default {SECONDS:g})")
    results = Path(os.environ.get("OUT") or harness.ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=results, help="folder for the file")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: small, a test of this command")
    parser.add_argument("--stage", nargs="+", help="some stages only")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(f"gpu-check: torch {torch.__version__} of {sys.executable} sees no GPU here", file=sys.stderr)
        return 2
    scale = options.seconds / SECONDS
    every = [stage._replace(seconds=scale * stage.seconds) for stage in stages(options.device)]
    every = [stage for stage in every if not options.stage or stage.name in options.stage]
    if not every:
        parser.error(f"--stage: expected some of {', '.join(s.name for s in stages(options.device))}")
    options.out.mkdir(parents=True, exist_ok=True)
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / CEILINGS).unlink(missing_ok=True)  # an earlier check's
    machine = harness.machine(options.device)
    name = re.sub(r"[^a-z0-9]+", "-", machine.get("gpu", options.device).lower()).strip("-")
    file = options.out / f"{name}-{date.today()}-gpu-check.json"
    packages = {package: version(package) for package in PACKAGES}
    report: dict[str, Any] = {"machine": machine, "packages": packages, "seconds": options.seconds, "stages": []}
    check(every, report, options.seconds, lambda now: harness.write(now, file))
    print(f"\n{table(report)}\nwrote {file}")
    return int(any(map(bad, report["stages"])))


def bad(found: dict[str, Any]) -> bool:
    """Out of time, or not possible here, is not bad; a red test is, whatever became of the others."""
    red = found["result"]["bad"] if found["name"] == "tests" and found["result"] else ()
    noted = (found["result"] or {}).get("notes", ())
    return found["status"] == "failed" or bool(red) or any(map(is_failure, noted))


if __name__ == "__main__":
    sys.exit(main())
