"""Placements of experts on expert-parallel ranks."""

from servegym.baselines.expert.static import Linear

__all__ = ["Linear"]
