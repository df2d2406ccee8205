"""Where the arrays of a simulated engine lie in its memory, one block so that a run is set up in little time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from servegym.envs.simulator.kernel.state import BLOCK

_CACHE_LINE = 64

_Shapes = dict[str, tuple[int, npt.DTypeLike]]


class Place(NamedTuple):
    """Where an array lies."""

    offset: int
    length: int
    dtype: np.dtype[Any]

    def of(self, memory: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
        """Return the array, shape (length,)."""
        return memory[self.offset : self.offset + self.length * self.dtype.itemsize].view(self.dtype)


class EngineLayout(NamedTuple):
    """The arrays of an engine, by the name of the ENGINE field with their address, less ``_at``.

    Attributes:
        places: of each array.
        zeros: those that begin as zeros; the others are written before they are read.
        size: of all, bytes.
    """

    places: dict[str, Place]
    zeros: tuple[str, ...]
    size: int


@lru_cache(maxsize=256)
def engine_layout(
    seqs: int, blocks: int, block_size: int, row_length: int, ahead: bool, served_users: int | None
) -> EngineLayout:
    """Lay out an engine's arrays.

    Args:
        seqs: requests that run at a time.
        blocks: KV blocks.
        block_size: their tokens.
        row_length: KV blocks of the longest request, with prefix caching; 0 without.
        ahead: asynchronous scheduling.
        served_users: users that the request policy is fair to; None if it does not look at them.
    """
    zeros: _Shapes = {"phases": (block_size, np.int32)}
    if served_users is not None:
        zeros |= {"served": (served_users + 1, np.float64), "queued": (served_users + 1, np.int32)}
    shapes: _Shapes = {name: (seqs, np.int32) for name in ("running", "scheduled", "preempted", "phase_of", "rows")}
    shapes["end_of"] = (seqs, np.int64)
    if ahead:
        shapes |= {name: (seqs, np.int32) for name in ("firsts", "leaving", "leaving_place")}
    if row_length:
        # Twice the blocks, at least: a table at most half full keeps probe sequences short.
        slots = 1 << (2 * blocks).bit_length()
        shapes |= {"blocks": (blocks, BLOCK), "returned": (blocks, np.int32), "free": (slots, np.int32)}
        shapes |= {"table_keys": (slots, np.int64), "table_blocks": (slots, np.int32)}
        shapes["block_tables"] = (seqs * row_length, np.int32)
    places, size = {}, 0
    for name, (length, kind) in (zeros | shapes).items():
        dtype = np.dtype(kind)
        places[name] = Place(size, length, dtype)
        size += -(-length * dtype.itemsize // _CACHE_LINE) * _CACHE_LINE
    return EngineLayout(places, tuple(zeros), size)
