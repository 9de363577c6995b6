"""Fields of frozen dataclasses, checked: what is wrong in a configuration is an error that names the field."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def expect(condition: bool, name: str, expected: str, got: object) -> None:
    """ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"config: {name}: expected {expected}, got {got!r}")


def typed(part: str, owner: object) -> None:
    """Every field of a frozen dataclass has the type it is annotated with; a list becomes the tuple it stands for."""
    for name, hint in get_type_hints(type(owner)).items():
        object.__setattr__(owner, name, read(hint, getattr(owner, name), f"{part}.{name}"))


def positive(part: str, owner: object, *names: str) -> None:
    for name in names:
        expect(getattr(owner, name) >= 1, f"{part}.{name}", "an integer of at least 1", getattr(owner, name))


def build(cls: type, values: object, path: str) -> Any:
    """A dataclass from a mapping; what is left out keeps its default. `path` is its place in the whole, for errors."""
    if not isinstance(values, dict):
        raise TypeError(f"config: {path or 'the whole'}: expected a mapping, got {type(values).__name__}")
    hints = get_type_hints(cls)
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(f"config: {path or 'the whole'}: expected only {', '.join(hints)}, got {', '.join(unknown)}")
    needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    dot = f"{path}." if path else ""
    for name in needed:
        expect(name in values, dot + name, "a value", None)
    return cls(**{name: read(hints[name], value, dot + name) for name, value in values.items()})


def read(hint: Any, value: object, path: str) -> Any:
    """`value` as the annotated type: a mapping becomes a part, a list a tuple, and a whole number serves as a float."""
    origin, choices = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return value if isinstance(value, hint) else build(hint, value, path)
    if origin in (Union, types.UnionType):
        return None if value is None else read(next(c for c in choices if c is not type(None)), value, path)
    if origin is Literal and value in choices:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = [choices[0]] * len(value) if choices[-1] is ... else list(choices)
        if len(inner) == len(value):
            return tuple(read(h, v, path) for h, v in zip(inner, value, strict=True))
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if (hint in (bool, str) and isinstance(value, hint)) or (origin is dict and isinstance(value, dict)):
        return value
    expected = f"one of {choices}" if origin is Literal else hint.__name__ if hint in (int, float, bool, str) else hint
    raise TypeError(f"config: {path}: expected {expected}, got {value!r}")
