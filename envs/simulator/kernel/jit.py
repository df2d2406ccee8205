"""The kernel's compilation: cached on disk, without run-time error checks of NumPy semantics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from servegym.compilation import compiled

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def jit(function: FunctionT) -> FunctionT:
    """Compile a kernel function: nopython, cached on disk, division by zero as in NumPy, no bounds checks."""
    return compiled(function, error_model="numpy", boundscheck=False)
