from mirasol_kernels.block_causal_attention.api import block_causal_attention
from mirasol_kernels.block_causal_attention.cache import SnippetCache

__all__ = ["SnippetCache", "block_causal_attention"]
