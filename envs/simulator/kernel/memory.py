"""Access to the kernel's memory by address.

numba counts references of every array that a function takes, with atomic operations; for the dozens of arrays of a
simulated cluster this costs more than the simulation. The kernel's functions therefore take one record, which holds the
addresses of everything else, as a C struct would. ``build.Memory`` owns the arrays and keeps them alive.
"""

from __future__ import annotations

from typing import Any

import numba
from numba import types
from numba.extending import intrinsic

from servegym.envs.simulator.kernel.state import ENGINE, REQUEST, TELEMETRY


def _pointer(element: types.Type) -> Any:
    """An intrinsic that turns an address into a pointer to elements of a type."""

    def pointer(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return intrinsic(pointer)


def _element(dtype: Any) -> Any:
    """An intrinsic that returns the record number ``index`` of a table at an address."""
    record = numba.from_dtype(dtype)

    def element(typing_context: Any, address: Any, index: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            offset = builder.mul(arguments[1], arguments[1].type(dtype.itemsize))
            place = builder.add(arguments[0], offset)
            return builder.inttoptr(place, context.get_value_type(signature.return_type))

        return record(types.int64, types.int64), generate

    return intrinsic(element)


ints = _pointer(types.int32)
longs = _pointer(types.int64)
floats = _pointer(types.float64)
small = _pointer(types.int8)
request_at = _element(REQUEST)
engine_at = _element(ENGINE)
telemetry_at = _element(TELEMETRY)
