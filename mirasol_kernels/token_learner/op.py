"""The op and its backends: so far the reference alone, which autograd differentiates."""

from mirasol_kernels._dispatch import Op

OP = Op("token_learner", cases=f"{__package__}.cases")
