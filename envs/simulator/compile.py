"""Compiled forms of policies: plain arithmetic functions of a policy class turned into function pointers.

The kernel takes policies as first-class functions, so that one compiled kernel serves every policy.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
from numba import types

_ROW = types.float64[::1]
ENGINE_SCORE = types.void(_ROW, types.float64[:, ::1], _ROW, _ROW)
REQUEST_KEY = types.float64(_ROW, _ROW, _ROW)


def _no_score(request: Any, engines: Any, params: Any, out: Any) -> None:
    out[:] = 0.0


def _no_key(item: Any, context: Any, params: Any) -> float:
    return 0.0


@cache
def engine_score(function: Callable[..., None] | None) -> Any:
    """Compile ``policy.compiled`` of an engine policy; without one, a function that scores all engines alike."""
    return numba.njit(ENGINE_SCORE, cache=True)(function or _no_score)


@cache
def request_key(function: Callable[..., float] | None) -> Any:
    """Compile ``policy.compiled`` of a request policy; without one, a function that scores all requests alike."""
    return numba.njit(REQUEST_KEY, cache=True)(function or _no_key)
