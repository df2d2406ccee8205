"""Access to the kernel's memory by address.

numba counts references of every array that a function takes, with atomic operations; for the dozens of arrays of a
simulated cluster this costs more than the simulation. The kernel's functions therefore take one record, which holds the
addresses of everything else, as a C struct would. ``build.Memory`` owns the arrays and keeps them alive.
"""

from __future__ import annotations

from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from servegym.envs.simulator.kernel.state import (
    BLOCK,
    CLUSTER,
    ENGINE,
    EXPERTS,
    INDEX_LRU,
    INDEX_NODE,
    REQUEST,
    TELEMETRY,
)


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


def _call(result: types.Type, pointers: int, integers: int) -> Any:
    """An intrinsic that calls a C function at an address with addresses of float64 arrays and with integers."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        address, *rest = arguments
        places = [builder.inttoptr(argument, ir.DoubleType().as_pointer()) for argument in rest[:pointers]]
        values = places + rest[pointers:]
        function_type = ir.FunctionType(
            context.get_value_type(result) if result is not types.void else ir.VoidType(),
            [value.type for value in values],
        )
        returned = builder.call(builder.inttoptr(address, function_type.as_pointer()), values)
        return returned if result is not types.void else context.get_dummy_value()

    if pointers + integers == 6:

        def call6(typing_context: Any, f: Any, a: Any, b: Any, c: Any, d: Any, e: Any, g: Any) -> Any:
            return result(*[types.int64] * 7), generate

        return intrinsic(call6)

    def call4(typing_context: Any, f: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
        return result(*[types.int64] * 5), generate

    return intrinsic(call4)


ints = _pointer(types.int32)
longs = _pointer(types.int64)
floats = _pointer(types.float64)
small = _pointer(types.int8)
shorts = _pointer(types.uint16)
cluster_at = _element(CLUSTER)
request_at = _element(REQUEST)
engine_at = _element(ENGINE)
telemetry_at = _element(TELEMETRY)
block_at = _element(BLOCK)
experts_at = _element(EXPERTS)
index_node_at = _element(INDEX_NODE)
lru_at = _element(INDEX_LRU)
call_engine_score = _call(types.void, pointers=4, integers=2)
call_request_key = _call(types.float64, pointers=3, integers=1)
