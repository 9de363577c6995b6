"""The judge is judged: a right result passes, each kind of wrong one fails."""

import pytest
import torch

from tests.numerics import assert_close_fp64, assert_golden, assert_within_budget, golden


@pytest.fixture
def sums() -> tuple[torch.Tensor, torch.Tensor]:
    """A product in float32 and the same in float64."""
    a = torch.randn(64, 512)
    return a @ a.T, a.double() @ a.double().T


def test_reference_passes_its_own_budget(sums):
    low, exact = sums
    assert_within_budget(low, low, exact)


@pytest.mark.parametrize(
    "wrong", [lambda x: x + 1e-2, lambda x: x * 1.001, lambda x: x.index_fill(0, torch.tensor(3), float("nan"))]
)
def test_wrong_results_fail(sums, wrong):
    low, exact = sums
    with pytest.raises(AssertionError):
        assert_within_budget(wrong(low), low, exact)


def test_one_wrong_element_fails(sums):
    low, exact = sums
    spoiled = low.clone()
    spoiled[5, 7] += 0.1
    with pytest.raises(AssertionError, match="largest error"):
        assert_within_budget(spoiled, low, exact)


def test_infinities_must_agree():
    exact = torch.tensor([1.0, float("-inf")], dtype=torch.float64)
    assert_within_budget(exact.float(), exact.float(), exact)
    with pytest.raises(AssertionError, match="infinities"):
        assert_within_budget(torch.tensor([1.0, 0.0]), exact.float(), exact)
    with pytest.raises(AssertionError, match="not finite"):
        assert_within_budget(torch.tensor([float("inf"), float("-inf")]), exact.float(), exact)


def test_empty_tensors_pass():
    empty = torch.empty(0, 3)
    assert_within_budget(empty, empty, empty.double())
    assert_close_fp64(empty.double(), empty.double())


def test_close_fp64_is_strict():
    a = torch.randn(10, dtype=torch.float64)
    assert_close_fp64(a, a + 1e-14)
    with pytest.raises(AssertionError):
        assert_close_fp64(a, a + 1e-10)


def test_golden_tolerance_is_relative_to_large_values():
    assert_golden(torch.full((2,), 1000.001), torch.full((2,), 1000.0).numpy())
    with pytest.raises(AssertionError, match="tolerance"):
        assert_golden(torch.full((2,), 1.001), torch.full((2,), 1.0).numpy())


def test_golden_data_is_read():
    arrays = golden("tl_v11_small")
    assert arrays["in.x"].shape == (2, 5, 12)
    assert arrays["out.y"].shape == (2, 4, 12)
