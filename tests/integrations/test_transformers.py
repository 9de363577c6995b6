"""attn_implementation="mirasol" against "sdpa": the same logits, gradients and tokens, or an error before any work."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from mirasol_kernels._check import peak
from mirasol_kernels.integrations import transformers as integration
from tests.integrations.families import FAMILIES, IMAGE, TEXT, TOKENS, Family, inputs_of
from tests.numerics import assert_within_budget

integration.register()
integration.register()  # as often as one likes


@pytest.fixture(autouse=True)
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The layouts that reached the kernel: that one is asked for does not mean that it runs."""
    layouts: list[Any] = []
    run = integration.block_causal_attention

    def spy(q: Tensor, k: Tensor, v: Tensor, layout: Any, **kwargs: Any) -> Any:
        layouts.append(layout)
        return run(q, k, v, layout, **kwargs)

    monkeypatch.setattr(integration, "block_causal_attention", spy)
    yield layouts


def model_of(family: Family) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return family.build().eval()


def cast(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}


def trained(model: hf.PreTrainedModel, name: str, dtype: torch.dtype, inputs: dict, real: Tensor) -> tuple[Tensor, ...]:
    """Logits of the real tokens, and the gradients of all parameters in one."""
    model = model.to(dtype)
    model.set_attn_implementation(name)
    model.zero_grad(set_to_none=True)
    logits = model(**cast(inputs, dtype)).logits[real]
    torch.sin(logits).sum().backward()
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(grads)


def assert_same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Of models in float64: many of their norms round to float32 whatever the dtype, which may tip either way."""
    error, bound = peak(actual - expected), torch.finfo(torch.float32).eps * peak(expected)
    assert error <= bound, f"{what}: error {error:.3e}, bound {bound:.3e}"


CASES = [
    (name, padding)
    for name, family in FAMILIES.items()
    for padding in ("none", "left", "right", "packed")
    if padding != "packed" or family.packs
]


@pytest.mark.parametrize(("name", "padding"), CASES)
def test_logits_and_gradients(name: str, padding: str, spied: list[Any]) -> None:
    model = model_of(FAMILIES[name])
    inputs, real = inputs_of(FAMILIES[name], padding)
    exact = trained(model, "sdpa", torch.float64, inputs, real)
    assert not spied
    for what, want, got in zip(
        ("logits", "gradients"), exact, trained(model, "mirasol", torch.float64, inputs, real), strict=True
    ):
        assert_same(got, want, what)
    assert len(spied) >= 2
    low = trained(model, "sdpa", torch.float32, inputs, real)
    ours = trained(model, "mirasol", torch.float32, inputs, real)
    for what, got, reference, want in zip(("logits", "gradients"), ours, low, exact, strict=True):
        assert_within_budget(got, reference, want, what=what)
