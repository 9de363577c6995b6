"""tqdm's bar, or one that nobody sees where tqdm is not installed: no measurement is to be missed for want of it."""

from __future__ import annotations

from typing import Any, TextIO

try:
    from tqdm import tqdm
except ImportError:

    class tqdm:  # type: ignore[no-redef]
        def __init__(self, **options: Any) -> None:
            pass

        def __enter__(self) -> tqdm:
            return self

        def __exit__(self, *error: Any) -> None:
            pass

        def update(self, n: float = 1) -> None:
            pass

        def set_description(self, text: str) -> None:
            pass

        def write(self, text: str, file: TextIO | None = None) -> None:
            print(text, file=file)


__all__ = ["tqdm"]
