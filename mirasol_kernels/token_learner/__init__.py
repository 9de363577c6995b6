"""TokenLearner: k learned tokens from many, and the softmax monoid it is made of.  README.md has the mathematics."""

from mirasol_kernels.token_learner.api import token_learner, token_learner_state
from mirasol_kernels.token_learner.state import TokenLearnerState

__all__ = ["TokenLearnerState", "token_learner", "token_learner_state"]
