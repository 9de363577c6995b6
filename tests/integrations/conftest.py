"""What reaches the kernel, for every test of an integration that asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from mirasol_kernels.integrations import transformers as integration


@pytest.fixture
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The layouts that reached the kernel: that one is asked for does not mean that it runs."""
    layouts: list[Any] = []
    run = integration.block_causal_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, layout: Any, **kwargs: Any) -> Any:
        layouts.append(layout)
        return run(q, k, v, layout, **kwargs)

    monkeypatch.setattr(integration, "block_causal_attention", spy)
    yield layouts
