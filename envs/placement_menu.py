"""A menu of placement rules from which an agent chooses: what each would do now, and what that looks like."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from servegym.baselines.interface import ExpertLoad, FloatArray, Placement
from servegym.baselines.placement_features import PLACEMENT_CONTEXT, placement_context, placement_features
from servegym.baselines.policy_spec import PolicySpec
from servegym.baselines.registry import create


class PlacementMenu:
    """An expert policy that asks all its rules and takes the one that was chosen; entry 0 keeps what stands.

    Attributes:
        size: entries, "keep" included.
        chosen: index of the entry to take, shape (1,); shared by copies, so that one choice holds for all groups.
        candidates: what each entry proposed last; None where it keeps.
        features: rows of the candidates, shape (size, PLACEMENT_FEATURES).
        context: shape (PLACEMENT_CONTEXT,).
    """

    def __init__(self, rules: Sequence[PolicySpec]) -> None:
        self._rules = [create("expert", rule) for rule in rules]
        self.size = 1 + len(rules)
        self.chosen = np.zeros(1, dtype=np.int64)
        for need in ("needs_sources", "needs_coactivation", "needs_oracle"):
            setattr(self, need, any(getattr(rule, need, False) for rule in self._rules))
        self.reset(0)

    def __deepcopy__(self, memo: dict[int, Any]) -> PlacementMenu:
        twin = copy.copy(self)
        twin._rules = copy.deepcopy(self._rules, memo)
        return twin

    def reset(self, seed: int) -> None:
        """Forget the last proposals and what the rules remember."""
        for rule in self._rules:
            if hasattr(rule, "reset"):
                rule.reset(seed)
        self._before: FloatArray | None = None
        self.candidates: list[Placement | None] = [None] * self.size
        self.context = np.zeros(len(PLACEMENT_CONTEXT))
        self.features = placement_features(ExpertLoad(np.ones((1, 1))), _NOTHING, self.candidates)

    def propose(self, load: ExpertLoad, current: Placement) -> None:
        """Ask every rule."""
        self.candidates = [None, *(rule.place(load, current) for rule in self._rules)]
        self.features = placement_features(load, current, self.candidates)
        self.context = placement_context(load, self._before, current)
        self._before = load.tokens

    def allowed(self) -> FloatArray:
        """Return 1 where an entry would change something, and for "keep"; shape (size,), int8."""
        mask = np.array([candidate is not None for candidate in self.candidates], dtype=np.int8)
        mask[0] = 1
        return mask  # type: ignore[return-value]

    def place(self, load: ExpertLoad, current: Placement) -> Placement | None:
        """Return the chosen rule's placement, None to keep."""
        self.propose(load, current)
        return self.candidates[int(self.chosen[0])]


_NOTHING = Placement(np.zeros((1, 1), dtype=np.int64), 1)
