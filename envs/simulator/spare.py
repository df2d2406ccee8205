"""Memory of runs that are gone, for the next ones: fresh pages cost more than the simulation of an episode."""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import numpy.typing as npt

_LEAST_BYTES = 1 << 14
_MOST_BYTES = 1 << 28
"""Of all that is kept."""

Bytes = npt.NDArray[np.uint8]

_spare: defaultdict[int, list[Bytes]] = defaultdict(list)
_kept = [0]


def block(owner: object, size: int) -> tuple[Bytes, bool]:
    """Return memory that goes to a later block of about its size once ``owner`` is gone, and whether it is zero.

    Args:
        owner: what no reference to the memory outlives.
        size: bytes at least.
    """
    if size < _LEAST_BYTES:
        return np.zeros(size, np.uint8), True
    step = 1 << (size.bit_length() - 4)  # runs whose sizes differ by a little share their memory
    size = -(-size // step) * step
    if _spare[size]:
        found, zero = _spare[size].pop(), False
        _kept[0] -= size
    else:
        found, zero = np.zeros(size, np.uint8), True
    weakref.finalize(owner, _give_back, found).atexit = False
    return found, zero


def _give_back(used: Bytes) -> None:
    if _kept[0] + used.nbytes <= _MOST_BYTES:
        _kept[0] += used.nbytes
        _spare[used.nbytes].append(used)
