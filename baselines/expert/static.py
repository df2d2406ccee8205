"""Placements that do not look at the load."""

from __future__ import annotations

import numpy as np

from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, IntArray, Placement
from servegym.baselines.registry import register


@register("expert", "linear", source="vLLM 0.32, distributed/eplb/eplb_state.py, initial map")
class Linear(Heuristic):
    """Experts in order, equally many per rank, never moved: vLLM's default.

    Slot ``p`` holds expert ``p mod experts`` in every layer; slots beyond the experts hold a second copy of the first
    ones.
    """

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the linear placement, or None if it stands."""
        layers, slots = current.physical_to_logical.shape
        wanted = linear_placement(layers, load.tokens.shape[1], slots)
        if np.array_equal(current.physical_to_logical, wanted):
            return None
        return Placement(wanted, current.ranks)


def linear_placement(layers: int, experts: int, slots: int) -> IntArray:
    """Return ``physical_to_logical`` of the linear placement, shape (layers, slots).

    >>> linear_placement(1, 4, 6)
    array([[0, 1, 2, 3, 0, 1]])
    """
    return np.tile(np.arange(slots, dtype=np.int64) % experts, (layers, 1))
