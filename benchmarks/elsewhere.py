"""Another process as one more candidate: it takes its turns, with its own Python, its own packages, its own clock.

What passes between the processes is not in the time. What is: whether a process was asleep, and whether the other's
threads still spin (OpenMP's do, for milliseconds after a call). So both rest around a turn, and short calls, of which
that would be most, are also called untimed before their clock starts, here and there (`SETTLE`).
"""

from __future__ import annotations

import contextlib
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness

REST = 0.02  # seconds after which the threads of the one whose turn it was no longer spin
SETTLE = 0.02  # seconds of untimed calls, at least one, before a timed one
Begin = Callable[..., tuple[Callable[[], Any], str, Any]]


class Other:
    """The process. `ask` sends a question and waits for the answer; an error over there is a RuntimeError here."""

    def __init__(self, tree: Path, threads: int, start: str, python: str = sys.executable) -> None:
        """start: what that Python runs, a program with the fields tree, root and threads that ends in `serve`."""
        code = start.format(tree=str(tree), root=str(harness.ROOT), threads=threads)
        self.process = subprocess.Popen(
            [python, "-W", "ignore", "-c", code], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, *question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        try:
            pickle.dump(question, self.process.stdin)
            self.process.stdin.flush()
            answer = pickle.load(self.process.stdout)
        except (EOFError, OSError):
            raise RuntimeError(f"the other process ended with code {self.process.wait()}") from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def turn(self) -> float:
        """Seconds of one call of what was begun."""
        time.sleep(REST)
        seconds = self.ask("turn")
        time.sleep(REST)
        return seconds

    def close(self) -> None:
        assert self.process.stdin
        with contextlib.suppress(OSError):  # it may have ended by itself
            self.process.stdin.close()
        self.process.wait()


def serve(threads: int, begin: Begin, settle: float = 0.0) -> None:
    """What runs over there: answers on what is its standard output, while everything it prints goes to the errors.

    "begin", ...   `begin(...)` -> the work, its device, the answer
    "turn"         seconds of one call of the work, after `settle` seconds of untimed ones
    "memory"       bytes before a call and at most in it, on a CPU
    """
    torch.set_num_threads(threads)
    questions, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    work: Callable[[], Any] | None = None
    device = "cpu"
    while True:
        try:
            kind, *arguments = pickle.load(questions)
        except EOFError:
            return
        answer: Any
        try:
            if kind == "begin":
                work = None  # what the last one holds goes before the next one comes
                work, device, answer = begin(*arguments)
            elif work is None:
                raise RuntimeError(f"{kind}: nothing has begun")
            elif kind == "turn":
                answer = harness.clock(work, device, settle)
            else:
                before = harness.forget_peak("cpu")
                work()
                answer = before, harness.peak_of("cpu")
        except NotImplementedError as refusal:
            answer = refusal
        except Exception as error:  # a reason for the one who asks
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        pickle.dump(answer, answers)
        answers.flush()
