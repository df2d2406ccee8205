"""Large arrays of runs that are gone, for the next ones: fresh pages cost more than the simulation of an episode."""

from __future__ import annotations

import weakref
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

_LEAST_BYTES = 1 << 14
_MOST_BYTES = 1 << 28
"""Of all that is kept."""

Bytes = npt.NDArray[np.uint8]

_spare: defaultdict[int, list[Bytes]] = defaultdict(list)
_kept = [0]


def array(owner: object, length: int, dtype: npt.DTypeLike, *, zero: bool) -> npt.NDArray[Any]:
    """Return an array whose memory goes to a later one of its size once ``owner`` is gone.

    Args:
        owner: what no reference to the array outlives.
        length: number of elements.
        dtype: their type.
        zero: whether it has to hold zeros; else anything.
    """
    kind = np.dtype(dtype)
    size = length * kind.itemsize
    make = np.zeros if zero else np.empty
    if size < _LEAST_BYTES:
        return make(length, kind)
    try:
        found = _spare[size].pop()
        _kept[0] -= size
        if zero:
            found.fill(0)
    except IndexError:
        found = make(size, np.uint8)
    weakref.finalize(owner, _give_back, found).atexit = False
    return found.view(kind)


def _give_back(used: Bytes) -> None:
    if _kept[0] + used.nbytes <= _MOST_BYTES:
        _kept[0] += used.nbytes
        _spare[used.nbytes].append(used)
