"""Recurrences that recompute instead of remembering, and the Token Turing Machine.  README.md has the algebra."""

from mirasol_kernels.latent_recurrence.api import latent_recurrence, token_turing_recurrence
from mirasol_kernels.latent_recurrence.parameters import TokenTuringParameters

__all__ = ["TokenTuringParameters", "latent_recurrence", "token_turing_recurrence"]
