"""Placements that do not look at the load: they stand when the experts are loaded, and cost nothing."""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from servegym.baselines.heuristic import Heuristic
from servegym.baselines.interface import ExpertLoad, IntArray, Placement
from servegym.baselines.registry import register
from servegym.configuration import Config


class Static(Heuristic):
    """Base of placements that are fixed by shape alone."""

    static: ClassVar[bool] = True

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the placement, or None if it stands."""
        layers, slots = current.physical_to_logical.shape
        wanted = self._slots(layers, load.tokens.shape[1], slots, current.ranks)
        return None if np.array_equal(current.physical_to_logical, wanted) else Placement(wanted, current.ranks)

    def _slots(self, layers: int, experts: int, slots: int, ranks: int) -> IntArray:
        raise NotImplementedError


@register("expert", "linear", source="vLLM 0.32, distributed/eplb/eplb_state.py, initial map")
class Linear(Static):
    """Experts in order, equally many per rank, never moved: vLLM's default.

    Slot ``p`` holds expert ``p mod experts`` in every layer; slots beyond the experts hold a second copy of the first
    ones.
    """

    def _slots(self, layers: int, experts: int, slots: int, ranks: int) -> IntArray:
        return linear_placement(layers, experts, slots)


@register("expert", "round_robin", source="vLLM 0.32, --expert-placement-strategy round_robin")
class RoundRobin(Static):
    """Expert ``e`` on rank ``e mod ranks``, never moved; slots beyond the experts are dealt on in the same way."""

    def _slots(self, layers: int, experts: int, slots: int, ranks: int) -> IntArray:
        dealt = (np.arange(slots, dtype=np.int64) % experts).reshape(-1, ranks).T.ravel()
        return np.tile(dealt, (layers, 1))


@register("expert", "random", source="a control")
class Random(Static):
    """A random permutation of the linear placement in each layer, never moved."""

    class Params(Config):
        """Parameters."""

        seed: Annotated[int, Field(ge=0)] = Field(default=0, description="of the permutation")

    params: Params

    def _slots(self, layers: int, experts: int, slots: int, ranks: int) -> IntArray:
        rng = np.random.default_rng(self.params.seed)
        return np.asarray(rng.permuted(linear_placement(layers, experts, slots), axis=1))


def linear_placement(layers: int, experts: int, slots: int) -> IntArray:
    """Return ``physical_to_logical`` of the linear placement, shape (layers, slots).

    >>> linear_placement(1, 4, 6)
    array([[0, 1, 2, 3, 0, 1]])
    """
    return np.tile(np.arange(slots, dtype=np.int64) % experts, (layers, 1))
