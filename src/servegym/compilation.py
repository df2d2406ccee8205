"""Compilation with numba: on disk where that is possible, in memory where no folder can be written.

Inside an engine whose environment has no numba, what is compiled elsewhere runs as plain Python.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any, TypeVar, cast

HAS_NUMBA = importlib.util.find_spec("numba") is not None
if HAS_NUMBA:
    import numba

FunctionT = TypeVar("FunctionT", bound=Callable[..., Any])


def compiled(function: FunctionT, **options: Any) -> FunctionT:
    """Compile a function in nopython mode, when it is first called.

    Args:
        function: plain Python in the subset that numba takes.
        options: further options of ``numba.njit``.
    """
    if not HAS_NUMBA:
        return function
    try:
        return cast(FunctionT, numba.njit(cache=True, **options)(function))
    except RuntimeError:  # neither beside the source nor in the user's cache folder, or a function from a prompt
        return cast(FunctionT, numba.njit(**options)(function))
