"""Which implementation of an op runs, and why not the others.

An op has one reference, and for its fused backends one schema and one fake.  Each backend is that schema registered as
`mirasol_<backend>::<op>_<part>`, so that torch.compile sees it and a profile names it.  Selection is ordinary Python on
shapes, dtypes and devices above the op boundary: Dynamo traces it and guards on it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mirasol_kernels import _native

BACKENDS = ("native", "triton", "cuda", "reference")
WhyNot = Callable[..., "str | None"]
_ENVIRONMENT = os.environ.get("MIRASOL_BACKEND") or None


class _Wish(threading.local):
    """The backend asked for in this thread.  Not a ContextVar: Dynamo cannot trace one, and this it guards on."""

    def __init__(self) -> None:  # run in every thread; Dynamo of torch 2.10 would not see a default of the class change
        self.name = _ENVIRONMENT
        self.explain = False


class _Explained(BaseException):  # not an Exception: no caller's `except Exception` may swallow the answer
    pass


_wish = _Wish()


def wanted_backend() -> str | None:
    """The backend that this thread asks for; None: the automatic choice.

    Backward may run in another thread, and outside of the caller's `use_backend`: who recomputes carries it along.
    """
    return _wish.name


def unasked() -> bool:
    """Whether this thread leaves the choice to us, and wants it made and not explained."""
    return _wish.name is None and not _wish.explain


def explaining() -> bool:
    """Whether `explain` asks: who would send or store something before the choice is made, makes it first."""
    return _wish.explain


def only_reference() -> None:
    """Of a function without backends: its answer to `explain`, before anything is computed."""
    if _wish.explain:
        raise _Explained({"reference": "runs"})


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within it every op of this thread runs on backend `name`, or raises NotImplementedError with the reason.

    name: one of `BACKENDS`, or None for the automatic choice.  A `backend=` of a single call goes before it; it goes
    before the environment variable MIRASOL_BACKEND.
    """
    before, _wish.name = _wish.name, _known(name)
    try:
        yield
    finally:
        _wish.name = before


def _known(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _absent(name: str) -> str | None:
    """Why no call at all can run on backend `name` here.  Nothing but our own libraries is loaded to find out."""
    if name == "triton":
        return None if importlib.util.find_spec("triton") else "triton is not installed"
    return _native.missing({"native": "cpu", "cuda": "cuda"}[name])


class Backend(NamedTuple):
    name: str
    device: str  # type of the tensors it takes
    absent: str | None  # why it is not there at all, whatever the call
    why_not: WhyNot
    calls: dict[str, Any]  # "fwd", "bwd" -> torch.ops overload

    def refusal(self, args: tuple) -> str | None:
        """Why this call cannot run on it: a constant string, or None."""
        for arg in args:
            if isinstance(arg, Tensor):
                if arg.device.type != self.device:
                    return f"runs on {self.device} tensors"
                break
        if self.absent is not None:
            return self.absent
        # Dynamo traces through an autograd.Function that torch.func differentiates as if it had no backward: zeros.
        if torch._C._are_functorch_transforms_active() and torch.compiler.is_compiling():
            return "torch.func inside torch.compile would lose its gradient"
        return self.why_not(*args)


class Op:
    """One op and its backends.  `schemas`: part ("fwd", "bwd") -> (schema, fake); none while only the reference exists.

    `cases` names the module whose `cases(device, dtype)` yields the op's `_check.Case`s; it is imported when asked for.
    """

    all: ClassVar[list[Op]] = []

    def __init__(self, name: str, *, cases: str | None = None, **schemas: tuple[str, Callable]) -> None:
        self.name, self.schemas = name, schemas
        self.backends: list[Backend] = []  # best first: the order is the priority
        self._cases = cases
        Op.all.append(self)

    def backend(self, name: str, device: str, why_not: WhyNot, **impls: Callable) -> None:
        """Add a backend.  A part without an implementation in `impls` has its kernel in the compiled library."""
        calls = {}
        for part, (schema, fake) in self.schemas.items():
            qualname = f"mirasol_{name}::{self.name}_{part}"
            torch.library.define(qualname, schema)
            torch.library.register_fake(qualname, fake)
            if part in impls:
                torch.library.impl(qualname, device, impls[part])
            calls[part] = getattr(getattr(torch.ops, f"mirasol_{name}"), f"{self.name}_{part}").default
        self.backends.append(Backend(name, device, _absent(name), why_not, calls))

    def select(self, args: tuple, want: str | None) -> Backend | None:
        """The backend for these arguments; None is the reference.  One asked for by name never falls back."""
        if _wish.explain:
            raise _Explained(self.explain(*args))
        want = want or _wish.name
        if want is not None and _known(want) == "reference":
            return None
        reason = f"no {want} kernel of this op"
        for backend in self.backends:
            if want is None or want == backend.name:
                refusal = backend.refusal(args)
                if refusal is None:
                    return backend
                reason = refusal
        if want is None:
            return None
        raise NotImplementedError(f"{self.name}: backend {want!r} refuses this call: {reason}")

    def explain(self, *args: Any) -> dict[str, str]:
        """Every backend and what it says to this call, "runs" or its reason, in the order they are tried.

        Without arguments: what it says to every call.
        """
        said = {b.name: (b.refusal(args) if args else b.absent) or "runs" for b in self.backends}
        return said | {"reference": "runs"}

    @property
    def cases(self) -> ModuleType | None:
        return importlib.import_module(self._cases) if self._cases else None


def explain(op: Callable | str, *args: Any, **kwargs: Any) -> dict[str, str]:
    """What each backend says to the call `op(*args, **kwargs)`: "runs", or the reason why not.  Nothing is computed,
    sent or stored.

    op: a public function of this package, with its own arguments, which are checked as in the call itself; or the name
    of an op alone, for what its backends say to every call on this machine.
    """
    if isinstance(op, str):
        named = {o.name: o for o in Op.all}
        if op not in named:
            raise ValueError(f"explain: op: expected one of {', '.join(named)}, got {op!r}")
        return named[op].explain()
    _wish.explain = True
    try:
        op(*args, **kwargs)
    except _Explained as said:
        return said.args[0]
    finally:
        _wish.explain = False
    return {"reference": "runs"}
