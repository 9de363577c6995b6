"""What states of token learners refuse; what they mean is in test_token_learner.py."""

from __future__ import annotations

import pytest
import torch

from mirasol_kernels.token_learner import TokenLearnerState


def test_states_that_do_not_fit_are_errors() -> None:
    state = TokenLearnerState.empty(torch.randn(2, 0, 4), 5)
    empty = TokenLearnerState.empty
    wrong = state._replace(sum=state.sum[:1])
    for error, message, call in (
        (
            ValueError,
            r"empty: like: expected .* \(B, n, c\), got torch.float32 \(2, 4\)",
            lambda: empty(torch.ones(2, 4), 5),
        ),
        (ValueError, r"empty: like: .*, got torch.int64 \(2, 3, 4\)", lambda: empty(torch.ones(2, 3, 4).long(), 5)),
        (ValueError, r"empty: k: expected an integer of at least 0, got 2.0", lambda: empty(torch.ones(2, 3, 4), 2.0)),
        (TypeError, "merge: other: expected a state, got tuple", lambda: state.merge(tuple(state))),
        (
            ValueError,
            r"merge: other: expected max and sum .*, got \(2, 5\), \(1, 5\), \(2,",
            lambda: state.merge(wrong),
        ),
        (ValueError, r"merge: expected max and sum \(B, k\)", lambda: wrong.merge(state)),
        (ValueError, r"value: expected max and sum \(B, k\)", lambda: wrong.value()),
        (
            ValueError,
            r"merge: other: expected weighted \(2, 5, 4\) like self, got \(1, 5, 4\)",
            lambda: state.merge(empty(torch.randn(1, 0, 4), 5)),
        ),
    ):
        with pytest.raises(error, match=f"TokenLearnerState.{message}"):
            call()
