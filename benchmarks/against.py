"""Another commit of this project as one more candidate: a process of its own that takes its turns.

Two copies of one library cannot be loaded into one process, since both register the same operators. So the other
commit's package is imported in another process, together with this tree's `benchmarks`, draws the same inputs, and
times its own calls when it is its turn: what passes between the processes is not in the time.
"""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.elsewhere import Other
from benchmarks.peers import Peer, Problem

NAME = "against"
BUILDS = harness.ROOT / "build" / "against"


def checkout(ref: str) -> tuple[str, Path]:
    """The tree of commit `ref` with its compiled kernels, kept under build/ -> commit, folder.

    An export, not a worktree of git's: nothing has to be cleaned up in the repository. RuntimeError says why not.
    """
    commit = _said("git", "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}", why=f"no commit {ref!r}")
    tree = BUILDS / commit
    if not (tree / "built").exists():
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = tree / "tree.tar"
        _said("git", "archive", "--output", str(archive), commit, why=f"git cannot export {ref}")
        shutil.unpack_archive(archive, tree, filter="data")
        archive.unlink()
        tools = {**os.environ, "MIRASOL_BUILD": "cpu"}  # ninja and cmake may be in this environment only
        tools["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{tools['PATH']}"
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        _said(*command, why=f"{ref} does not build", where=tree, environment=tools)
        (tree / "built").touch()
    return commit, tree


def _said(*command: str, why: str, where: Path | None = None, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=where or harness.ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise RuntimeError(": ".join([why, *lines[-1:]])[:300])
    return done.stdout.strip()


START = """
import sys
sys.path.insert(0, {tree!r})
import mirasol_kernels
assert mirasol_kernels.__file__.startswith({tree!r}), mirasol_kernels.__file__
sys.path.insert(0, {root!r})
from benchmarks import against, elsewhere
elsewhere.serve({threads}, against.begin, elsewhere.SETTLE)
"""


class Away:
    """A call of the other commit: on the first inputs it gives the results; its clock is over there."""

    def __init__(self, other: Other, question: tuple) -> None:
        self.other, self.question = other, question

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.to(inputs[0].device) for x in self.other.ask("begin", *self.question))

    def clock(self) -> float:
        return self.other.turn()


def start(tree: Path, threads: int) -> Other:
    """The process of the commit whose tree that is."""
    return Other(tree, threads, START)


def peer(op: str, names: Sequence[str], other: Other) -> Peer:
    """names: of our backends; the other commit runs the first of them that it has."""

    def prepare(problem: Problem) -> Away:
        return Away(other, (op, tuple(names), problem.case.name, problem.dtype, problem.direction, problem.device))

    return Peer(NAME, prepare, ours=True)


def begin(
    op: str, names: Sequence[str], name: str, dtype: torch.dtype, direction: str, device: str
) -> tuple[Callable[[], Any], str, tuple[Tensor, ...]]:
    """-> a call on the next set of inputs, the device, and the results on the first."""
    from benchmarks import contest

    case = importlib.import_module(f"benchmarks.cases.{op}").CASES[name]
    peers = importlib.import_module(f"benchmarks.peers.{op}").PEERS
    problem = Problem(case, dtype, direction, device, case.inputs(dtype, device, 0))
    torch.set_grad_enabled(direction == "backward")
    reasons = []
    for backend in names:
        tried = contest.attempt(peers[backend], problem)
        if isinstance(tried, contest.Refusal):
            reasons.append(f"{backend}: {tried.reason}")
            continue
        call, results, _ = tried
        work = contest.taking_turns(call, itertools.cycle(contest.input_sets(problem)))
        return work, device, tuple(x.cpu() for x in results)
    raise NotImplementedError("; ".join(reasons))
