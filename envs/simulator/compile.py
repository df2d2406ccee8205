"""Compiled forms of policies: arithmetic functions of a policy class, turned into C functions for the kernel.

The kernel calls a policy through its address, so that one compiled kernel serves every policy.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numba
from numba import carray, farray, types

from servegym.baselines.interface import CONTEXT_COLUMNS, ENGINE_COLUMNS, QUEUE_COLUMNS, REQUEST_COLUMNS
from servegym.compilation import compiled

_NUMBERS = types.CPointer(types.float64)
_ENGINE_SCORE = types.void(_NUMBERS, _NUMBERS, _NUMBERS, _NUMBERS, types.int64, types.int64)
_REQUEST_KEY = types.float64(_NUMBERS, _NUMBERS, _NUMBERS, types.int64)


@cache
def engine_score(function: Callable[..., None] | None) -> int:
    """Compile ``policy.compiled`` of an engine policy and return its address; 0 for none."""
    if function is None:
        return 0
    score = compiled(function)

    def call(request: Any, engines: Any, params: Any, out: Any, count: int, param_count: int) -> None:
        score(
            carray(request, (REQUEST_COLUMNS,)),
            farray(engines, (count, ENGINE_COLUMNS)),
            carray(params, (param_count,)),
            carray(out, (count,)),
        )

    return int(_keep(numba.cfunc(_ENGINE_SCORE)(call)).address)


@cache
def request_key(function: Callable[..., float] | None) -> int:
    """Compile ``policy.compiled`` of a request policy and return its address; 0 for none."""
    if function is None:
        return 0
    key = compiled(function)

    def call(item: Any, context: Any, params: Any, param_count: int) -> Any:
        return key(carray(item, (QUEUE_COLUMNS,)), carray(context, (CONTEXT_COLUMNS,)), carray(params, (param_count,)))

    return int(_keep(numba.cfunc(_REQUEST_KEY)(call)).address)


_kept: list[Any] = []


def _keep(function: Any) -> Any:
    """Keep a C function alive for as long as its address may be called."""
    _kept.append(function)
    return function


@cache
def announce_compilation() -> None:
    """Say on stderr, once a process, that the kernel is about to be compiled, unless its cache on disk is warm."""
    from servegym.envs.simulator.kernel.cluster import advance_to_decision

    cache_file = getattr(getattr(advance_to_decision, "_cache", None), "_cache_file", None)
    index = getattr(cache_file, "_index_path", None)
    if index is not None and not Path(index).exists():
        print("servegym: compiling the simulator, once (about 20 s)", file=sys.stderr, flush=True)
