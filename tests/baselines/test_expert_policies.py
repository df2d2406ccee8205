"""Static placements."""

from __future__ import annotations

import numpy as np
import pytest

from servegym.baselines import registry
from servegym.baselines.interface import ExpertLoad, ExpertPolicy, Placement


@pytest.mark.parametrize(("slots", "expected"), [(4, [0, 1, 2, 3]), (6, [0, 1, 2, 3, 0, 1])])
def test_linear_restores_the_order_and_then_keeps_it(slots, expected) -> None:
    policy = registry.create("expert", "linear")
    load = ExpertLoad(np.ones((3, 4)))
    shuffled = Placement(np.tile(np.array(expected)[::-1], (3, 1)), ranks=2)
    placed = policy.place(load, shuffled)
    assert isinstance(policy, ExpertPolicy)
    assert placed.physical_to_logical.tolist() == [expected] * 3
    assert placed.ranks == 2
    assert policy.place(load, placed) is None
