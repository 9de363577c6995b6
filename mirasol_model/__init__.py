"""Mirasol3B (arXiv 2311.05698), built on mirasol_kernels."""

from mirasol_model.config import MirasolConfig
from mirasol_model.model import Mirasol, MirasolOutput

__all__ = ["Mirasol", "MirasolConfig", "MirasolOutput"]
