"""Fused kernels for models that read time in snippets, each beside a plain PyTorch reference.

Axis letters, everywhere in this package: B batch, H heads (Hq of queries, Hkv of keys and values), N tokens (Nq, Nk),
D head width (Dv of values), T snippets, n tokens of a source, c model width, h hidden width, k learned tokens.
"""
