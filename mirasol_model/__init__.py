"""Mirasol3B (arXiv 2311.05698), built on mirasol_kernels."""

from mirasol_model.config import MirasolConfig

__all__ = ["MirasolConfig"]
