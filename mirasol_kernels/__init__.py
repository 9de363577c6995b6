"""Fused kernels for models that read time in snippets, each beside a plain PyTorch reference.

Axis letters, everywhere in this package: B batch, H heads (Hq of queries, Hkv of keys and values), N tokens (Nq, Nk),
D head width (Dv of values), T snippets, n tokens of a source, c model width, h hidden width, k learned tokens.
"""

from mirasol_kernels._dispatch import explain, use_backend, wanted_backend
from mirasol_kernels.block_causal_attention import SnippetCache, block_causal_attention
from mirasol_kernels.context_parallel import ContextShards, Ranks, context_parallel_attention, snippet_owners
from mirasol_kernels.latent_recurrence import TokenTuringParameters, latent_recurrence, token_turing_recurrence
from mirasol_kernels.layout import SnippetLayout
from mirasol_kernels.token_learner import TokenLearnerState, token_learner, token_learner_state

__all__ = [
    "ContextShards",
    "Ranks",
    "SnippetCache",
    "SnippetLayout",
    "TokenLearnerState",
    "TokenTuringParameters",
    "block_causal_attention",
    "context_parallel_attention",
    "explain",
    "latent_recurrence",
    "snippet_owners",
    "token_learner",
    "token_learner_state",
    "token_turing_recurrence",
    "use_backend",
    "wanted_backend",
]
